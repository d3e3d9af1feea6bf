"""Lock of tables: any number of threads read, or one changes what is stored."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from operator import methodcaller
from threading import get_ident
from types import FrameType
from typing import Any, TypeVar

_numbers = itertools.count()
_live: weakref.WeakSet[TableLock] = weakref.WeakSet()
_Method = TypeVar("_Method", bound=Callable[..., Any])
_Result = TypeVar("_Result")
_release = methodcaller("release")
_PATIENCE = 0.05  # seconds after which a writer asks whether those it waits for still read


class TableLock:
    """Lock of the tables of one module, for ``read`` and ``write``.

    Kernels run without the interpreter's lock, and what they are given are addresses: memory that
    they read must neither be replaced nor be written meanwhile. Readers only note themselves, so
    that any number of them run at once at hardly any cost; a writer waits for those there are, and
    later ones wait for it. A thread that writes may read, and write again, but one that reads must
    not write.

    Attributes:
        number: Order in which several locks are taken.
        turn: Held by the thread that writes.
        writer: The thread that writes or waits for readers; None if there is none.

    Example:
        >>> lock = TableLock()
        >>> write([lock], read, [lock], len, "ab")
        2
    """

    def __init__(self) -> None:
        self.number = next(_numbers)
        self._start()
        _live.add(self)

    def _start(self) -> None:
        self.turn = threading.RLock()
        self.writer: int | None = None
        self._readers: dict[int, int] = {}  # reads within reads, by thread
        self._left = threading.Event()

    def begin_read(self) -> None:
        """Wait until no other thread writes, and let none begin; ``read`` calls it."""
        thread = get_ident()
        depth = self._readers.get(thread, 0)
        self._readers[thread] = depth + 1  # first, so that a writer who comes now sees it
        if self.writer is None or self.writer == thread:
            return
        if depth and _is_reading(sys._getframe(2)):
            return  # the writer waits for the read that this one is a part of
        self._readers.pop(thread, None)
        self._left.set()
        with self.turn:  # when the writer is done
            self._readers[thread] = 1

    def end_read(self) -> None:
        """Let writers begin; does nothing in a thread that does not read."""
        thread = get_ident()
        depth = self._readers.get(thread, 0)
        if depth > 1:
            self._readers[thread] = depth - 1
            return
        self._readers.pop(thread, None)
        if self.writer is not None:
            self._left.set()

    def _forget_the_gone(self) -> None:
        """Forget readers that no longer read: their threads ended, or an interrupt came between."""
        frames = sys._current_frames()
        for thread in list(self._readers):
            if not _is_reading(frames.get(thread)):
                self._readers.pop(thread, None)

    def wait_for_readers(self) -> None:
        """Keep readers out, and wait until those of other threads are done; ``write`` calls it."""
        thread = self.writer = get_ident()
        while self._readers:
            self._left.clear()
            if not any(reader != thread for reader in list(self._readers)):
                break
            if not self._left.wait(_PATIENCE):
                self._forget_the_gone()


def distinct_locks(locks: Iterable[TableLock]) -> tuple[TableLock, ...]:
    """Return each lock once, in the order in which they are taken."""
    return tuple(sorted(set(locks), key=lambda lock: lock.number))


def read(locks: Sequence[TableLock], work: Callable[..., _Result], *args: Any) -> _Result:
    """Call a function while no other thread changes what the locks protect."""
    begun = 0
    try:
        for lock in locks:
            lock.begin_read()
            begun += 1
        return work(*args)
    finally:
        for lock in locks[:begun]:
            lock.end_read()


def _is_reading(frame: FrameType | None) -> bool:
    """Tell whether a frame, or one that it was called from, is of ``read``."""
    while frame is not None:
        if frame.f_code is read.__code__:
            return True
        frame = frame.f_back
    return False


def write(locks: Sequence[TableLock], work: Callable[..., _Result], *args: Any) -> _Result:
    """Call a function while no other thread reads or changes what the locks protect."""
    if len(locks) != 1:
        return _write_all(locks, work, args)
    (lock,) = locks
    with lock.turn:  # as a lock of Python's own: Ctrl-C comes before it or within it
        before = lock.writer
        try:
            lock.wait_for_readers()
            return work(*args)
        finally:
            lock.writer = before


def _write_all(
    locks: Sequence[TableLock], work: Callable[..., _Result], args: tuple[Any, ...]
) -> _Result:
    turns: list[Any] = []
    writers: list[int | None] = []
    # Made before the first is taken, so that no line, where Ctrl-C may come, lies between releases.
    releases = map(_release, turns)
    try:
        for lock in locks:
            turns.append(lock.turn)
            lock.turn.acquire()
            writers.append(lock.writer)
            lock.wait_for_readers()
        return work(*args)
    finally:
        try:
            for lock, before in zip(locks, writers, strict=False):
                lock.writer = before
        finally:
            with contextlib.suppress(RuntimeError):  # the last may not have been taken
                deque(releases, 0)


def reads(method: _Method) -> _Method:
    """Have a method of something with a ``lock`` run while no other thread changes it."""

    @wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        return read((self.lock,), partial(method, self, *args, **kwargs))

    return locked  # type: ignore[return-value]


def writes(method: _Method) -> _Method:
    """Have a method of something with a ``lock`` run while no other thread reads or changes it."""

    @wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        return write((self.lock,), partial(method, self, *args, **kwargs))

    return locked  # type: ignore[return-value]


def _restart_all() -> None:
    for lock in list(_live):
        lock._start()


os.register_at_fork(after_in_child=_restart_all)  # the threads that held them are not there


__all__ = ["TableLock", "distinct_locks", "read", "reads", "write", "writes"]
