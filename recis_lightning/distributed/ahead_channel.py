"""Channel of exchanges that run ahead, beside a process group's own, while a rank computes.

A thread sends them in the order in which they were begun, over a group of its own, so that they
meet neither the messages of the main way nor DDP's. What they bring may be used only where all
ranks have begun the same and need it. They learn that from the heads of the main way: each tells
how many exchanges it has begun, and which one it would use. If ranks differ, nobody uses it, and
those that have begun fewer begin empty ones in their place, so that nobody waits for ever.
"""

from __future__ import annotations

import atexit
import functools
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from recis_lightning.distributed.heads import Head, Kind, exchange_heads
from recis_lightning.distributed.lost_ranks import leave_lost_unnamed, naming_lost_ranks
from recis_lightning.distributed.process_group import ProcessGroup, kept_of, make_group_beside

_BITS = 32  # of what a head tells, for the number of exchanges begun
_MOST = (1 << _BITS) - 1
_PATIENCE_S = 5.0  # for exchanges in flight, where the process group or the process ends


class Begun(NamedTuple):
    """Exchange that was begun.

    Attributes:
        number: How many this rank has begun, with this one.
        answer: Its result, once it is there.
    """

    number: int
    answer: Future[Any]

    def has_failed(self) -> bool:
        """Return whether it is known by now that nothing comes."""
        return self.answer.done() and self.answer.exception() is not None

    def wait(self, doing: Callable[[], str], process_group: ProcessGroup | None) -> Any:
        """Return the answer, which all ranks use.

        Args:
            doing: Returns what this rank does, for errors.
            process_group: The ranks; None means all.

        Raises:
            RuntimeError: A rank has gone; names it.
        """
        with naming_lost_ranks(doing, process_group):
            return self.answer.result()


class AheadChannel:
    """Channel of a process group of several ranks.

    It opens where all ranks are level, after one has asked for it: until then nothing is begun.

    Attributes:
        num_begun: How many exchanges this rank has begun.
    """

    def __init__(self) -> None:
        self.num_begun = 0
        self._group: ProcessGroup | None = None
        self._is_wanted = False
        self._jobs: SimpleQueue[Any] = SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def is_open(self) -> bool:
        """Whether exchanges can be begun; the same on all ranks."""
        return self._group is not None

    def begin(self, work: Callable[[ProcessGroup], Any]) -> Begun | None:
        """Begin an exchange.

        Args:
            work: Called in the channel's thread with the group that carries its messages. It begins
                with a head.

        Returns:
            None if the channel is not open; it will be, after the next heads of all ranks.
        """
        if self._group is None:
            self._is_wanted = True
            return None
        self.num_begun += 1
        begun = Begun(self.num_begun, Future())
        self._jobs.put((work, self._group, begun.answer))
        return begun

    def begin_none(self) -> None:
        """Begin an empty exchange: ranks that begin another one in its place will not use it."""
        self.begin(_send_nothing)

    def tell(self, used: int = 0) -> int:
        """Return what a head of the main way tells.

        Args:
            used: Number of the exchange that this rank would use; 0 for none.
        """
        return used << _BITS | (self.num_begun if self.is_open else self._is_wanted)

    def hear(
        self, told: npt.NDArray[np.int64], process_group: ProcessGroup | None
    ) -> npt.NDArray[np.int64]:
        """Take note of what the heads of all ranks tell, and open the channel if one asks for it.

        Args:
            told: int64 [num_ranks], what each rank's ``tell`` returned.
            process_group: The ranks; None means all.

        Returns:
            int64 [num_ranks], the number of the exchange that each would use.
        """
        most = int((told & _MOST).max())
        if self._group is not None:
            for _ in range(most - self.num_begun):
                self.begin_none()
        elif most:
            self._group = make_group_beside(process_group)
            self._thread = threading.Thread(
                target=_run, args=(self._jobs,), name="recis_lightning ahead", daemon=True
            )
            weakref.finalize(self, self._jobs.put, None)
            self._thread.start()
            _close_before_destruction()
        return told >> _BITS

    def close(self) -> None:
        """Wait for what was begun, as long as other ranks may take to begin it; begin no more."""
        self._group, self._is_wanted = None, False
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join(_PATIENCE_S)


def _send_nothing(group: ProcessGroup) -> None:
    exchange_heads(Head(Kind.FAILED, 0, lambda: "has nothing to exchange ahead"), None, group)


def _run(jobs: SimpleQueue[Any]) -> None:
    """Do jobs until there is None."""
    leave_lost_unnamed()
    for work, group, answer in iter(jobs.get, None):
        try:
            answer.set_result(work(group))
        except BaseException as error:
            answer.set_exception(error)
        del work, group, answer  # not until the next job comes


def _close_before_destruction() -> None:
    """From now on, let channels end in order where their process groups are destroyed."""
    original = torch.distributed.destroy_process_group
    if getattr(original, "closes_channels", False):
        return

    @functools.wraps(original)
    def destroy_process_group(group: ProcessGroup | None = None) -> None:
        for of, channel in list(_channels.items()):
            if group is None or of is group:
                channel.close()
                _channels.pop(of, None)
        original(group)

    destroy_process_group.closes_channels = True  # type: ignore[attr-defined]
    torch.distributed.destroy_process_group = destroy_process_group
    # A thread that the interpreter ends within a message would abort the process.
    atexit.register(_close_all)


def _close_all() -> None:
    for channel in list(_channels.values()):
        channel.close()


_channels: weakref.WeakKeyDictionary[Any, AheadChannel] = weakref.WeakKeyDictionary()


def channel_of(process_group: ProcessGroup | None) -> AheadChannel:
    """Return the channel of a process group that is there; it goes with the group.

    Args:
        process_group: The group; None means all ranks.
    """
    return kept_of(process_group, _channels, AheadChannel)


__all__ = ["AheadChannel", "Begun", "channel_of"]
