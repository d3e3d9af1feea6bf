"""Rows of a table in a mapped file: the setting ``rows="file:..."``, and what stays in memory.

The first rows stay in memory. They are those of the ids that occurred first, and so of the most
frequent ones: of Zipf traffic over 4 million ids, the first tenth of the rows serves all but 2,450
of the 11,270 distinct rows of a batch of 65,536 ids, and the best tenth all but 1,710.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from recis_lightning.ops import file_memory
from recis_lightning.ops.file_memory import FileMemory
from recis_lightning.ops.free_memory import memory_left

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_FORM = "'file:/folder' or 'file:/folder?memory=8GiB'"


class _Place(NamedTuple):
    """Parts of the setting.

    Attributes:
        folder: Folder of the file.
        memory_bytes: Bytes of rows that stay in memory; None: as many as leave half of it free.
    """

    folder: str
    memory_bytes: int | None


def check_rows(rows: str | None) -> str | None:
    """Return a valid ``rows`` setting of a table, else raise.

    Args:
        rows: None, or "file:" and a folder, or a name that is free in one; "?memory=" and a size
            may follow.

    Raises:
        TypeError: It is no str.
        ValueError: It has another form, or names no folder that can be written to.

    Example:
        >>> check_rows("ram")
        Traceback (most recent call last):
        ValueError: rows: expected None, 'file:/folder' or 'file:/folder?memory=8GiB', got 'ram'
    """
    if rows is None:
        return None
    if not isinstance(rows, str):
        raise TypeError(f"rows: expected None, {_FORM}, got {rows!r}")
    if not file_memory.is_supported():
        raise ValueError(f"rows: expected None, got {rows!r}; this system cannot map such files")
    folder = _read(rows).folder
    if not Path(folder).is_dir():
        found = "is a file" if Path(folder).exists() else "does not exist"
        raise ValueError(
            f"rows: expected a folder, or a free name in one, got {rows!r}: {folder!r} {found}"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"rows: expected a folder that can be written to, got {rows!r}")
    return rows


def _read(rows: str) -> _Place:
    """Take the setting apart."""
    text, _, query = rows.partition("?memory=")
    path = text.removeprefix("file:")
    if path.startswith("//"):
        path = path.removeprefix("//").removeprefix("localhost")
        if not path.startswith("/"):
            raise ValueError(f"rows: expected a path of this machine, got {rows!r}")
    if path == text or not path:
        raise ValueError(f"rows: expected None, {_FORM}, got {rows!r}")
    folder = Path(path).expanduser().absolute()
    if not folder.exists() and folder.parent.is_dir():
        folder = folder.parent
    return _Place(str(folder), _read_size(rows, query) if query or "?memory=" in rows else None)


def _read_size(rows: str, size: str) -> int:
    matched = _SIZE.fullmatch(size.strip())
    unit = None if matched is None else _UNITS.get(matched[2].upper())
    if matched is None or unit is None:
        raise ValueError(f"rows: expected a size as in memory=8GiB, got {rows!r}")
    return int(float(matched[1]) * unit)


class RowFile:
    """File of one table's rows, which has no name, and how much of the rows stays in memory.

    Args:
        rows: A setting that ``check_rows`` has passed.

    Attributes:
        folder: Folder of the file.
    """

    def __init__(self, rows: str) -> None:
        self.folder, self._memory_bytes = _read(rows)
        self._memory = FileMemory(self.folder)

    def room_in_memory(self, used: int, wanted: int) -> int:
        """Return how many bytes more of rows are to lie in memory.

        Args:
            used: Bytes of rows that lie there.
            wanted: Bytes that are needed.
        """
        if self._memory_bytes is not None:
            return max(self._memory_bytes - used, 0)
        return min(wanted, memory_left())

    def empty(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Allocate in the file, as ``FileMemory.empty``."""
        return self._memory.empty(num_bytes)


__all__ = ["RowFile", "check_rows"]
