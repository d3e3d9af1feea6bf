"""Memory of tables between guard pages, to find reads and writes beyond it.

Each range is a mapping of its own, which ends where the range does, up to a cache line, and is
unmapped when it is freed. What is just beyond it, or was freed, ends the process with SIGSEGV at
the faulty access; and fresh memory is filled, so that whoever reads before writing gets odd values.
``ops.host_memory`` takes it if ``RECIS_LIGHTNING_GUARD=1`` is in the environment.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref

import numpy as np
import numpy.typing as npt

FILL = 0xA5
_LINE = 64
_READ_WRITE, _PRIVATE_ANONYMOUS, _FAILED = 3, 0x22, ctypes.c_void_p(-1).value


class _Guarded:
    """Owner of a mapping, which an array over it keeps alive."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": (num_bytes,),
            "typestr": "|u1",
            "version": 3,
        }


def empty(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Allocate bytes that start on a cache line, between pages that nobody may touch.

    Args:
        num_bytes: Size; unmapped with the last array that shares the memory.

    Returns:
        uint8 [num_bytes], each ``FILL``.

    Raises:
        MemoryError: There is no room.
    """
    page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    inner = num_bytes + -num_bytes % page
    start = libc.mmap(None, inner + 2 * page, 0, _PRIVATE_ANONYMOUS, -1, 0)
    if start == _FAILED or libc.mprotect(start + page, inner, _READ_WRITE):
        raise MemoryError(f"{num_bytes} bytes between guard pages")
    address = start + page + inner - (num_bytes + -num_bytes % _LINE)
    memory = _Guarded(address, num_bytes)
    weakref.finalize(memory, libc.munmap, start, inner + 2 * page).atexit = False
    array = np.asarray(memory)
    array.fill(FILL)
    return array


__all__ = ["FILL", "empty"]
