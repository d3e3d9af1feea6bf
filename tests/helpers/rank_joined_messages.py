"""What ranks run in the tests of joined messages."""

import torch

from recis_lightning.distributed.joined_messages import Message, exchange_messages
from recis_lightning.distributed.process_group import rank, world_size
from tests.helpers.rank_messages import counted


def exchanged():
    """Return what came of messages that travelled together, and of each alone."""
    size = world_size()
    generator = torch.Generator().manual_seed(rank())
    messages = []
    for number, (dtype, shape) in enumerate(
        [
            (torch.bfloat16, (3,)),
            (torch.int64, ()),
            (torch.float32, (2, 2)),
            (torch.uint8, (1,)),
            (torch.int64, (2,)),
        ]
    ):
        # What goes from one rank to another: none of the last.
        counts = torch.arange(size * size).view(size, size) * number % 4 * (number < 4)
        input_splits, output_splits = counts[rank()].tolist(), counts[:, rank()].tolist()
        values = torch.randint(99, (sum(input_splits), *shape), generator=generator).to(dtype)
        messages.append(Message(values, output_splits, input_splits))
    with counted() as calls:
        together = exchange_messages(messages, lambda: "tests")
    assert calls.total() == 1
    return together, [exchange_messages([message], lambda: "tests")[0] for message in messages]
