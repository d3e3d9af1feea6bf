"""Tables of a checkpoint as NumPy arrays, pandas DataFrames and Parquet files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from recis_lightning.arguments import check_kinds
from recis_lightning.checkpoint.dropped_rows import dropped_rows
from recis_lightning.checkpoint.reader import CheckpointReader
from recis_lightning.eviction_policy import Eviction

_CHUNK_ROWS = 1 << 18


def read_table(
    path: str | os.PathLike[str],
    name: str,
    kind: str = "numpy",
    *,
    drop: Eviction | None = None,
    weights_only: bool = True,
) -> Any:
    """Read all rows of a table, of every rank; each byte is checked.

    Args:
        path: A folder that ``save`` wrote to, or Lightning's checkpoint file.
        name: The table.
        kind: "numpy" or "pandas" (which must be installed).
        drop: Eviction policy that names rows to leave out, as ``HashTable.evict`` would remove
            them; it may ask for what was saved of rows, ids and norms. None leaves out none.
        weights_only: As for ``torch.load``, which reads Lightning's file; False runs code that the
            file holds, so only for a file of your own.

    Returns:
        For "numpy" a dict of arrays: ``ids`` int64 [n], ``weights`` [n, dim], each optimizer slot
        by its name, float32 [n, words], and what policies keep of each row, such as
        ``last_seen``, int64 [n]. bfloat16 comes as float32. For "pandas" a DataFrame by id with
        one column for each number: ``weights_0``, ``weights_1`` ...

    Raises:
        ValueError: No such table or kind, no checkpoint (a FileNotFoundError too), or a damaged
            one; or ``drop`` asks for what was not saved.
        TypeError: ``drop`` is no policy.
        ImportError: pandas is asked for and not installed.
    """
    if kind not in ("numpy", "pandas"):
        raise ValueError(f"kind: expected 'numpy' or 'pandas', got {kind!r}")
    pandas = _import_pandas() if kind == "pandas" else None
    chunks = list(_read_chunks(path, name, weights_only, drop))
    arrays = {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}
    if pandas is None:
        return arrays
    columns: dict[str, Any] = {}
    for key, array in arrays.items():
        if array.ndim == 1:
            columns[key] = array
        else:
            columns |= {f"{key}_{i}": array[:, i] for i in range(array.shape[1])}
    return pandas.DataFrame(columns).set_index("ids")


def write_parquet(
    path: str | os.PathLike[str],
    name: str,
    target: str | os.PathLike[str],
    *,
    drop: Eviction | None = None,
    weights_only: bool = True,
) -> None:
    """Write all rows of a table to a Parquet file, with pyarrow, chunk by chunk.

    Args:
        path: A folder that ``save`` wrote to, or Lightning's checkpoint file.
        name: The table.
        target: The file; its columns are those of ``read_table``, weights and slots as lists.
        drop: As for ``read_table``; what the policy decides by is held for all rows at once.
        weights_only: As for ``torch.load``, which reads Lightning's file; False runs code that the
            file holds, so only for a file of your own.

    Raises:
        TypeError, ValueError: As ``read_table`` does; no file is left then.
        ImportError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            "write_parquet needs pyarrow: pip install 'recis-lightning[checkpoint]'"
        ) from error

    target = Path(target)
    temporary = target.with_name(target.name + ".part")
    writer: Any = None
    try:
        for chunk in _read_chunks(path, name, weights_only, drop):
            columns = {
                key: pyarrow.array(array)
                if array.ndim == 1
                else pyarrow.FixedSizeListArray.from_arrays(array.reshape(-1), array.shape[1])
                for key, array in chunk.items()
            }
            batch = pyarrow.table(columns)
            if writer is None:
                writer = parquet.ParquetWriter(temporary, batch.schema)
            writer.write_table(batch)
        writer.close()
        temporary.replace(target)
    except BaseException:
        if writer is not None:
            writer.close()
        temporary.unlink(missing_ok=True)
        raise


def _import_pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "read_table(kind='pandas') needs pandas: pip install 'recis-lightning[checkpoint]'"
        ) from error
    return pandas


def _read_chunks(
    path: str | os.PathLike[str], name: str, weights_only: bool, drop: Eviction | None
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Read a table chunk by chunk; the first, perhaps without rows, has all columns."""
    check_kinds(drop=(drop, Eviction))
    reader = CheckpointReader.open(path, weights_only)
    if name not in reader.names():
        raise ValueError(f"name: {reader.path} has the tables {reader.names()}, got {name!r}")
    dropped = None if drop is None else dropped_rows(reader, name, drop, _CHUNK_ROWS)
    for number, chunk in enumerate(reader.chunks(name, _CHUNK_ROWS)):
        kept = slice(None) if dropped is None else ~dropped[number]
        yield {
            key: (tensor.float() if tensor.dtype is torch.bfloat16 else tensor)[kept].numpy()
            for key, tensor in chunk.items()
        }


__all__ = ["read_table", "write_parquet"]
