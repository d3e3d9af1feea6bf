"""Memory that a table finds, or does not find, and gives back to the system."""

from __future__ import annotations

import ctypes
import os
from typing import Protocol

__all__ = ["Allocation", "return_to_system"]


class _Memory(Protocol):
    name: str

    @property
    def nbytes(self) -> int: ...

    def __len__(self) -> int: ...


class Allocation:
    """Turns a failed allocation into an error that names the table.

    Args:
        memory: The table's.
        wanted: For what.
    """

    def __init__(self, memory: _Memory, wanted: str) -> None:
        self.memory, self.wanted = memory, wanted

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, MemoryError):
            raise MemoryError(
                f"table {self.memory.name!r}, with {len(self.memory)} rows in "
                f"{self.memory.nbytes} bytes, found no memory for {self.wanted}"
            ) from error
        if isinstance(error, OSError):
            raise OSError(
                error.errno,
                f"{error.strerror}: table {self.memory.name!r}, with {len(self.memory)} rows, "
                f"found no room in its file for {self.wanted}",
                error.filename,
            ) from error


_TRIMMED_BYTES = 1 << 20  # freed ones that are worth a look at the whole heap, 0.7 ms and more
_freed_bytes = 0  # since the last look


def return_to_system(nbytes: int) -> None:
    """Let the allocator return what it holds free, where there is a way to ask (glibc).

    Args:
        nbytes: That a table has freed; with those freed before they must be worth it.
    """
    global _freed_bytes
    _freed_bytes += nbytes
    if _freed_bytes < _TRIMMED_BYTES:
        return
    _freed_bytes = 0
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
