"""Rows of a table in a mapped file: the setting ``rows="file:..."``, and what stays in memory.

The first rows stay in memory. They are those of the ids that occurred first, and so of the most
frequent ones: of Zipf traffic over 4 million ids, the first tenth of the rows serves all but 2,450
of the 11,270 distinct rows of a batch of 65,536 ids, and the best tenth all but 1,710.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from recis_lightning.ops import file_memory
from recis_lightning.ops.file_memory import FileMemory
from recis_lightning.ops.free_memory import memory_left

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)")
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
    """Return a valid ``rows`` setting of a table, with a path that is absolute, else raise.

    Args:
        rows: None, or "file:" and a folder that is there; "?memory=" and a size may follow.

    Raises:
        TypeError: It is no str.
        ValueError: It has another form, or names no folder that can be written to.
        FileNotFoundError: The folder is not there.

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
    if not os.path.isdir(folder):
        if os.path.lexists(folder):
            raise ValueError(f"rows: expected a folder, got {rows!r}: {folder!r} is none")
        raise FileNotFoundError(
            errno.ENOENT,
            f"rows: expected a folder that is there, got {rows!r}; make it first, or mount its "
            f"disk (mkdir -p {shlex.quote(folder)})",
            folder,
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"rows: expected a folder that can be written to, got {rows!r}")
    _, mark, option = rows.partition("?")
    return f"file:{folder}{mark}{option}"


def _read(rows: str) -> _Place:
    """Take the setting apart."""
    text, mark, option = rows.partition("?")
    path = text.removeprefix("file:")
    if path.startswith("//"):
        path = path.removeprefix("//").removeprefix("localhost")
        if not path.startswith("/"):
            raise ValueError(f"rows: expected a path of this machine, got {rows!r}")
    if path == text or not path.strip() or "\0" in path:
        raise ValueError(f"rows: expected None, {_FORM}, got {rows!r}")
    folder = os.path.expanduser(path)
    if folder.startswith("~"):
        raise ValueError(f"rows: expected a folder, got {rows!r}: nobody's home is {path!r}")
    folder = "/" + str(Path(folder).absolute()).lstrip("/")  # ".." may lead through a link
    if "?" in folder:
        raise ValueError(f"rows: expected a folder without '?' in its path, got {rows!r}: {folder}")
    return _Place(folder, _read_size(rows, option) if mark else None)


def _read_size(rows: str, option: str) -> int:
    """Take the option apart."""
    name, mark, size = option.partition("=")
    if name != "memory" or not mark or set("?&;") & set(size):
        raise ValueError(
            f"rows: expected {_FORM}, got {rows!r}: what follows '?' is one option, 'memory=' and "
            f"a size, not {option!r}"
        )
    matched = _SIZE.fullmatch(size.strip())
    unit = None if matched is None else _UNITS.get(matched[2].upper())
    if matched is None or unit is None:
        raise ValueError(
            f"rows: expected a size as in memory=8GiB, 0 or more, got {rows!r}; units: B, KiB, "
            f"MiB, GiB, TiB, KB, MB, GB, TB"
        )
    return int(Fraction(matched[1]) * unit)


class RowFile:
    """File of one table's rows, which has no name, and how much of the rows stays in memory.

    Args:
        rows: The setting.

    Attributes:
        folder: Folder of the file.

    Raises:
        ValueError: As ``check_rows``, which may have passed it on another machine.
        FileNotFoundError: The same.
    """

    def __init__(self, rows: str) -> None:
        check_rows(rows)
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
