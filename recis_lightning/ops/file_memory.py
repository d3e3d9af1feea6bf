"""Memory of rows in a file that is mapped: the kernel keeps in memory what is used of it.

The file has no name once it is open, so that nobody else can use it, and the system frees its space
when its process ends, however it ends. Its space is reserved before it is used: a full disk is an
error of the allocation, never of an access.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import threading
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from recis_lightning import system_calls

_WRITTEN_AT_ONCE = 1 << 24  # bytes
_READ_WRITE = 3
_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED = 0x10  # on Linux and macOS


class _Range:
    """Owner of a mapped range of a file, which an array over it keeps alive."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": (num_bytes,),
            "typestr": "|u1",
            "version": 3,
        }


class _File:
    """An open file without a name, and the ranges of it that are mapped.

    Args:
        folder: Where it is made.
    """

    def __init__(self, folder: str) -> None:
        self.process = os.getpid()
        self.descriptor, name = tempfile.mkstemp(prefix=".recis_lightning_rows_", dir=folder)
        os.unlink(name)
        self.folder, self.size = folder, 0
        self.mapped: dict[int, tuple[int, int]] = {}  # offset -> address and size
        self.free: list[tuple[int, int]] = []  # offset and size
        _mappings.files.add(self)
        weakref.finalize(self, os.close, self.descriptor).atexit = False

    def map(self, size: int) -> tuple[int, int]:
        """Reserve and map ``size`` bytes; return their address and their offset in the file."""
        offset = self._take(size)
        address = _libc().mmap(None, size, _READ_WRITE, mmap.MAP_SHARED, self.descriptor, offset)
        if address == _FAILED:
            self._free(offset, size)
            raise MemoryError(f"{size} bytes of a file")
        self.mapped[offset] = (address, size)
        # A lookup wants one row of a place: what is read around it would be in the way.
        _libc().madvise(address, size, mmap.MADV_RANDOM)
        return int(address), offset

    def _take(self, size: int) -> int:
        """Reserve ``size`` bytes of the file; return their offset."""
        for number, (offset, room) in enumerate(self.free):
            if room >= size:
                self._reserve(offset, size)
                rest = [(offset + size, room - size)] if room > size else []
                self.free[number : number + 1] = rest
                return offset
        self._reserve(self.size, size)
        self.size += size
        return self.size - size

    def _reserve(self, offset: int, size: int) -> None:
        try:
            system_calls.reserve_range(self.descriptor, offset, size)
        except OSError as error:
            system_calls.free_range(self.descriptor, offset, size)
            raise OSError(
                error.errno, f"{error.strerror}, for {size} bytes of rows in a file", self.folder
            ) from error

    def unmap(self, offset: int) -> None:
        """Unmap a range, and give its space back to the disk."""
        address, size = self.mapped.pop(offset)
        _mappings.forget(address, size)  # first: what is unmapped may be another's at once
        _libc().munmap(address, size)
        if os.getpid() == self.process:
            self._free(offset, size)

    def _free(self, offset: int, size: int) -> None:
        system_calls.free_range(self.descriptor, offset, size)
        self.free = _joined([*self.free, (offset, size)])

    def become_private(self) -> None:
        """Give a forked child a copy of its own, as far as its parent leaves the file as it is."""
        for offset, (address, size) in self.mapped.items():
            _mappings.foreign.append((address, address + size, self))
            flags = mmap.MAP_PRIVATE | _MAP_FIXED
            _libc().mmap(address, size, _READ_WRITE, flags, self.descriptor, offset)

    def refuse(self) -> NoReturn:
        """Raise, in a forked child."""
        raise RuntimeError(
            f"rows in a mapped file in {self.folder!r} belong to process {self.process}, of which "
            f"this is a forked child; start processes by 'spawn', or make the table in each"
        )


class FileMemory:
    """Memory in a file of its own, which is made when it is first asked for.

    Args:
        folder: Folder of the file, on the disk that is to hold it.

    Attributes:
        folder: As given.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._file: _File | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are mapped."""
        file = self._file
        return 0 if file is None else sum(size for _, size in list(file.mapped.values()))

    def empty(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Allocate bytes that start on a page, zeros if they are new.

        Args:
            num_bytes: Size, above 0; unmapped, and its space freed, with the last array over it.

        Returns:
            uint8 [num_bytes].

        Raises:
            OSError: The folder cannot be written to, or its disk is full.
            MemoryError: The process has no room for one mapping more.
            RuntimeError: In a forked child of the file's process.
        """
        if self._file is not None and self._file.process != os.getpid():
            self._file.refuse()
        size = num_bytes + -num_bytes % mmap.ALLOCATIONGRANULARITY
        file, address, offset = _mappings.map(self, size)
        memory = _Range(address, num_bytes)
        weakref.finalize(memory, _mappings.release, file, offset).atexit = False
        return np.asarray(memory)

    def open(self) -> _File:
        """Return the file."""
        if self._file is None:
            self._file = _File(self.folder)
        return self._file


class _Mappings:
    """Ranges of all files; finalizers of arrays hand them back, whenever these may run.

    The lock is the same thread's again: a finalizer may run in the middle of any method.
    """

    def __init__(self) -> None:
        self.foreign: list[tuple[int, int, _File]] = []  # start, end and file of a parent's ranges
        self.files: weakref.WeakSet[_File] = weakref.WeakSet()
        self.lock = threading.RLock()
        self._returned: deque[tuple[_File, int]] = deque()
        self._is_busy = False  # in the thread that has the lock

    def map(self, memory: FileMemory, size: int) -> tuple[_File, int, int]:
        """Return a file, and the address and the offset of a range of it."""
        with self.lock:
            was_busy, self._is_busy = self._is_busy, True
            try:
                file = memory.open()
                found = (file, *file.map(size))
            finally:
                self._is_busy = was_busy
        self._unmap_returned()
        return found

    def forget(self, address: int, size: int) -> None:
        """Take a parent's range that goes out of ``foreign``, in one step: no reader locks it."""
        ours = (address, address + size)
        if self.foreign:
            self.foreign = [found for found in self.foreign if found[:2] != ours]

    def release(self, file: _File, offset: int) -> None:
        """Unmap a range; a finalizer."""
        self._returned.append((file, offset))
        self._unmap_returned()

    def _unmap_returned(self) -> None:
        # A thread that is busy, this one or another, will look again.
        while self._returned and not self._is_busy:
            with self.lock:
                if self._is_busy:
                    return
                self._is_busy = True
                try:
                    while self._returned:
                        file, offset = self._returned.popleft()
                        file.unmap(offset)
                finally:
                    self._is_busy = False


_mappings = _Mappings()


class _WriteBack:
    """Writing of changed pages in the background, before the kernel is short of memory.

    A control group of version 1 knows no limit of changed pages: where nothing else is left to
    take, its processes are killed. So whoever changes more waits until what was changed before is
    written.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = 0
        self._running: Future[None] | None = None
        self._threads: ThreadPoolExecutor | None = None

    def note(self, num_bytes: int) -> None:
        """Note that so many bytes will be changed; write what was before, if it is much."""
        with self._lock:
            if self._changed >= _WRITTEN_AT_ONCE:
                if self._running is not None:
                    self._running.result()
                if self._threads is None:
                    self._threads = ThreadPoolExecutor(1, "recis_lightning_write")
                self._running, self._changed = self._threads.submit(self._write), 0
            self._changed += num_bytes

    @staticmethod
    def _write() -> None:
        for file in list(_mappings.files):
            if file.process == os.getpid():
                system_calls.write_back(file.descriptor)


_write_back = _WriteBack()


def note_changes(num_bytes: int) -> None:
    """Note that pages of so many bytes are about to be changed, so that they get written."""
    _write_back.note(num_bytes)


def check_process(address: int) -> None:
    """Raise if what lies at an address is in a file of this process's parent.

    Raises:
        RuntimeError: It is.
    """
    for start, end, file in _mappings.foreign:
        if start <= address < end:
            file.refuse()


def advise_needed(address: int, num_bytes: int) -> None:
    """Let the kernel read pages of a mapped file, all at once and in the background.

    Args:
        address: Where they start, on a page.
        num_bytes: Their size.
    """
    _libc().madvise(address, num_bytes, mmap.MADV_WILLNEED)


def _joined(free: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return free ranges by offset, those that touch as one.

    Example:
        >>> _joined([(8, 4), (0, 4), (4, 4), (16, 4)])
        [(0, 12), (16, 4)]
    """
    joined: list[tuple[int, int]] = []
    for offset, size in sorted(free):
        if joined and sum(joined[-1]) == offset:
            joined[-1] = (joined[-1][0], joined[-1][1] + size)
        else:
            joined.append((offset, size))
    return joined


def _libc() -> Any:
    """Return the C library with the calls' types."""
    global _loaded
    if _loaded is None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        _loaded = libc
    return _loaded


_loaded: Any = None


def _leave_to_parent() -> None:
    for file in list(_mappings.files):
        file.become_private()
    _write_back.__init__()  # type: ignore[misc]  # its thread is the parent's
    _mappings.lock.release()


# A child must not start from the middle of another thread's change, nor write to the file.
system_calls.call_at_fork(
    before=_mappings.lock.acquire,
    after_in_parent=_mappings.lock.release,
    after_in_child=_leave_to_parent,
)


def is_supported() -> bool:
    """Return whether the system can map files as this needs it; Windows cannot."""
    return hasattr(mmap, "MADV_RANDOM") and hasattr(mmap, "MAP_SHARED") and os.name == "posix"


__all__ = ["FileMemory", "advise_needed", "check_process", "is_supported", "note_changes"]
