"""File of one rank of a delta: a group of arrays a table, and the parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.serving.array_file import (
    ArrayGroup,
    ArrayWriter,
    FileRecord,
    MappedArrays,
    to_numpy,
)
from recis_lightning.serving.chain_link import Link, LinkTable, Part
from recis_lightning.serving.delta import Delta, TableDelta
from recis_lightning.serving.served_table import ServedTable, add_table
from recis_lightning.serving.values import DTYPES

Array = npt.NDArray[np.generic]
Integers = npt.NDArray[np.int64]


def write_delta(path: Path, delta: Delta, with_dense: bool) -> tuple[FileRecord, dict[str, Part]]:
    """Write the file of a rank; return its record, and the rank's part of each table."""
    widths = [table.weights.shape[1] for table in delta.tables.values()]
    slots = [
        slot.shape[1]
        for table in delta.tables.values()
        if table.state is not None
        for slot in table.state.slots.values()
    ]
    writer = ArrayWriter(path, 4 * max([*widths, *slots, 1]))
    try:
        parts = {
            name: _add(writer, number, table)
            for number, (name, table) in enumerate(delta.tables.items())
        }
        for name, tensor in delta.dense.items() if with_dense else ():
            array = to_numpy(tensor)
            writer.add(f"dense/{name}", tuple(tensor.shape), [array])
        return writer.close(), parts
    except BaseException:
        writer.abandon()
        raise


def _add(writer: ArrayWriter, number: int, table: TableDelta) -> Part:
    """Write a table's arrays; return its part."""

    def add(name: str, tensor: Tensor) -> None:
        array = to_numpy(tensor)
        writer.add(f"{number}/{name}", array.shape, [array])

    order = add_table(
        writer,
        f"{number}/table/",
        table.ids.numpy(),
        lambda positions: table.weights[positions],
        table.dtype,
        table.weights.shape[1],
    )
    add("removed", table.removed)
    add("numbers", table.rows[order])
    state = table.state
    if state is None:
        return Part(table.is_whole, len(order), table.removed.numel(), None, [], [], {}, 0)
    for name, column in state.by_id.items():
        add(f"by_id/{name}", column[order])
    for name, tensor in state.others.items():
        add(f"others/{name}", tensor)
    for name, slot in state.slots.items():
        add(f"slots/{name}", slot[order])
    return Part(
        *(table.is_whole, len(order), table.removed.numel(), state.fields),
        *(list(state.by_id), list(state.others)),
        {name: slot.shape[1] for name, slot in state.slots.items()},
        state.now_us,
    )


def tables_of(delta: Delta, parts: list[dict[str, Part]]) -> list[LinkTable]:
    """Return the records of a delta's tables, of which each rank wrote its part."""
    return [
        LinkTable(name, table.weights.shape[1], table.dtype, [of_rank[name] for of_rank in parts])
        for name, table in delta.tables.items()
    ]


def dense_dtypes(delta: Delta) -> dict[str, str]:
    """Return the dtype of each parameter and buffer, by name."""
    return {n: str(t.dtype).removeprefix("torch.") for n, t in delta.dense.items()}


class DeltaFile:
    """File of one rank of a link, open.

    Args:
        folder: The chain's.
        link: The link.
        rank: Whose file.

    Raises:
        ValueError: The file is missing, damaged, or not what the record says.
    """

    def __init__(self, folder: Path, link: Link, rank: int) -> None:
        self.link, self.rank = link, rank
        self.arrays = MappedArrays(folder, link.files[rank])

    def table(self, number: int) -> ServedTable:
        """Return the ids and weights of a table; ValueError if its arrays are not those."""
        table = self.link.tables[number]
        group = ArrayGroup(self.arrays, f"{number}/table/")
        rows = ServedTable(
            table.name, group, table.dtype, table.embedding_dim, getattr(torch, table.dtype)
        )
        if len(rows) != table.parts[self.rank].rows:
            raise ValueError(f"{self.arrays.path}: table {table.name!r} has {len(rows)} rows")
        return rows

    def removed(self, number: int) -> Integers:
        """Return a table's tombstones, int64 [m], checked."""
        name = f"{number}/removed"
        self.arrays.check_rows(name, np.arange(len(self.arrays[name])))
        return self.arrays[name]

    def array(self, number: int, name: str) -> Array:
        """Return an array of a table; ``check_all`` comes before."""
        return self.arrays[f"{number}/{name}"]

    def check_all(self) -> None:
        """Read and check the whole file; ValueError if it is damaged."""
        self.arrays.check_all()

    def dense(self) -> dict[str, Tensor]:
        """Return copies of the parameters and buffers by name; rank 0's file has them."""
        found = {}
        for name, dtype in self.link.dense.items() if self.rank == 0 else ():
            array = self.arrays[f"dense/{name}"]
            self.arrays.check_rows(f"dense/{name}", np.arange(len(array) if array.ndim else 1))
            found[name] = to_tensor(array, DTYPES[dtype])
        return found


def to_tensor(array: Array, dtype: torch.dtype) -> Tensor:
    """Return a copy of an array as a tensor of a dtype that NumPy may not have.

    Raises:
        ValueError: The array has items of another size.
    """
    tensor = torch.from_numpy(array.copy())
    if tensor.dtype is dtype:
        return tensor
    if tensor.element_size() != dtype.itemsize:
        raise ValueError(f"an array of {tensor.dtype} is no tensor of {dtype}")
    return tensor != 0 if dtype is torch.bool else tensor.view(dtype)


__all__ = ["DeltaFile", "dense_dtypes", "tables_of", "to_tensor", "write_delta"]
