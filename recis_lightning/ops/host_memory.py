"""Memory of tables on the CPU, in huge pages.

Lookups jump about in rows and indices, so that with pages of 4 KiB nearly each of them misses the
processor's table of pages too. An allocator hands out ranges of large anonymous mappings for which
the kernel was asked for huge pages; so many small tables share them, and a table that grows bit by
bit gets them as well as one that is made large. Freed ranges go back to the system.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
import weakref
from bisect import bisect_left, insort
from collections import deque

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning import system_calls
from recis_lightning.ops import guarded_memory

HUGE_PAGE = 1 << 21
# For debugging: unmapped pages around every range, at which reads and writes beyond it end.
IS_GUARDED = system_calls.IS_LINUX and os.environ.get("RECIS_LIGHTNING_GUARD", "0") not in ("", "0")
_LINE = 64
_SMALL = 1 << 15  # less than this is malloc's: it would only split up huge pages
_REGION = 1 << 25  # regions grow with what there is, up to this, so that few tables cost little

# Only Linux has both; elsewhere NumPy allocates.
_HAS_HUGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE") and hasattr(mmap, "MAP_PRIVATE")


class _Region:
    """One mapping, and its free ranges: [start, end) by start, none of them adjacent."""

    def __init__(self, size: int) -> None:
        try:
            self.mapping = mmap.mmap(
                -1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
        except (OSError, ValueError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno != errno.ENOMEM:
                raise
            raise MemoryError(f"{size} bytes") from error
        with contextlib.suppress(OSError):  # a kernel may be built without huge pages
            self.mapping.madvise(mmap.MADV_HUGEPAGE)
        window = ctypes.c_char.from_buffer(self.mapping)
        address = ctypes.addressof(window)
        del window  # a mapping that something looks into cannot be closed
        self._skip = -address % HUGE_PAGE
        self.start, self.size = address + self._skip, size
        self.free = [(0, size)]

    def take(self, size: int) -> int | None:
        """Return where ``size`` bytes are that were free, the lowest; None if there are none."""
        for number, (start, end) in enumerate(self.free):
            if end - start >= size:
                if end - start > size:
                    self.free[number] = (start + size, end)
                else:
                    del self.free[number]
                return start
        return None

    def give_back(self, start: int, end: int) -> bool:
        """Free a range, and its pages; return whether the whole region is free now."""
        number = bisect_left(self.free, (start, end))
        before = self.free[number - 1] if number else (0, -1)
        after = self.free[number] if number < len(self.free) else (-1, 0)
        # Pages that this range shares with free neighbours are free now too.
        low = max(before[0], start - start % HUGE_PAGE) if before[1] == start else start
        high = min(after[1], end + -end % HUGE_PAGE) if after[0] == end else end
        first = last = number
        if before[1] == start:
            start, first = before[0], number - 1
        if after[0] == end:
            end, last = after[1], number + 1
        self.free[first:last] = [(start, end)]  # in one step: whatever interrupts loses no range
        if end - start == self.size:
            return True
        low, high = low + -low % HUGE_PAGE, high - high % HUGE_PAGE
        if low < high:
            self.mapping.madvise(mmap.MADV_DONTNEED, self._skip + low, high - low)
        return False


class _Allocator:
    """Regions, by address; finalizers of arrays hand ranges back, whenever these may run.

    Its lock is taken by ``with`` alone, which no signal can split, and is the same thread's again:
    a finalizer may run, and an exception arise, in the middle of any method.
    """

    def __init__(self) -> None:
        self._regions: list[_Region] = []
        self._returned: deque[tuple[int, int]] = deque()
        self.lock = threading.RLock()
        self._is_busy = False  # in the thread that has the lock
        self._mapped = 0

    def allocate(self, size: int) -> int:
        """Return the address of ``size`` bytes, a multiple of a cache line."""
        with self.lock:
            if self._is_busy:
                return self._take_new(size)
            try:
                self._is_busy = True
                self._give_back()
                address = self._take(size)
            finally:
                self._is_busy = False
        self._take_back()
        return address

    def _take(self, size: int) -> int:
        for region in self._regions:
            start = region.take(size)
            if start is not None:
                return region.start + start
        return self._take_new(size)

    def _take_new(self, size: int) -> int:
        """Take a range of a new region."""
        wanted = max(size, min(self._mapped, _REGION))
        region = _Region(wanted + -wanted % HUGE_PAGE)
        start = region.take(size)
        assert start is not None
        self._mapped += region.size
        insort(self._regions, region, key=lambda one: one.start)
        return region.start + start

    def free(self, address: int, size: int) -> None:
        """Note that a range is free; a finalizer, which may interrupt any of the methods."""
        self._returned.append((address, size))
        self._take_back()

    def _take_back(self) -> None:
        # A thread that is busy, this one or another, will look again. A finalizer does not wait for
        # it: who knows what locks are held where it came up.
        while self._returned and not self._is_busy:
            with self.lock:
                if not self._is_busy:
                    try:
                        self._is_busy = True
                        self._give_back()
                    finally:
                        self._is_busy = False

    def _give_back(self) -> None:
        while self._returned:
            address, size = self._returned.popleft()
            number = bisect_left(self._regions, address + 1, key=lambda one: one.start) - 1
            region = self._regions[number]
            first = address - region.start
            if region.give_back(first, first + size):
                del self._regions[number]  # first: nobody may find a region that is closed
                self._mapped -= region.size
                region.mapping.close()


class _Range:
    """Owner of a range, which an array over it keeps alive."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": (num_bytes,),
            "typestr": "|u1",
            "version": 3,
        }


_allocator = _Allocator()
# A child must not start from the middle of another thread's change.
system_calls.call_at_fork(
    before=_allocator.lock.acquire,
    after_in_parent=_allocator.lock.release,
    after_in_child=_allocator.lock.release,
)


def empty(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Allocate uninitialised bytes that start on a cache line.

    Args:
        num_bytes: Size; freed with the last array that shares the memory.

    Returns:
        uint8 [num_bytes].

    Raises:
        MemoryError: There is no room.
    """
    if IS_GUARDED:
        return guarded_memory.empty(num_bytes)
    if num_bytes < _SMALL or not _HAS_HUGE_PAGES:
        buffer = np.empty(num_bytes + _LINE, np.uint8)
        skip = -buffer.ctypes.data % _LINE
        return buffer[skip : skip + num_bytes]
    size = num_bytes + -num_bytes % _LINE
    address = _allocator.allocate(size)
    memory = _Range(address, num_bytes)
    weakref.finalize(memory, _allocator.free, address, size).atexit = False
    return np.asarray(memory)


def empty_int64(count: int) -> Tensor:
    """Allocate an uninitialised int64 [count]; see ``empty``."""
    return torch.from_numpy(empty(8 * count).view(np.int64))


__all__ = ["HUGE_PAGE", "IS_GUARDED", "empty", "empty_int64"]
