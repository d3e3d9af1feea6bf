"""Save, load and inspect tables on any number of ranks, without a Trainer.

Each rank writes its own rows to safetensors files; a commit, written last, names them all. The
commit is ``checkpoint.json`` in the folder, or Lightning's checkpoint where ``CheckpointHook``
writes it: every function here takes either.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from recis_lightning.checkpoint.progress import Progress, progress_bar
from recis_lightning.checkpoint.reader import COMMIT_FILE, Source, shown
from recis_lightning.checkpoint.table_shards import SUFFIX, Commit, Shard, num_bytes, write_table
from recis_lightning.distributed import collectives
from recis_lightning.table.hash_table import HashTable, hash_tables

_ROWS_AT_ONCE = 1 << 18


def save(
    directory: str | os.PathLike[str],
    tables: nn.Module | Iterable[HashTable],
    *,
    progress: Progress = progress_bar,
) -> None:
    """Save tables to a folder; every rank calls it and writes its own rows.

    What the folder held before stays valid until the new checkpoint is whole, and goes then.

    Args:
        directory: The folder; made if it is not there. All ranks must see the same one.
        tables: A module with tables, or tables of different names.
        progress: Shows how far rank 0 is.

    Raises:
        ValueError: Two tables of one name, or ranks with different tables.
        OSError: The disk is full, or whatever else it says; on the other ranks a RuntimeError.

    Example:
        >>> import tempfile
        >>> table = HashTable(2, name="user")
        >>> table.insert(torch.tensor([7]), torch.ones(1, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, [table])
        ...     table.clear()
        ...     load(folder, [table])
        >>> table.ids().tolist()
        [7]
    """
    folder = Path(directory)
    commit = write_shards(folder, tables, ".", progress, new_save_id())

    def finish() -> None:
        text = json.dumps(commit.to_state(), indent=1)
        temporary = folder / f"{COMMIT_FILE}.{commit.save_id}"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / COMMIT_FILE)
        sync_folder(folder)
        remove_shards(folder, kept=[commit.save_id])
        for unfinished in folder.glob(f"{COMMIT_FILE}.*"):
            unfinished.unlink(missing_ok=True)

    collectives.run_on_all_ranks(finish if collectives.rank() == 0 else lambda: None)


def load(
    path: str | os.PathLike[str],
    tables: nn.Module | Iterable[HashTable],
    *,
    weights_only: bool = True,
    progress: Progress = progress_bar,
) -> None:
    """Replace what tables hold by what a checkpoint holds of them: all of it or nothing.

    Every byte is checked before a table changes. Any number of ranks may load what any other
    number saved; each takes the rows that it owns.

    Args:
        path: A folder that ``save`` wrote to, or Lightning's checkpoint file.
        tables: A module with tables, or tables, of the names that were saved.
        weights_only: As for ``torch.load``, which reads Lightning's file.
        progress: Shows how far rank 0 is.

    Raises:
        ValueError: Another set of tables, another dim, dtype or optimizer, or files that are
            missing, damaged or of another save; on a rank that found nothing wrong while another
            one did, a RuntimeError.
    """
    own = collectives.run_on_all_ranks(lambda: _by_name(tables))
    source = collectives.run_on_all_ranks(lambda: Source(path, weights_only))
    source.load(own, strict=True, progress=progress)


class TableContents(NamedTuple):
    """What a checkpoint holds of a table.

    Attributes:
        rows: By the rank that wrote them.
        embedding_dim: Weights in a row.
        dtype: Of the weights.
        slots: Optimizer state of a row: name -> float32 words.
        step: Of the table.
        num_updates: Optimizer steps that had a gradient for it.
        num_bytes: Of its files; of its tensors where they are in Lightning's checkpoint itself.
    """

    rows: list[int]
    embedding_dim: int
    dtype: torch.dtype
    slots: dict[str, int]
    step: int
    num_updates: int
    num_bytes: int


def inspect(path: str | os.PathLike[str], *, weights_only: bool = True) -> dict[str, TableContents]:
    """Tell what tables a checkpoint holds, without reading their rows.

    Args:
        path: A folder that ``save`` wrote to, or Lightning's checkpoint file.
        weights_only: As for ``torch.load``, which reads Lightning's file.

    Raises:
        ValueError: It is no checkpoint, or a file is missing, torn or of another save.
    """
    source = Source(path, weights_only)
    return {name: _contents(source, name) for name in source.names()}


def _contents(source: Source, name: str) -> TableContents:
    if source.shards is None:
        state = source.states[name]
        tensors = {"weights": state["weights"], "ids": state["ids"], **state["slots"]}
        slots = {key: slot.shape[1] for key, slot in state["slots"].items()}
        layout = (state["embedding_dim"], state["weights"].dtype, slots)
        rows, size = [len(state["ids"])], sum(tensor.nbytes for tensor in tensors.values())
        return TableContents(rows, *layout, state["step"], state["num_updates"], size)
    files = [source.shards.file(name, rank) for rank in range(source.shards.commit.world_size)]
    rows, size = [file.metadata["rows"] for file in files], sum(file.size for file in files)
    step, updates = (max(file.metadata[key] for file in files) for key in ("step", "num_updates"))
    return TableContents(rows, *source.shards.layout(name), step, updates, size)


def read_table(
    path: str | os.PathLike[str], name: str, kind: str = "numpy", *, weights_only: bool = True
) -> Any:
    """Read all of a table, whichever ranks wrote it; every byte is checked.

    Args:
        path: A folder that ``save`` wrote to, or Lightning's checkpoint file.
        name: The table.
        kind: "numpy" or "pandas" (which must be installed).
        weights_only: As for ``torch.load``, which reads Lightning's file.

    Returns:
        For "numpy" a dict of arrays: ``ids`` int64 [n], ``weights`` [n, dim], each optimizer slot
        by its name, float32 [n, words], and what policies keep of each row, such as
        ``last_seen``, int64 [n]. bfloat16 comes as float32. For "pandas" a DataFrame by id with
        one column for each number: ``weights_0``, ``weights_1`` ...

    Raises:
        ValueError: No such table or kind, no checkpoint, or a damaged one.
    """
    if kind not in ("numpy", "pandas"):
        raise ValueError(f"kind: expected 'numpy' or 'pandas', got {kind!r}")
    pieces = list(_pieces(path, name, weights_only))
    arrays = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
    if kind == "numpy":
        return arrays
    import pandas

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
    weights_only: bool = True,
) -> None:
    """Write all of a table to a Parquet file, with pyarrow, piece by piece.

    Args:
        path: A folder that ``save`` wrote to, or Lightning's checkpoint file.
        name: The table.
        target: The file; its columns are those of ``read_table``, weights and slots as lists.
        weights_only: As for ``torch.load``, which reads Lightning's file.

    Raises:
        ValueError: As ``read_table`` does; no file is left then.
    """
    import pyarrow
    from pyarrow import parquet

    target = Path(target)
    temporary = target.with_name(target.name + ".part")
    writer: Any = None
    try:
        for piece in _pieces(path, name, weights_only):
            columns = {
                key: pyarrow.array(array)
                if array.ndim == 1
                else pyarrow.FixedSizeListArray.from_arrays(array.reshape(-1), array.shape[1])
                for key, array in piece.items()
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


def _pieces(
    path: str | os.PathLike[str], name: str, weights_only: bool
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Read a table some rows at a time; the first piece, perhaps of no rows, tells the columns."""
    source = Source(path, weights_only)
    if name not in source.names():
        raise ValueError(f"name: {source.path} has the tables {source.names()}, got {name!r}")
    for piece in source.pieces(name, _ROWS_AT_ONCE):
        yield {
            key: (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
            for key, tensor in piece.items()
        }


def new_save_id() -> str:
    """Return what tells the files of one save from those of any other."""
    return secrets.token_hex(8)


def write_shards(
    directory: Path,
    tables: nn.Module | Iterable[HashTable],
    folder: str,
    progress: Progress,
    save_id: str,
) -> Commit:
    """Write every rank's shards, without the commit that makes them a checkpoint.

    Args:
        directory: Where the files go.
        tables: A module with tables, or tables of different names.
        folder: The same, as the commit will call it.
        progress: Shows how far rank 0 is.
        save_id: New; that of rank 0 is taken.

    Raises:
        ValueError, OSError, RuntimeError: As for ``save``; the files written so far are removed.
    """
    rank, world_size = collectives.rank(), collectives.world_size()
    own = collectives.run_on_all_ranks(lambda: _by_name(tables))
    plans = collectives.gather((save_id, {name: own[name].embedding_dim for name in own}))
    save_id = plans[0][0]
    for other, (_, found) in enumerate(plans):
        if found != plans[0][1]:
            raise ValueError(f"tables: rank 0 has {plans[0][1]}, rank {other} has {found}")

    def write() -> dict[str, Shard]:
        directory.mkdir(parents=True, exist_ok=True)
        total = sum(map(num_bytes, own.values()))
        with shown(progress)("Saving tables", total) as advance:
            written = {
                name: write_table(directory, table, rank, world_size, save_id, advance)
                for name, table in own.items()
            }
        sync_folder(directory)
        return written

    try:
        shards = collectives.gather(collectives.run_on_all_ranks(write))
    except BaseException:
        for name in directory.glob(f"*.{rank}-of-{world_size}.{save_id}{SUFFIX}"):
            with contextlib.suppress(OSError):
                name.unlink()
        raise
    by_table = {name: [part[name] for part in shards] for name in own}
    return Commit(save_id, world_size, folder, str(directory.resolve()), by_table)


def _by_name(tables: nn.Module | Iterable[HashTable]) -> dict[str, HashTable]:
    if isinstance(tables, nn.Module):
        tables = hash_tables(tables)
    named: dict[str, HashTable] = {}
    for table in tables:
        if not isinstance(table, HashTable):
            raise TypeError(f"tables: expected HashTable, got {type(table).__name__}")
        if named.setdefault(table.name, table) is not table:
            raise ValueError(
                f"tables: two have the name {table.name!r}, and a checkpoint tells tables apart "
                "by their names; give one another name"
            )
    return named


# ---- files


def remove_shards(folder: Path, kept: Iterable[str] = (), only: str = "") -> None:
    """Remove the shard files of a folder, finished or not.

    Args:
        folder: Where they are.
        kept: ``save_id`` of each save of which they stay.
        only: ``save_id`` of the one save of which they go; "" means all others too.
    """
    stay = [f".{save_id}{SUFFIX}" for save_id in kept]
    for file in folder.glob(f"*.{only}{SUFFIX}*" if only else f"*{SUFFIX}*"):
        if not any(part in file.name for part in stay):
            file.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


__all__ = [
    "TableContents",
    "inspect",
    "load",
    "new_save_id",
    "read_table",
    "remove_shards",
    "save",
    "sync_folder",
    "write_parquet",
    "write_shards",
]
