"""Merge of a chain's links into the state behind the last one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.serving.chain_link import Link, LinkTable
from recis_lightning.serving.delta import Delta, TableDelta, TableState
from recis_lightning.serving.delta_file import DeltaFile, to_tensor

Integers = npt.NDArray[np.int64]


class _Piece(NamedTuple):
    """Rows of a file that no later link has.

    Attributes:
        file: The file.
        number: Of the table there.
        positions: int64 [n], in its arrays.
    """

    file: DeltaFile
    number: int
    positions: Integers


def check_alike(links: Sequence[Link], folder: Path) -> None:
    """Raise ValueError unless links are of the same tables and the same number of ranks."""
    first = links[0]
    shapes = {(t.name, t.embedding_dim, t.dtype) for t in first.tables}
    for link in links:
        if {(t.name, t.embedding_dim, t.dtype) for t in link.tables} != shapes:
            raise ValueError(f"{folder / link.file}: its tables are not those of the link before")
        if len(link.files) != len(first.files):
            raise ValueError(
                f"{folder / link.file}: of {len(link.files)} ranks, the link before of "
                f"{len(first.files)}"
            )


def merge(folder: Path, links: Sequence[Link], rank: int) -> Delta:
    """Return what one rank has behind the last of some links, as a delta of all rows.

    Args:
        folder: The chain's.
        links: A base, and the deltas that follow on it.
        rank: Whose part.

    Raises:
        ValueError: A file is missing or damaged.
    """
    check_alike(links, folder)
    files = [DeltaFile(folder, link, rank) for link in links]
    for file in files:
        file.check_all()
    last = links[-1]
    tables = {table.name: _merge_table(files, table, rank) for table in last.tables}
    return Delta(last.step, tables, files[-1].dense())


def _merge_table(files: Sequence[DeltaFile], table: LinkTable, rank: int) -> TableDelta:
    """Return all rows of a table, by the number of their row."""
    pieces = _pieces(files, table.name, rank)
    ids = _join([_ids(piece)[piece.positions] for piece in pieces], np.int64)
    numbers = _join([_column(piece, "numbers") for piece in pieces], np.int64)
    order = torch.from_numpy(np.argsort(numbers, kind="stable"))
    weights = torch.cat([p.file.table(p.number).gather(p.positions) for p in pieces])
    last = table.parts[rank]
    state = None
    if last.fields is not None:
        number = [t.name for t in files[-1].link.tables].index(table.name)
        by_id = {
            name: torch.from_numpy(_join([_column(p, f"by_id/{name}") for p in pieces], np.int64))
            for name in last.by_id
        }
        slots = {name: _slot(pieces, name, words) for name, words in last.slots.items()}
        others = {}
        for name in last.others:
            array = files[-1].array(number, f"others/{name}")
            others[name] = to_tensor(array, torch.from_numpy(array[:0].copy()).dtype)
        state = TableState(
            last.fields,
            {name: column[order] for name, column in by_id.items()},
            others,
            {name: slot[order] for name, slot in slots.items()},
            last.now_us,
        )
    none = torch.empty(0, dtype=torch.int64, device="cpu")
    sorted_ids, sorted_numbers = torch.from_numpy(ids)[order], torch.from_numpy(numbers)[order]
    return TableDelta(
        *(table.name, table.dtype, True, sorted_ids, weights[order], sorted_numbers, none, state),
    )


def _pieces(files: Sequence[DeltaFile], name: str, rank: int) -> list[_Piece]:
    """Return where each id's last row is."""
    pieces = []
    decided = np.empty(0, np.int64)  # ids that a later link has or has removed, ascending
    for file in reversed(files):
        number = [table.name for table in file.link.tables].index(name)
        piece = _Piece(file, number, np.empty(0, np.int64))
        ids = _ids(piece)
        if len(np.unique(ids)) != len(ids):
            raise ValueError(f"{file.arrays.path}: an id of table {name!r} is there twice")
        pieces.append(piece._replace(positions=np.flatnonzero(~is_in(ids, decided))))
        if file.link.tables[number].parts[rank].is_whole:
            break
        decided = np.union1d(decided, np.concatenate([ids, file.removed(number)]))
    return pieces


def is_in(ids: Integers, ascending: Integers) -> npt.NDArray[np.bool_]:
    """Return whether each id is among some that are in ascending order, bool [n].

    Example:
        >>> is_in(np.array([3, 1, 9]), np.array([1, 3, 4])).tolist()
        [True, True, False]
    """
    if not len(ascending):
        return np.zeros(len(ids), np.bool_)
    places = np.minimum(np.searchsorted(ascending, ids), len(ascending) - 1)
    found: npt.NDArray[np.bool_] = ascending[places] == ids
    return found


def _ids(piece: _Piece) -> Integers:
    return np.asarray(piece.file.array(piece.number, "table/ids"), np.int64)


def _column(piece: _Piece, name: str) -> Integers:
    return np.asarray(piece.file.array(piece.number, name), np.int64)[piece.positions]


def _slot(pieces: Sequence[_Piece], name: str, words: int) -> Tensor:
    parts = [np.empty((0, words), np.float32)]
    for piece in pieces:
        if not len(piece.positions):
            continue
        if f"{piece.number}/slots/{name}" not in piece.file.arrays:
            raise ValueError(f"{piece.file.arrays.path}: it has no optimizer state {name!r}")
        array = np.asarray(piece.file.array(piece.number, f"slots/{name}"), np.float32)
        parts.append(array[piece.positions])
    return torch.from_numpy(np.concatenate(parts))


def _join(parts: Sequence[Integers], dtype: type) -> Integers:
    return np.concatenate([np.empty(0, dtype), *parts])


__all__ = ["check_alike", "is_in", "merge"]
