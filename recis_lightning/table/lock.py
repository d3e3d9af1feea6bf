"""Lock of tables: any number of threads read, or one changes what is stored."""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from queue import Empty, SimpleQueue
from threading import get_ident
from types import FrameType
from typing import Any, TypeVar

from recis_lightning.arguments import is_fake_mode, refuse_fake_mode
from recis_lightning.system_calls import call_at_fork
from recis_lightning.table.stream_order import StreamOrder

_numbers = itertools.count()
_live: weakref.WeakSet[TableLock] = weakref.WeakSet()
_Method = TypeVar("_Method", bound=Callable[..., Any])
_Result = TypeVar("_Result")
_PATIENCE = 0.05  # seconds after which a writer asks whether those it waits for still read
_Turn: Any = type(threading.RLock())


class TableLock:
    """Lock of the tables of one module, for ``read`` and ``write``.

    Kernels run without the interpreter's lock, and what they are given are addresses: memory that
    they read must neither be replaced nor be written meanwhile. Readers only note themselves, so
    that any number of them run at once at hardly any cost; a writer waits for those there are, and
    later ones wait for it. A thread that writes may read, and write again, but one that reads must
    not write.

    Wherever an exception comes between, as of Ctrl-C, other threads go on: nobody is noted for good
    who does not read or write.

    Attributes:
        number: Order in which several locks are taken.
        turn: Taken by the thread that writes.
        writer: That thread; one that does not write any more if an interrupt came between.
        streams: Order of the uses of the tables on a GPU, whose kernels run later than the host.

    Example:
        >>> lock = TableLock()
        >>> write([lock], read, [lock], len, "ab")
        2
    """

    def __init__(self) -> None:
        self.number = next(_numbers)
        self.streams = StreamOrder()
        self._start()
        _live.add(self)

    def _start(self) -> None:
        self.turn = _Turn()
        self.writer: int | None = None
        self._readers: dict[int, int] = {}  # reads within reads, by thread
        # One item for each reader that has left: unlike an Event, no interrupt can break it.
        self._left: SimpleQueue[None] = SimpleQueue()

    def begin_read(self) -> bool:
        """Let no other thread begin to write; return False, and note nothing, where one writes."""
        thread = get_ident()
        depth = self._readers.get(thread, 0)
        self._readers[thread] = depth + 1  # first, so that a writer who comes now sees it
        if self.writer is None or self.writer == thread:
            return True
        if depth and self._is_read_in(sys._getframe(2)):
            return True  # the writer waits for the read that this one is a part of
        self._readers.pop(thread, None)
        self._left.put(None)
        return False

    def end_read(self) -> None:
        """Let writers begin; does nothing in a thread that does not read."""
        thread = get_ident()
        depth = self._readers.get(thread, 0)
        if depth > 1:
            self._readers[thread] = depth - 1
            return
        self._readers.pop(thread, None)
        if self.writer is not None:
            self._left.put(None)

    def begin_write(self) -> None:
        """Wait until no other thread reads, and let none begin; ``write`` calls it in its turn."""
        self._left = SimpleQueue()
        thread = self.writer = get_ident()
        while self._readers and any(reader != thread for reader in list(self._readers)):
            try:
                self._left.get(timeout=_PATIENCE)
            except Empty:
                self._forget_the_gone()

    def _forget_the_gone(self) -> None:
        """Forget readers that no longer read: their threads ended, or an interrupt came between."""
        for thread in list(self._readers):
            if not self._is_read_in(sys._current_frames().get(thread)):
                self._readers.pop(thread, None)

    def _is_read_in(self, frame: FrameType | None) -> bool:
        """Tell whether a frame, or one that it was called from, is of a ``read`` of this lock."""
        while frame is not None:
            if frame.f_code is read.__code__ and self in frame.f_locals["locks"]:
                return True
            frame = frame.f_back
        return False


def distinct_locks(locks: Iterable[TableLock]) -> tuple[TableLock, ...]:
    """Return each lock once, in the order in which they are taken."""
    return tuple(sorted(set(locks), key=lambda lock: lock.number))


def read(locks: Sequence[TableLock], work: Callable[..., _Result], *args: Any) -> _Result:
    """Call a function while no other thread changes what the locks protect.

    Args:
        locks: From ``distinct_locks``.
        work: The function.
        args: What it is called with.
    """
    begun: list[TableLock] = []
    try:
        for lock in locks:
            if not lock.begin_read():
                # A thread that writes, or will, may wait for those that were begun.
                while begun:
                    begun.pop().end_read()
                _in_turn(locks, _begin_reads, locks, begun)
                break
            begun.append(lock)
        for lock in locks:
            if lock.streams.is_used:
                lock.streams.enter(writes=False)
        return work(*args)
    finally:
        for lock in begun:
            lock.end_read()


def _begin_reads(locks: Sequence[TableLock], begun: list[TableLock]) -> None:
    """Begin to read, in the turn of this thread."""
    thread = get_ident()
    for lock in locks:
        if lock.writer != thread:
            lock.writer = None  # an interrupt came between
        lock.begin_read()
        begun.append(lock)


def write(locks: Sequence[TableLock], work: Callable[..., _Result], *args: Any) -> _Result:
    """Call a function while no other thread reads or changes what the locks protect.

    Args:
        locks: From ``distinct_locks``.
        work: The function.
        args: What it is called with.
    """
    if len(locks) != 1:
        result: _Result = _in_turn(locks, _write, locks, work, *args)
        return result
    lock = locks[0]  # as of one module: with the fewest instructions
    with lock.turn:
        before = lock.writer
        try:
            lock.begin_write()
            if lock.streams.is_used:
                lock.streams.enter(writes=True)
            return work(*args)
        finally:
            lock.writer = before


def _write(locks: Sequence[TableLock], work: Callable[..., _Result], *args: Any) -> _Result:
    writers = list[int | None]()
    try:
        for lock in locks:
            writers.append(lock.writer)
            lock.begin_write()
        for lock in locks:
            if lock.streams.is_used:
                lock.streams.enter(writes=True)
        return work(*args)
    finally:
        for lock, before in zip(locks, writers, strict=False):
            lock.writer = before


def _in_turn(locks: Sequence[TableLock], work: Callable[..., _Result], *args: Any) -> _Result:
    """Call a function while no other thread has the turn of any of the locks."""
    taken = list[Any]()
    # The interpreter looks at signals only after a call: none comes between a turn that is taken
    # and its place in the list, nor between two that are given back.
    give_back = map(_Turn.release, taken)
    try:
        taken.extend(filter(_Turn.acquire, [lock.turn for lock in locks]))
        return work(*args)
    finally:
        any(give_back)  # all of them


def reads(method: _Method) -> _Method:
    """Have a table's method run while no other thread changes the table."""

    @wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_fake_mode():
            refuse_fake_mode(f"table {self.name!r}")
        return read((self.lock,), partial(method, self, *args, **kwargs))

    return locked  # type: ignore[return-value]


def writes(method: _Method) -> _Method:
    """Have a table's method run while no other thread reads or changes the table."""

    @wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_fake_mode():
            refuse_fake_mode(f"table {self.name!r}")
        return write((self.lock,), partial(method, self, *args, **kwargs))

    return locked  # type: ignore[return-value]


def _restart_all() -> None:
    for lock in list(_live):
        lock._start()


call_at_fork(after_in_child=_restart_all)  # the threads that held them are not there


__all__ = ["TableLock", "distinct_locks", "read", "reads", "write", "writes"]
