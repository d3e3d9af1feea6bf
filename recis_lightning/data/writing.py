"""Tensors back to Parquet: a file of rows that gets its name when it is complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from torch import Tensor

from recis_lightning.jagged import Jagged
from recis_lightning.nested_jagged import NestedJagged

__all__ = ["RowFile", "to_arrow"]


def to_arrow(value: Tensor | Jagged | NestedJagged) -> pa.Array:
    """Convert a tensor [B] to an array, [B, ...] to one of fixed lists, a ``Jagged`` to lists.

    A ``NestedJagged`` becomes lists of lists.

    bfloat16 becomes float32. Weights of a ``Jagged`` are left out.

    Raises:
        TypeError: ``value`` is neither, or of a dtype that Arrow lacks.
        ValueError: It has no dimension for rows, or another one that is empty.

    Example:
        >>> to_arrow(torch.tensor([[1, 2], [3, 4]])).to_pylist()
        [[1, 2], [3, 4]]
    """
    if isinstance(value, NestedJagged):
        offsets = pa.array(_numbers(value.outer_offsets), pa.int64())
        return pa.LargeListArray.from_arrays(offsets, to_arrow(value.inner()))
    if isinstance(value, Jagged):
        offsets = pa.array(_numbers(value.offsets), pa.int64())
        return pa.LargeListArray.from_arrays(offsets, to_arrow(value.values))
    if not isinstance(value, Tensor):
        raise TypeError(f"expected a Tensor or Jagged, got {type(value).__name__}")
    if not value.dim() or 0 in value.shape[1:]:
        raise ValueError(
            f"expected shape [B, ...] with no empty dimension behind B, got {tuple(value.shape)}"
        )
    array = pa.array(_numbers(value).reshape(-1))
    for size in reversed(value.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


def _numbers(value: Tensor) -> np.ndarray[Any, Any]:
    value = value.detach().cpu()
    if value.is_complex() or value.is_quantized:
        raise TypeError(f"expected real numbers or bools, got {value.dtype}")
    return (value.float() if value.dtype is torch.bfloat16 else value).numpy()


class RowFile:
    """Parquet file of rows, written batch by batch under a hidden name.

    Args:
        path: Its name once it is complete; its folder is made.
        overwrite: Whether it may take the place of a file.

    Raises:
        FileExistsError: There is one already, and ``overwrite`` is False.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists: choose another path or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._part = path, path.with_name(f".{path.name}.part")
        self._writer: Any = None

    def append(self, columns: Mapping[str, Tensor | Jagged]) -> None:
        """Write a batch; one without rows counts for the columns only.

        Args:
            columns: Name -> values, equally many rows each.

        Raises:
            TypeError, ValueError: Values do not fit; names the column.
        """
        arrays = {}
        for name, value in columns.items():
            try:
                arrays[name] = to_arrow(value)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns: expected equally many rows, got {lengths}")
        table = pa.table(arrays)
        if self._writer is None:
            self._writer = parquet.ParquetWriter(self._part, table.schema)
        if table.schema != self._writer.schema:
            raise ValueError(
                f"columns: expected those of the first batch, {self._writer.schema}, "
                f"got {table.schema}"
            )
        if table.num_rows:
            self._writer.write_table(table)

    def finish(self) -> None:
        """Complete the file and give it its name; nothing if no batch came."""
        if self._writer is not None:
            self._writer.close()
            self._part.replace(self._path)
            self._writer = None

    def abandon(self) -> None:
        """Remove what was written."""
        if self._writer is not None:
            self._writer.close()
            self._part.unlink(missing_ok=True)
            self._writer = None
