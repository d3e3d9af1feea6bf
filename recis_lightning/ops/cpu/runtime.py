"""Run a CPU kernel on torch's own threads.

A kernel is a ``numba.cfunc`` over the address of an int64 argument vector. Slot 0 is a ticket
counter, slot 1 the number of chunks: every thread takes tickets until none is left, so work is
split by size and not by table, and the result cannot depend on how many threads came. The kernel's
own arguments, addresses and numbers, follow. The threads
are those of torch's OpenMP runtime (``GOMP_parallel``): no second pool competes with torch's.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import types
from numba.core.ccallback import CFunc

_forked = False


def _mark_forked() -> None:
    # OpenMP's threads do not survive fork(), and waiting for them would hang the child.
    global _forked
    _forked = True
    _thread_pool.cache_clear()


os.register_at_fork(after_in_child=_mark_forked)


def kernel(function: Callable[[int], None]) -> Kernel:
    """Compile ``function(args_address)`` at its first launch; later processes load it from disk."""
    return Kernel(function)


class Kernel:
    """One compiled chunk kernel; ``launch`` runs it over all chunks."""

    def __init__(self, function: Callable[[int], None]) -> None:
        self.function = function
        self._lock = threading.Lock()
        self._address = 0

    @property
    def address(self) -> int:
        """Return the machine code's address, compiling it if need be."""
        if not self._address:
            with self._lock:
                if not self._address:
                    self._compiled = _compile(self.function)
                    self._call = _SIGNATURE(self._compiled.address)
                    self._address = self._compiled.address
        return self._address

    def launch(self, num_chunks: int, *args: int) -> ctypes.Array[ctypes.c_int64]:
        """Run chunks ``0 ... num_chunks - 1``.

        Returns:
            The argument vector after the run; ``args[i]`` stands at ``i + 2``.
        """
        vector = (ctypes.c_int64 * (len(args) + 2))(0, num_chunks, *args)
        address = self._address or self.address
        num_threads = min(num_chunks, torch.get_num_threads())
        if num_threads <= 1:
            if num_threads == 1:
                self._call(ctypes.addressof(vector))
            return vector
        openmp = None if _forked else _gomp_parallel()
        if openmp is not None:
            openmp(address, ctypes.addressof(vector), num_threads, 0)
            return vector
        pointer = ctypes.addressof(vector)
        waiting = [_thread_pool().submit(self._call, pointer) for _ in range(num_threads - 1)]
        self._call(pointer)
        for future in waiting:
            future.result()
        return vector


def _compile(function: Callable[[int], None]) -> Any:
    """Do what ``numba.cfunc(..., cache=True)`` does, with a cache that sees all kernel files.

    Numba recompiles when the file that defines a function changes; a change in another one, of an
    intrinsic or of a field of the header, would leave machine code in use that no longer fits.
    """
    compiled: Any = CFunc(function, ((types.int64,), types.void), locals={}, options={})
    compiled.enable_caching()
    cache_file = compiled._cache._cache_file
    cache_file._source_stamp = (cache_file._source_stamp, _sources_digest())
    compiled.compile()
    return compiled


@functools.cache
def _sources_digest() -> str:
    digest = hashlib.blake2b(digest_size=16)
    # The fields that kernels read are those of the contracts in the folder above.
    folder = Path(__file__).parent
    for path in sorted([*folder.glob("*.py"), *folder.parent.glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_SIGNATURE = ctypes.CFUNCTYPE(None, ctypes.c_int64)


@functools.cache
def _gomp_parallel() -> Callable[[int, int, int, int], None] | None:
    """Find the OpenMP entry point that torch has loaded, if it has a GNU-compatible one."""
    try:
        entry = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    entry.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint, ctypes.c_uint]
    entry.restype = None
    found: Callable[[int, int, int, int], None] = entry
    return found


@functools.cache
def _thread_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="recis_lightning")


def address_of(array: npt.NDArray[Any]) -> int:
    """Return where an array's data lies (several times as fast as ``array.ctypes.data``)."""
    address: int = array.__array_interface__["data"][0]
    return address


def as_array(address: int, count: int) -> npt.NDArray[np.int64]:
    """View int64 at an address; whoever owns the memory keeps it alive."""
    buffer = (ctypes.c_int64 * int(count)).from_address(int(address))
    return np.ctypeslib.as_array(buffer)


def num_chunks(num_items: int, items_per_chunk: int) -> int:
    """Return how many chunks of ``items_per_chunk`` cover ``num_items``."""
    return -(-num_items // items_per_chunk)


class Workspace(threading.local):
    """Scratch arrays kept between steps, so that a steady step allocates (and faults) nothing."""

    def __init__(self) -> None:
        self._arrays: dict[str, npt.NDArray[np.generic]] = {}

    def take(self, name: str, size: int, dtype: type[np.generic]) -> npt.NDArray[np.generic]:
        """Return an uninitialised array of at least ``size`` items; the same one until it grows."""
        array = self._arrays.get(name)
        if array is None or array.size < size:
            array = np.empty(max(size + size // 4, 1024), dtype)
            self._arrays[name] = array
        return array


workspace = Workspace()
