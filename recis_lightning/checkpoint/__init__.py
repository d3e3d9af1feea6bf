"""Save, load and inspect tables on any number of ranks, without a Trainer.

Each rank writes its own rows to safetensors files; a commit, written last, names them all. The
commit is ``checkpoint.json`` in the folder, or Lightning's checkpoint where ``CheckpointHook``
writes it: every function here takes either.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from recis_lightning.checkpoint.commit import COMMIT_FILE, Commit, new_save_id, remove_files
from recis_lightning.checkpoint.export import read_table, write_parquet
from recis_lightning.checkpoint.progress import Progress, progress_bar
from recis_lightning.checkpoint.reader import CheckpointReader
from recis_lightning.checkpoint.save_lock import begin_save, end_save, note_replaced
from recis_lightning.checkpoint.saved_tables import TableContents
from recis_lightning.checkpoint.writer import tables_by_name, write_shards
from recis_lightning.distributed import collectives
from recis_lightning.table.hash_table import HashTable


def save(
    directory: str | os.PathLike[str],
    tables: nn.Module | Iterable[HashTable],
    *,
    progress: Progress = progress_bar,
) -> None:
    """Save tables to a folder; every rank calls it and writes its own rows.

    The checkpoint that the folder holds stays valid until the new one is whole, and goes then, with
    what killed saves left. No other file of the folder is removed.

    Args:
        directory: The folder; made if it is not there. All ranks must see the same one.
        tables: A module with tables, or tables of different names.
        progress: Shows the progress of rank 0.

    Raises:
        ValueError: Two tables of one name, or ranks with different tables.
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

    def begin() -> None:
        if collectives.rank() == 0:
            begin_save(folder, save_id, owner, lambda: _commit_in(folder))

    def commit_shards() -> None:
        if collectives.rank() == 0:
            replaced = _files_to_replace(folder)
            note_replaced(folder, replaced)
            commit.write(folder)
            remove_files(folder, replaced)

    collectives.run_on_all_ranks(begin)
    try:
        commit = write_shards(folder, own.values(), ".", progress, save_id)
        collectives.run_on_all_ranks(commit_shards)
    finally:
        if collectives.rank() == 0:
            end_save(folder, save_id)


def _commit_in(folder: Path) -> Commit | None:
    file = folder / COMMIT_FILE
    return Commit.read(file) if os.path.lexists(file) else None


def _files_to_replace(folder: Path) -> set[str]:
    try:
        commit = _commit_in(folder)
    except ValueError:  # what it named is not known
        return set()
    return set() if commit is None else commit.files()


def load(
    path: str | os.PathLike[str],
    tables: nn.Module | Iterable[HashTable],
    *,
    weights_only: bool = True,
    progress: Progress = progress_bar,
) -> None:
    """Replace the rows of tables by those of a checkpoint: of all tables or of none.

    Every byte is checked before a table changes. Any number of ranks may load what any other
    number saved; each takes the rows that it owns.

    Args:
        path: A folder that ``save`` wrote to, or Lightning's checkpoint file.
        tables: A module with tables, or tables, of the names that were saved.
        weights_only: As for ``torch.load``, which reads Lightning's file; False runs code that the
            file holds, so only for a file of your own.
        progress: Shows the progress of rank 0.

    Raises:
        ValueError: Another set of tables, another dim, dtype or optimizer, or files that are
            missing, damaged or of another save; on a rank that found nothing wrong while another
            one did, a RuntimeError.
    """
    own = collectives.run_on_all_ranks(lambda: tables_by_name(tables))
    reader = collectives.run_on_all_ranks(lambda: CheckpointReader.open(path, weights_only))
    reader.load(own, strict=True, progress=progress)


def inspect(path: str | os.PathLike[str], *, weights_only: bool = True) -> dict[str, TableContents]:
    """Return the contents of a checkpoint by table, without reading their rows.

    Args:
        path: A folder that ``save`` wrote to, or Lightning's checkpoint file.
        weights_only: As for ``torch.load``, which reads Lightning's file; False runs code that the
            file holds, so only for a file of your own.

    Raises:
        ValueError: It is no checkpoint, or a file is missing, torn or of another save.
    """
    reader = CheckpointReader.open(path, weights_only)
    return {name: reader.contents(name) for name in reader.names()}


__all__ = ["TableContents", "inspect", "load", "read_table", "save", "write_parquet"]
