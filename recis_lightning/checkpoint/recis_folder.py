"""Reader of the tables that RecIS saves, in safetensors files of its own layout.

A folder holds ``index``, ``tensorkey.json`` and files ``model-000000-of-000004.safetensors``. RecIS
names the ids of a table ``user.id/part_0_2`` and its rows ``user.embedding/part_0_2``, one pair for
each part of the id space; ``tensorkey.json`` has each such name with the dots that stand for "@".
Files of v1.0 name them ``user@id^...``, with the part behind "^".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.checkpoint.array_tables import ArrayTables, Piece
from recis_lightning.checkpoint.regular_file import check_regular

_INDEX, _KEYS, _FILES = "index", "tensorkey.json", "model-*.safetensors"
_VERSIONS = "checkpoint"  # file that lists the checkpoints beside it, the newest last
_MAX_HEADER_BYTES = 100_000_000  # as in safetensors
_DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


def is_recis_folder(folder: Path) -> bool:
    """Tell whether a folder holds a checkpoint that RecIS saved."""
    return (folder / _INDEX).is_file() and any(True for _ in folder.glob(_FILES))


def newest_recis_folder(folder: Path) -> Path | None:
    """Return the checkpoint that RecIS's list in a folder names last; None without a list."""
    versions = folder / _VERSIONS
    if not versions.is_file():
        return None
    lines = versions.read_text(encoding="utf-8", errors="replace").split("\n")
    names = [line.strip() for line in lines if line.strip()]
    found = folder / names[-1] if names else folder
    return found if names and found.parent == folder and is_recis_folder(found) else None


def read_recis_folder(folder: Path) -> ArrayTables:
    """Read the tables of a RecIS checkpoint: ids and rows, no optimizer state.

    Raises:
        ValueError: A file is missing, damaged, or of another layout.
    """
    keys = _names_of_parts(folder)
    ids: dict[tuple[str, str], Tensor] = {}
    rows: dict[tuple[str, str], Tensor] = {}
    for file in sorted(folder.glob(_FILES)):
        for key, read in _tensors(file):
            table, slot, part = _split(keys.get(key, key))
            if table and slot in ("id", "embedding"):
                (ids if slot == "id" else rows)[table, part] = read()
    if lone := sorted(ids.keys() ^ rows.keys()):
        raise ValueError(f"{folder}: expected ids and rows of each part, got one of {lone[:3]}")
    tables: dict[str, list[Piece]] = {}
    for table, part in ids:
        tables.setdefault(table, []).append((ids[table, part], rows[table, part]))
    return ArrayTables(tables, folder)


def _names_of_parts(folder: Path) -> dict[str, str]:
    file = folder / _KEYS
    if not file.is_file():
        return {}
    try:
        names = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{file}: damaged")
    return names


def _split(key: str) -> tuple[str, str, str]:
    """Return table, slot and part of a tensor's name.

    Example:
        >>> _split("user@embedding^0^32768^65536")
        ('user', 'embedding', '0^32768^65536')
        >>> _split("a.user.id/part_0_2")
        ('a.user', 'id', 'part_0_2')
        >>> _split("tower.0.weight^ ")
        ('', 'tower.0.weight', ' ')
    """
    if "@" in key:
        name, _, part = key.partition("^")
        table, _, slot = name.rpartition("@")
        return table, slot, part
    name, slash, part = key.rpartition("/part_")
    if slash:
        table, _, slot = name.rpartition(".")
        return table, slot, f"part_{part}"
    name, _, part = key.partition("^")
    return "", name, part


def _tensors(file: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield the tensors of a safetensors file that ids and rows may be, by name, to be read."""
    check_regular(file)
    data = np.memmap(file, np.uint8, "c") if file.stat().st_size >= 8 else np.empty(0, np.uint8)
    length = int.from_bytes(data[:8].tobytes(), "little")
    if not 2 <= length <= min(_MAX_HEADER_BYTES, data.size - 8):
        raise ValueError(f"{file}: truncated, or no safetensors file")
    start = 8 + length
    try:
        described: dict[str, Any] = json.loads(data[8:start].tobytes())
        described.pop("__metadata__", None)
        for key, entry in described.items():
            begin, end = entry["data_offsets"]
            dtype, shape = _DTYPES.get(entry["dtype"]), entry["shape"]
            if dtype is None:
                continue
            size = torch.Size(shape).numel() * dtype.itemsize
            if not 0 <= begin <= end <= data.size - start or end - begin != size:
                raise ValueError
            yield key, partial(_tensor, data[start + begin : start + end], dtype, shape)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, RecursionError):
        raise ValueError(f"{file}: damaged, or no file of a checkpoint") from None


def _tensor(data: npt.NDArray[np.uint8], dtype: torch.dtype, shape: list[int]) -> Tensor:
    if not data.size:
        return torch.empty(shape, dtype=dtype, device="cpu")
    # A copy: the tensor need not begin at a multiple of its items in the file.
    return torch.from_numpy(np.array(data)).view(dtype).view(shape)


__all__ = ["is_recis_folder", "newest_recis_folder", "read_recis_folder"]
