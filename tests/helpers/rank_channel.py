"""What ranks run in the tests of the channel of exchanges that run ahead."""

import threading

import torch
from torch import distributed

from recis_lightning.distributed.ahead_channel import channel_of
from recis_lightning.distributed.heads import Head, Kind, exchange_heads


def heard(channel, used=0):
    """Exchange heads of the main way; return what each rank would use."""
    head = Head(Kind.COLLECTIVE, 0, lambda: "tests", ahead=channel.tell(used))
    return channel.hear(exchange_heads(head).ahead, None).tolist()


def summed(number):
    def work(group):
        head = Head(Kind.AHEAD, number, lambda: f"adds up {number}")
        exchange_heads(head, None, group)
        total = torch.tensor([number * (1 + distributed.get_rank())])
        distributed.all_reduce(total, group=group)
        return total.item()

    return work


def in_order():
    """Exchanges begin once one rank has asked; they come in order, in a thread that goes."""
    channel = channel_of(None)
    assert channel is channel_of(None)
    if distributed.get_rank():
        assert channel.begin(summed(1)) is None
    assert not channel.is_open
    assert heard(channel) == [0, 0]
    assert channel.is_open
    begun = [channel.begin(summed(number)) for number in (3, 4)]
    assert [one.number for one in begun] == [1, 2]
    assert heard(channel, used=2) == [2, 2]
    assert [one.answer.result(timeout=20) for one in begun] == [9, 12]
    assert not begun[0].has_failed()


def where_ranks_differ():
    """What one rank has not begun fails on the other, and the next one is right."""
    rank, channel = distributed.get_rank(), channel_of(None)
    channel.begin_none()
    heard(channel)
    first = channel.begin(summed(7)) if rank == 0 else None
    assert heard(channel) == [0, 0]
    other = channel.begin(summed(10 + rank))
    last = channel.begin(summed(5))
    assert last.number == 3
    assert last.answer.result(timeout=20) == 15
    for failed in [other] if first is None else [first, other]:
        assert isinstance(failed.answer.exception(timeout=20), RuntimeError)
        assert failed.has_failed()
    if first is not None:
        assert "rank 1 has nothing to exchange ahead" in str(first.answer.exception())


def destroyed_in_flight():
    """An exchange that nobody has asked for comes to its end where the group is destroyed."""
    channel = channel_of(None)
    channel.begin_none()
    heard(channel)
    begun = [channel.begin(summed(number)) for number in range(20)]
    distributed.destroy_process_group()
    assert [one.answer.result(timeout=0) for one in begun] == [3 * n for n in range(20)]
    assert not channel.is_open


def names_of_threads():
    """Those of groups that are gone are gone as well."""
    return [thread.name for thread in threading.enumerate() if "ahead" in thread.name]
