"""Search of files for what they still have of ids that were forgotten."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.arguments import check_ids, check_path
from recis_lightning.checkpoint.commit import SHARD_SUFFIX
from recis_lightning.checkpoint.regular_file import open_regular
from recis_lightning.serving.array_file import DTYPES
from recis_lightning.serving.merging import is_in
from recis_lightning.serving.served_table import quantise

Integers = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_ID_ARRAYS = ("ids", "pending_ids", "pinned_ids", "removed")
_RARE = 1 << 32  # ids beyond are found by their eight bytes alone, wherever these are
_WORD = 8


class Trace(NamedTuple):
    """Trace of an id that a file has.

    Attributes:
        file: The file's path.
        place: Name of an array of ids, or "byte 4096".
        what: "id" or "row".
        id: The id.
    """

    file: str
    place: str
    what: str
    id: int


def find_traces(
    path: str | os.PathLike[str], ids: Tensor, weights: Tensor | None = None
) -> list[Trace]:
    """Return what files still have of ids: of checkpoints, chains of deltas and served folders.

    Ids are looked for in each array of ids that these files have (rows, tombstones, pins and
    admission counts); those beyond 2**32, which hardly occur by chance, as bytes anywhere in any
    file. Rows are looked for as bytes anywhere, as float32, bfloat16 and int8. What is compressed,
    as Parquet may be, is not found.

    Args:
        path: A file, or a folder with all that is below it.
        ids: int64 [n].
        weights: [n, dim], their rows as they were; None looks for ids alone. A row of zeros, or of
            less than eight bytes, tells nothing and is passed over.

    Returns:
        The traces, none if all of it is gone; of many in one place some.

    Raises:
        TypeError: An argument is of another type (names it).
        ValueError: There is nothing at ``path``, a file cannot be read, or ``weights`` has another
            number of rows than ids.

    Example:
        >>> import tempfile
        >>> from recis_lightning import HashTable, checkpoint
        >>> table = HashTable(2, name="user")
        >>> table.insert(torch.tensor([7, 8]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.save(folder, [table])
        ...     found = find_traces(folder, torch.tensor([7]), table.embeddings(torch.tensor([7])))
        ...     forgotten = table.forget(torch.tensor([7]))
        ...     checkpoint.save(folder, [table])
        ...     sorted(trace.what for trace in found), find_traces(folder, torch.tensor([7]))
        (['id', 'row'], [])
    """
    flat = np.asarray(check_ids(ids).reshape(-1).cpu(), np.int64)
    if weights is not None and not isinstance(weights, Tensor):
        raise TypeError(f"weights: expected a Tensor or None, got {type(weights).__name__}")
    if weights is not None and (weights.dim() != 2 or len(weights) != len(flat)):
        raise ValueError(f"weights: expected [{len(flat)}, dim], got {tuple(weights.shape)}")
    root = check_path("path", path)
    if not root.exists():
        raise ValueError(f"{root}: there is nothing")
    patterns = _id_patterns(flat) + ([] if weights is None else _row_patterns(flat, weights.cpu()))
    wanted, found = np.unique(flat), list[Trace]()
    files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    for file in files:
        data = _read(file)
        for name, array in _id_arrays(file, data):
            for id in np.unique(array[is_in(array, wanted)]).tolist():
                found.append(Trace(str(file), name, "id", id))
        for pattern in patterns:
            found += _search(file, data, pattern)
    return found


class _Pattern(NamedTuple):
    """Bytes to look for.

    Attributes:
        what: As in ``Trace``.
        ids: int64 [n].
        rows: uint8 [n, width], width at least eight, ordered by their first word.
        words: uint64 [n], the first word of each.
    """

    what: str
    ids: Integers
    rows: Bytes
    words: npt.NDArray[np.uint64]


def _pattern(what: str, ids: Integers, rows: Bytes) -> list[_Pattern]:
    if rows.shape[1] < _WORD or not len(rows):
        return []
    words = np.ascontiguousarray(rows[:, :_WORD]).view(np.uint64)[:, 0]
    order = np.argsort(words)
    return [_Pattern(what, ids[order], rows[order], words[order])]


def _id_patterns(ids: Integers) -> list[_Pattern]:
    rare = ids[(ids >= _RARE) | (ids < -_RARE)]
    return _pattern("id", rare, rare.reshape(-1, 1).view(np.uint8).reshape(len(rare), 8))


def _row_patterns(ids: Integers, weights: Tensor) -> list[_Pattern]:
    """Return the rows in each form that files have; a table of bfloat16 has fewer digits."""
    forms = [weights.float().numpy(), weights.bfloat16().view(torch.int16).numpy()]
    if bool(weights.isfinite().all()):
        forms.append(quantise(weights.float())[0])
    patterns = []
    for form in forms:
        rows = np.ascontiguousarray(form).view(np.uint8).reshape(len(ids), -1)
        # A file is full of zeros; a row that begins with them is found by what follows.
        first = np.argmax(rows != 0, axis=1) if rows.size else np.zeros(len(ids), np.int64)
        first = np.where(first < _WORD, 0, np.minimum(first, rows.shape[1] - _WORD))
        for start in np.unique(first).tolist():
            some = (first == start) & (rows != 0).any(1)
            patterns += _pattern("row", ids[some], rows[some][:, start:])
    return patterns


def _search(file: Path, data: Bytes, pattern: _Pattern) -> Iterator[Trace]:
    """Yield where a file has a pattern, at any byte."""
    width = pattern.rows.shape[1]
    for shift in range(_WORD):
        count = (len(data) - shift) // _WORD
        if count <= 0:
            continue
        words = data[shift : shift + _WORD * count].view(np.uint64)
        places = np.minimum(np.searchsorted(pattern.words, words), len(pattern.words) - 1)
        for word in np.flatnonzero(pattern.words[places] == words).tolist():
            at = shift + _WORD * word
            content = data[at : at + width]
            row = int(places[word])
            while row < len(pattern.words) and pattern.words[row] == words[word]:
                if np.array_equal(content, pattern.rows[row]):
                    yield Trace(str(file), f"byte {at}", pattern.what, int(pattern.ids[row]))
                row += 1


def _read(file: Path) -> Bytes:
    with os.fdopen(open_regular(file), "rb") as opened:
        return np.frombuffer(opened.read(), np.uint8)


def _id_arrays(file: Path, data: Bytes) -> Iterator[tuple[str, Integers]]:
    """Yield the arrays of ids that a file of ours has, whatever else is in it."""
    if file.suffix == SHARD_SUFFIX:
        yield from _arrays_of_safetensors(data)
    elif file.name.endswith(".rows"):
        yield from _arrays_of_rows(file, data)
    elif data[:2].tobytes() == b"PK":
        state = torch.load(file, weights_only=True, map_location="cpu")
        yield from _arrays_of_state(state, "")


def _arrays_of_safetensors(data: Bytes) -> Iterator[tuple[str, Integers]]:
    length = int(data[:8].view(np.uint64)[0])
    header = json.loads(data[8 : 8 + length].tobytes())
    for name, entry in header.items():
        if name.rpartition(".")[2] in _ID_ARRAYS and entry.get("dtype") == "I64":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            yield name, np.frombuffer(data[start:end].tobytes(), np.int64)


def _arrays_of_rows(file: Path, data: Bytes) -> Iterator[tuple[str, Integers]]:
    """Yield those that a record beside the file names."""
    for record in file.parent.glob("*.json"):
        for entry in _records(json.loads(record.read_text())):
            if entry["file"] != file.name:
                continue
            for name, (dtype, shape, offset) in entry["arrays"].items():
                if name.rpartition("/")[2] in _ID_ARRAYS:
                    size = int(np.prod(shape)) * DTYPES[dtype].itemsize
                    yield name, np.frombuffer(data[offset : offset + size].tobytes(), np.int64)
            return


def _records(state: Any) -> Iterator[dict[str, Any]]:
    """Yield the records of files anywhere in what JSON had."""
    if isinstance(state, dict):
        if isinstance(state.get("file"), str) and isinstance(state.get("arrays"), dict):
            yield state
        for value in state.values():
            yield from _records(value)
    elif isinstance(state, list):
        for value in state:
            yield from _records(value)


def _arrays_of_state(state: Any, where: str) -> Iterator[tuple[str, Integers]]:
    if isinstance(state, dict):
        for key, value in state.items():
            if key in _ID_ARRAYS and isinstance(value, Tensor) and value.dtype is torch.int64:
                yield f"{where}{key}", value.reshape(-1).numpy()
            else:
                yield from _arrays_of_state(value, f"{where}{key}.")


__all__ = ["Trace", "find_traces"]
