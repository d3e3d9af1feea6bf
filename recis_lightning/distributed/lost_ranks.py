"""Ranks that are lost: which one has ended or hangs, where another one's message fails.

A library of messages knows only that a connection has closed, or that nobody answered in time. So a
rank whose message failed leaves a note in the store by which the ranks found each other, and looks
for the notes of the others: a rank that leaves none is lost.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import distributed

from recis_lightning.distributed.process_group import ProcessGroup, global_ranks, rank

_PATIENCE_S = 2.0  # for the notes of others, whose messages fail when this rank's does
_PAUSE_S = 0.05


class _Thread(threading.local):
    """Settings of a thread.

    Attributes:
        names_lost: Whether its errors name lost ranks.
    """

    names_lost = True


_THREAD = _Thread()


def leave_lost_unnamed() -> None:
    """Let this thread's errors be torch's: who waits for its messages names lost ranks."""
    _THREAD.names_lost = False


@contextmanager
def naming_lost_ranks(
    doing: Callable[[], str], process_group: ProcessGroup | None = None
) -> Iterator[None]:
    """Raise an error that names the lost ranks where a message of torch's fails.

    Args:
        doing: Returns what this rank does: "looks up tables ['user']".
        process_group: Whose ranks communicate; None means all.

    Raises:
        RuntimeError: A message failed; names the ranks that are lost and what this one does.
    """
    try:
        yield
    except RuntimeError as error:
        if not _THREAD.names_lost:
            raise
        silent = _find_silent(process_group)
        raise RuntimeError(_describe(doing(), silent, str(error))) from error


def _find_silent(process_group: ProcessGroup | None) -> list[int] | None:
    """Return the ranks that left no note in time; None if there is no store to leave it in."""
    name = "all" if process_group is None else process_group.group_name
    prefix = f"recis_lightning/failed/{name}"
    try:
        store = distributed.distributed_c10d._get_default_store()
        store.set(f"{prefix}/{rank()}", "")
        others = [other for other in global_ranks(process_group) if other != rank()]
        silent = _without_note(store, prefix, others)
        store.set(f"{prefix}/found/{rank()}", "")
    except RuntimeError:
        return None
    if rank() == 0:  # it may hold the store: not to end before the others have looked
        with suppress(RuntimeError):
            there = [other for other in others if other not in silent]
            _without_note(store, f"{prefix}/found", there)
    return silent


def _without_note(store: Any, prefix: str, ranks: Sequence[int]) -> list[int]:
    """Return the ranks that have left no note in time."""
    silent, end = list(ranks), time.monotonic() + _PATIENCE_S
    while True:
        silent = [other for other in silent if not store.check([f"{prefix}/{other}"])]
        if not silent or time.monotonic() > end:
            return silent
        time.sleep(_PAUSE_S)


def _describe(doing: str, silent: Sequence[int] | None, error: str) -> str:
    """Return the words of an error.

    Args:
        doing: What this rank does.
        silent: Ranks that are lost; None if nobody can be asked.
        error: Torch's words.

    Example:
        >>> _describe("looks up tables ['user']", [1], "Connection closed by peer")
        "rank 0 looks up tables ['user'] and lost rank 1, which has ended"
    """
    start = f"rank {rank()} {doing}"
    if silent is None:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun
            return (
                f"{start} and lost another rank; it cannot ask which one, for the launcher, which "
                "holds the store by which ranks find each other, is gone too"
            )
        return (
            f"{start} and lost rank 0, which has ended, and with it the store by which ranks find "
            "each other: whether others are lost cannot be asked"
        )
    if not silent:
        return f"{start}, and its message failed though all ranks are there: {error}"
    timed_out = "timed out" in error.lower() or "timeout" in error.lower()
    fate = "has ended" if len(silent) == 1 else "have ended"
    if timed_out:
        fate = (
            "did not come within the process group's timeout: hanging, ended, or busy with "
            "something else"
        )
    return f"{start} and lost {name_ranks(silent)}, which {fate}"


def name_ranks(ranks: Sequence[int]) -> str:
    """Name ranks.

    Example:
        >>> name_ranks([0, 2, 3])
        'ranks 0, 2, 3'
    """
    listed = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"


__all__ = ["leave_lost_unnamed", "name_ranks", "naming_lost_ranks"]
