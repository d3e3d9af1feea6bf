"""Lock of tables: any number of threads read, or one changes what is stored."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial, wraps
from threading import get_ident
from types import FrameType
from typing import Any, TypeVar

_numbers = itertools.count()
_live: weakref.WeakSet[TableLock] = weakref.WeakSet()
_Method = TypeVar("_Method", bound=Callable[..., Any])
_Result = TypeVar("_Result")
_PATIENCE = 0.05  # seconds after which a writer asks whether those it waits for still read


class TableLock:
    """Lock of the tables of one module, entered by the thread that changes them.

    Kernels run without the interpreter's lock, and what they are given are addresses: memory that
    they read must neither be replaced nor be written meanwhile. Readers only note themselves, so
    that any number of them run at once at hardly any cost; a writer waits for those there are, and
    later ones wait for it. A thread that writes may read, and write again, but one that reads must
    not write.

    Attributes:
        number: Order in which several locks are taken.

    Example:
        >>> lock = TableLock()
        >>> with lock:
        ...     read([lock], len, "ab")
        2
    """

    def __init__(self) -> None:
        self.number = next(_numbers)
        self._start()
        _live.add(self)

    def _start(self) -> None:
        self._turn = threading.RLock()  # of writers
        self._depth = 0
        self._writer: int | None = None
        self._readers: dict[int, int] = {}  # reads within reads, by thread
        self._left = threading.Event()

    def begin_read(self) -> None:
        """Wait until no other thread writes, and let none begin; ``read`` calls it."""
        thread = get_ident()
        depth = self._readers.get(thread, 0)
        self._readers[thread] = depth + 1  # first, so that a writer who comes now sees it
        if self._writer is None or self._writer == thread:
            return
        if depth and _is_reading(sys._getframe(2)):
            return  # the writer waits for the read that this one is a part of
        del self._readers[thread]
        self._left.set()
        with self._turn:  # when the writer is done
            self._readers[thread] = 1

    def end_read(self) -> None:
        """Let writers begin; does nothing in a thread that does not read."""
        thread = get_ident()
        depth = self._readers.get(thread, 0)
        if depth > 1:
            self._readers[thread] = depth - 1
            return
        self._readers.pop(thread, None)
        if self._writer is not None:
            self._left.set()

    def _forget_the_gone(self) -> None:
        """Forget readers that no longer read: their threads ended, or an interrupt came between."""
        frames = sys._current_frames()
        for thread in list(self._readers):
            if not _is_reading(frames.get(thread)):
                self._readers.pop(thread, None)

    def __enter__(self) -> None:
        self._turn.acquire()
        self._depth += 1
        try:
            thread = self._writer = get_ident()
            while self._readers:
                self._left.clear()
                if not any(reader != thread for reader in list(self._readers)):
                    break
                if not self._left.wait(_PATIENCE):
                    self._forget_the_gone()
        except BaseException:  # Ctrl-C while it waits
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        if not self._depth:
            return  # a child that was forked in between has a new lock
        self._depth -= 1
        if not self._depth:
            self._writer = None
        self._turn.release()


class _AllOf:
    """Several locks, taken in the order of their numbers."""

    def __init__(self, locks: Sequence[TableLock]) -> None:
        self._locks = locks
        self._num_taken = 0

    def __enter__(self) -> None:
        try:
            for lock in self._locks:
                lock.__enter__()
                self._num_taken += 1
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        for lock in self._locks[: self._num_taken][::-1]:
            lock.__exit__()


def distinct_locks(locks: Iterable[TableLock]) -> tuple[TableLock, ...]:
    """Return each lock once, in the order in which they are taken."""
    return tuple(sorted(set(locks), key=lambda lock: lock.number))


def read(locks: Sequence[TableLock], work: Callable[..., _Result], *args: Any) -> _Result:
    """Call a function while no other thread changes what the locks protect."""
    try:
        for lock in locks:
            lock.begin_read()
        return work(*args)
    finally:
        for lock in locks:
            lock.end_read()


def _is_reading(frame: FrameType | None) -> bool:
    """Tell whether a frame, or one that it was called from, is of ``read``."""
    while frame is not None:
        if frame.f_code is read.__code__:
            return True
        frame = frame.f_back
    return False


def writing(locks: Sequence[TableLock]) -> AbstractContextManager[None]:
    """Return a context in which no other thread reads or changes what the locks protect."""
    return locks[0] if len(locks) == 1 else _AllOf(locks)


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
        with self.lock:
            return method(self, *args, **kwargs)

    return locked  # type: ignore[return-value]


def _restart_all() -> None:
    for lock in list(_live):
        lock._start()


os.register_at_fork(after_in_child=_restart_all)  # the threads that held them are not there


__all__ = ["TableLock", "distinct_locks", "read", "reads", "writes", "writing"]
