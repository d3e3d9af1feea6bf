"""Readers of npz and Parquet files with ids and a matrix."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.checkpoint.array_tables import ArrayTables, Piece
from recis_lightning.checkpoint.regular_file import check_regular

_IDS, _WEIGHTS = "ids", "weights"
_Arrays = dict[str, npt.NDArray[Any]]


def read_npz(file: Path) -> ArrayTables:
    """Read the tables of an npz file.

    Args:
        file: One array of one dimension and integers, the ids, and one of two dimensions and
            floats, their rows, of any names: the table is named as the file, without its ending. Or
            pairs ``user.ids``, ``user.weights``: then tables are named so.

    Raises:
        ValueError: It is no such file; nothing that it holds is run.
    """
    check_regular(file)
    try:
        with file.open("rb") as data, np.load(data, allow_pickle=False) as content:
            arrays: _Arrays = {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError, AttributeError) as error:
        raise ValueError(f"{file}: damaged, or no npz file ({error})") from None
    pieces: dict[str, list[Piece]] = {}
    for name in _pairs(arrays):
        pieces[name] = [(_ids(file, arrays[f"{name}.ids"]), _rows(file, arrays[f"{name}.weights"]))]
    if not pieces:
        ids = [array for array in arrays.values() if array.ndim == 1 and array.dtype.kind in "iu"]
        rows = [array for array in arrays.values() if array.ndim == 2]
        if len(ids) != 1 or len(rows) != 1:
            found = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
            raise ValueError(
                f"{file}: expected an array of ids, one dimension of integers, and one of rows, "
                f"two dimensions of floats; or pairs user.ids, user.weights; got {found}"
            )
        pieces[file.stem] = [(_ids(file, ids[0]), _rows(file, rows[0]))]
    return ArrayTables(pieces, file)


def read_parquet(file: Path) -> ArrayTables:
    """Read the table of a Parquet file, with pyarrow; it is named as the file, without its ending.

    Args:
        file: The file, or a folder of such files, with a column ``ids`` of integers and their rows:
            a column ``weights`` of lists, all of one length, or columns ``weights_0``,
            ``weights_1``, ... as ``checkpoint.read_table`` and ``write_parquet`` name them. Where
            there is one column of integers and one of lists, they may have any names.

    Raises:
        ValueError: It is no such file.
        ImportError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            "reading Parquet needs pyarrow: pip install 'recis-lightning[checkpoint]'"
        ) from error
    try:
        table = parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: damaged, or no Parquet file ({error})") from None
    types = {field.name: field.type for field in table.schema}
    if len(types) < len(table.schema):
        raise ValueError(f"{file}: expected each column once, got {table.schema.names}")
    ids = _column(types, _IDS, pyarrow.types.is_integer)
    lists = _column(types, _WEIGHTS, _is_list)
    flat = [name for name in types if re.fullmatch(f"{_WEIGHTS}_[0-9]+", name)]
    if ids is None or (lists is None and not flat):
        raise ValueError(
            f"{file}: expected a column ids of integers, and weights of lists or weights_0, "
            f"weights_1, ...; got { ({name: str(kind) for name, kind in types.items()}) }"
        )
    column = table.column(ids)
    if column.null_count:
        raise ValueError(f"{file}: expected ids, got {column.null_count} nulls among {ids}")
    if lists is not None:
        rows = _matrix(file, table.column(lists).combine_chunks(), lists)
    else:
        rows = _joined(file, table, flat)
    return ArrayTables({file.stem: [(_ids(file, column.to_numpy()), _rows(file, rows))]}, file)


def _pairs(arrays: _Arrays) -> list[str]:
    names = [name.removesuffix(".ids") for name in arrays if name.endswith(".ids")]
    return [name for name in names if f"{name}.weights" in arrays]


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _column(types: dict[str, Any], name: str, is_kind: Any) -> str | None:
    """Return the name of the column of a kind: the usual one, or the only one."""
    found = [column for column, kind in types.items() if is_kind(kind)]
    if name in found:
        return name
    return found[0] if len(found) == 1 else None


def _matrix(file: Path, column: Any, name: str) -> npt.NDArray[Any]:
    """Return a column of lists of one length as an array of two dimensions."""
    chunks = column.chunks if hasattr(column, "chunks") else [column]
    parts = [_matrix_of(file, chunk, name) for chunk in chunks]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _matrix_of(file: Path, column: Any, name: str) -> npt.NDArray[Any]:
    import pyarrow

    length = len(column)
    values = column.flatten()
    if column.null_count or values.null_count:
        raise ValueError(f"{file}: expected numbers, got nulls in {name}")
    if pyarrow.types.is_fixed_size_list(column.type):
        dim = column.type.list_size
    else:
        counts = np.unique(np.diff(column.offsets.to_numpy()))
        if len(counts) > 1:
            raise ValueError(f"{file}: expected lists of one length in {name}, got {counts[:9]}")
        dim = int(counts[0]) if len(counts) else 1
    array: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return array.reshape(length, dim)


def _joined(file: Path, table: Any, names: list[str]) -> npt.NDArray[Any]:
    """Return columns of numbers, ``weights_0`` and so on, as an array of two dimensions."""
    wanted = [f"{_WEIGHTS}_{i}" for i in range(len(names))]
    if sorted(names) != sorted(wanted):
        missing = sorted(set(wanted) - set(names))
        raise ValueError(f"{file}: expected columns {wanted[0]} to {wanted[-1]}, got no {missing}")
    for name in wanted:
        if nulls := table.column(name).null_count:
            raise ValueError(f"{file}: expected numbers, got {nulls} nulls in {name}")
    return np.stack([table.column(name).to_numpy() for name in wanted], 1)


def _ids(file: Path, array: npt.NDArray[Any]) -> Tensor:
    if array.dtype.kind not in "iu":
        raise ValueError(f"{file}: expected integer ids, got {array.dtype.name}")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{file}: expected ids of int64, got {array.max()}")
    return torch.from_numpy(np.require(array, np.int64, ["C", "W"]))


def _rows(file: Path, array: npt.NDArray[Any]) -> Tensor:
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ValueError(f"{file}: expected rows of floats, got {array.dtype.name}")
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))


__all__ = ["read_npz", "read_parquet"]
