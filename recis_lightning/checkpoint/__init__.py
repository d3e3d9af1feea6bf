"""Save, load and inspect tables on any number of ranks, without a Trainer.

Each rank writes its own rows to safetensors files; a commit, written last, names them all. The
commit is ``checkpoint.json`` in the folder, or Lightning's checkpoint where ``CheckpointHook``
writes it: every function here takes either.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recis_lightning.checkpoint.commit import (
    COMMIT_FILE,
    Commit,
    new_save_id,
    remove_files,
)
from recis_lightning.checkpoint.export import read_table, write_parquet
from recis_lightning.checkpoint.load_plan import LoadPlan, plan_load
from recis_lightning.checkpoint.part_filter import PartFilter
from recis_lightning.checkpoint.progress import Progress, progress_bar
from recis_lightning.checkpoint.reader import CheckpointReader
from recis_lightning.checkpoint.save_lock import begin_save, end_save, fail_save, note_replaced
from recis_lightning.checkpoint.saved_tables import TableContents
from recis_lightning.checkpoint.source import Source
from recis_lightning.checkpoint.source_loader import load_sources
from recis_lightning.checkpoint.writer import tables_by_name, write_shards
from recis_lightning.distributed import collectives
from recis_lightning.table.hash_table import HashTable


def save(
    directory: str | os.PathLike[str],
    tables: nn.Module | Iterable[HashTable],
    *,
    exclude: Iterable[str] | None = None,
    progress: Progress = progress_bar,
) -> None:
    """Save tables to a folder; every rank calls it and writes its own rows.

    The checkpoint that the folder holds stays valid until the new one is whole, and goes then, with
    what killed saves left. No other file of the folder is removed, nor a ``checkpoint.json`` that
    is none of ours replaced.

    Args:
        directory: The folder; made if it is not there. All ranks must see the same one.
        tables: A module with tables, or tables of different names.
        exclude: Names or patterns of what to leave out: "user" is a table, "*.exp_avg*" optimizer
            state of all tables. Who loads the rest keeps such a table as it is; state of which a
            part was left out starts afresh.
        progress: Shows the progress of rank 0.

    Raises:
        ValueError: Two tables of one name, or ranks with different tables.
        FileExistsError: The folder has a ``checkpoint.json`` of something else, or a damaged one.
        RuntimeError: Another process or thread saves to the folder; the error names it.
        OSError: The disk is full, or another error of the system; on the other ranks a
            RuntimeError.

    Example:
        >>> import tempfile, torch
        >>> table = HashTable(2, name="user")
        >>> table.insert(torch.tensor([7]), torch.ones(1, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, [table])
        ...     table.clear()
        ...     load(folder, [table])
        >>> table.ids().tolist()
        [7]
    """
    folder, save_id, owner = Path(directory), new_save_id(), object()
    own = collectives.run_on_all_ranks(lambda: tables_by_name(tables))
    parts = collectives.run_on_all_ranks(lambda: PartFilter(exclude, None))
    excluded = parts.excluded(list(own.values()), None)

    def begin() -> None:
        if collectives.rank() == 0:
            _check_replaceable(folder)
            begin_save(folder, save_id, owner, lambda: _commit_in(folder))

    def commit_shards() -> None:
        if collectives.rank() == 0:
            before = _commit_in(folder)
            replaced = set() if before is None else before.files()
            note_replaced(folder, replaced)
            commit.write(folder)
            remove_files(folder, replaced)
            end_save(folder, save_id)  # before any rank returns

    try:
        collectives.run_on_all_ranks(begin)
        commit = write_shards(folder, own.values(), ".", progress, save_id, excluded)
        collectives.run_on_all_ranks(commit_shards)
    except BaseException:
        if collectives.rank() == 0:
            fail_save(folder, save_id, lambda: _commit_in(folder))
        raise


def _commit_in(folder: Path) -> Commit | None:
    file = folder / COMMIT_FILE
    return Commit.read(file) if os.path.lexists(file) else None


def _check_replaceable(folder: Path) -> None:
    """Raise FileExistsError if the folder has a ``checkpoint.json`` that no save of ours wrote."""
    try:
        _commit_in(folder)
    except ValueError as error:
        raise FileExistsError(
            f"directory: {folder / COMMIT_FILE} is no checkpoint of ours, or damaged ({error}), "
            "and is not replaced: save to another folder, or remove it"
        ) from None


def load(
    path: str | os.PathLike[str],
    model: nn.Module | Iterable[HashTable] | None = None,
    *,
    tables: Iterable[str] | nn.Module | Iterable[HashTable] | None = None,
    rename: Mapping[str, str] | None = None,
    optimizer_state: bool = True,
    cast: torch.dtype | str | None = None,
    weights_only: bool = True,
    progress: Progress = progress_bar,
) -> None:
    """Replace the rows of tables by those of a checkpoint: of all tables or of none.

    Every byte is checked before a table changes. Any number of ranks may load what any other
    number saved; each takes the rows that it owns. Until the load has succeeded, memory holds what
    there was and what comes: ``clear()`` the tables first where there is no room for both.

    A load of anything less than all is asked for, and rank 0 prints what it will do first.

    Args:
        path: A folder that ``save`` wrote to, or Lightning's checkpoint file.
        model: A module with tables, or tables, of the names that were saved.
        tables: Names of saved tables to load; the other tables of the model stay as they are. None
            loads all, and the names must be those of the model. (In place of ``model``, what
            ``model`` takes.)
        rename: Names in the model, by the name that was saved.
        optimizer_state: False loads rows alone: their optimizer state and ``num_updates`` start
            afresh, whatever the optimizer.
        cast: Dtype of tables that take rows saved in another one, rounded to it; None refuses them.
        weights_only: As for ``torch.load``, which reads Lightning's file; False runs code that the
            file holds, so only for a file of your own.
        progress: Shows the progress of rank 0.

    Raises:
        ValueError: Another set of tables, another dim, dtype or optimizer, or files that are
            missing, damaged or of another save; a FileNotFoundError too if there is no checkpoint
            at ``path``. On a rank that found nothing wrong while another
            one did, a RuntimeError.

    Example:
        >>> import tempfile
        >>> old, new = HashTable(2, name="customer"), HashTable(2, name="user")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, [old, HashTable(3, name="item")])
        ...     load(folder, [new], tables=["customer"], rename={"customer": "user"})
        ... # doctest: +ELLIPSIS
        Loading 1 of 2 tables of ...:
          user <- customer: 0 rows of dim 2
          not loaded: item
    """
    if model is None:
        model, tables = tables, None  # type: ignore[assignment]
    if model is None:
        raise TypeError("model: expected a module with tables, or tables, got None")
    own = collectives.run_on_all_ranks(lambda: tables_by_name(model))
    reader = collectives.run_on_all_ranks(lambda: CheckpointReader.open(path, weights_only))
    left_out = set(reader.excluded()) - set(reader.names())
    own = {name: table for name, table in own.items() if name not in left_out}

    def plan() -> LoadPlan:
        names = None if tables is None else _names(tables)
        renamed = {} if rename is None else rename
        return plan_load(
            str(reader.path), reader.names(), own, names, renamed, optimizer_state, cast
        )

    planned = collectives.run_on_all_ranks(plan)
    whole = tables is None

    def check_and_tell() -> None:
        reader.check_tables(planned.tables, planned.how, whole)
        part = not whole or rename or not optimizer_state or cast is not None
        if part and collectives.rank() == 0:
            contents = {name: reader.contents(name) for name in reader.names()}
            print(planned.describe(str(reader.path), contents, own))

    collectives.run_on_all_ranks(check_and_tell)
    reader.load(planned.tables, planned.how, progress, whole)


def _names(tables: Any) -> list[str]:
    names: list[Any] = [tables] if isinstance(tables, (str, nn.Module)) else list(tables)
    if isinstance(tables, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"tables: expected a list of names of saved tables, got {tables!r}")
    return names


def inspect(path: str | os.PathLike[str], *, weights_only: bool = True) -> dict[str, TableContents]:
    """Return the contents of a checkpoint by table, without reading their rows.

    Args:
        path: A folder that ``save`` wrote to, or Lightning's checkpoint file.
        weights_only: As for ``torch.load``, which reads Lightning's file; False runs code that the
            file holds, so only for a file of your own.

    Raises:
        ValueError: It is no checkpoint, or a file is missing, torn or of another save; a
            FileNotFoundError too if there is nothing at ``path``.
    """
    reader = CheckpointReader.open(path, weights_only)
    return {name: reader.contents(name) for name in reader.names()}


__all__ = [
    "Source",
    "TableContents",
    "inspect",
    "load",
    "load_sources",
    "read_table",
    "save",
    "write_parquet",
]
