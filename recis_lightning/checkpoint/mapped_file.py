"""A memory-mapped file, read without copies and without SIGBUS."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recis_lightning import system_calls

_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14: map pages now, with an error if that fails


class MappedFile:
    """An open file, memory-mapped if the system reports the pages that it cannot read.

    Attributes:
        mapped: uint8 [size], the file; None where it is read instead.

    Args:
        file: Its descriptor.
        path: Its path, for errors.
        size: Its bytes.
    """

    def __init__(self, file: int, path: Path, size: int) -> None:
        self.file, self.path = file, path
        self.mapped: Tensor | None = None
        with contextlib.suppress(OSError, ValueError):  # a system or file system that cannot
            # Nobody writes to it, but torch warns of memory that is read-only.
            memory = mmap.mmap(file, size, access=mmap.ACCESS_COPY)
            mapped = torch.frombuffer(memory, dtype=torch.uint8)
            _populate(mapped.data_ptr(), mmap.PAGESIZE)
            self.mapped = mapped

    def bytes_at(self, offset: int, count: int) -> Tensor:
        """Return bytes of the file, uint8 [count]; ValueError if it cannot be read to its end."""
        if self.mapped is None or not count:
            data = torch.empty(count, dtype=torch.uint8, device="cpu")
            read_into(self.file, bytes_of(data), offset, self.path)
            return data
        try:  # a page that cannot be read would end the process when it is touched
            self._populate(offset, count)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read to its end ({error})") from None
        return self.mapped[offset : offset + count]

    def prefetch(self, offset: int, count: int) -> None:
        """Bring bytes into memory if they are mapped; errors wait until they are read."""
        if self.mapped is not None and count:
            with contextlib.suppress(OSError):
                self._populate(offset, count)

    def _populate(self, offset: int, count: int) -> None:
        assert self.mapped is not None
        extra = offset % mmap.PAGESIZE
        _populate(self.mapped.data_ptr() + offset - extra, extra + count)


def _populate(address: int, count: int) -> None:
    """Map pages now; OSError if one cannot be read, or if the system has no such call."""
    # ``mmap.madvise`` holds the GIL, and other threads would wait for the disk.
    madvise = getattr(_system(), "madvise", None)
    if madvise is None or madvise(address, count, _POPULATE_READ):
        number = ctypes.get_errno() or errno.ENOSYS
        raise OSError(number, os.strerror(number))


@functools.cache
def _system() -> Any:
    if not system_calls.IS_LINUX:  # elsewhere the number of the advice is another
        return None
    system = ctypes.CDLL(None, use_errno=True)
    system.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return system


def read_into(file: int, data: memoryview, offset: int, path: Path) -> None:
    """Fill ``data`` with bytes from ``offset`` on; ValueError if the file ends before."""
    while data:
        done = system_calls.read_at(file, data, offset)
        if not done:
            raise ValueError(f"{path}: ended while it was read")
        data, offset = data[done:], offset + done


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a view of a tensor's memory, or of a copy if it is not contiguous."""
    if not tensor.numel():
        return memoryview(b"")
    flat = tensor.contiguous().reshape(-1)
    # One element is contiguous whatever its stride, but only a stride of 1 is seen as bytes.
    data = flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy()
    return memoryview(data)  # type: ignore[arg-type]


__all__ = ["MappedFile", "bytes_of", "read_into"]
