"""Reader of checkpoints: a folder that ``save`` wrote to, or a file of Lightning."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recis_lightning.checkpoint.commit import COMMIT_FILE, COMMIT_KEY, FOLDER_SUFFIX, Commit
from recis_lightning.checkpoint.progress import Progress
from recis_lightning.checkpoint.regular_file import check_regular
from recis_lightning.checkpoint.saved_tables import FitRules, SavedTables, TableContents
from recis_lightning.checkpoint.shard_tables import ShardTables
from recis_lightning.checkpoint.state_tables import StateTables
from recis_lightning.distributed import collectives
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.lock import distinct_locks, write


class NoCheckpointError(FileNotFoundError, ValueError):
    """Error of a path at which there is no checkpoint."""


class CheckpointReader:
    """Tables of one checkpoint, for this rank to read; made by its class methods.

    Args:
        path: The checkpoint, for errors.
        tables: Its tables.
    """

    def __init__(self, path: Path, tables: SavedTables) -> None:
        self.path = path
        self._tables = tables

    @classmethod
    def open(cls, path: str | os.PathLike[str], weights_only: bool = True) -> CheckpointReader:
        """Return the reader of a checkpoint.

        Args:
            path: A folder that ``save`` wrote to, or Lightning's checkpoint file or the folder
                beside it.
            weights_only: As for ``torch.load``, which reads Lightning's file; False runs code that
                the file holds, so only for a file of your own.

        Raises:
            NoCheckpointError: There is none.
            ValueError: It is no checkpoint, or has no tables.
        """
        path = Path(path)
        if path.is_dir():
            if os.path.lexists(path / COMMIT_FILE):
                file = path / COMMIT_FILE
                return cls(path, ShardTables(Commit.read(file), file))
            main = path.with_name(path.name.removesuffix(FOLDER_SUFFIX))
            if main == path or not main.is_file():
                raise NoCheckpointError(f"{path}: no checkpoint: it has no {COMMIT_FILE}")
            path = main
        return cls.of_lightning(path, read_lightning_file(path, weights_only))

    @classmethod
    def of_lightning(cls, file: Path, saved: Mapping[str, Any]) -> CheckpointReader:
        """Return the reader of a file of Lightning, or of a ``state_dict``, that was read.

        Args:
            file: The file.
            saved: Its content.

        Raises:
            ValueError: It has no tables.
        """
        if saved.get(COMMIT_KEY) is not None:
            commit = Commit.from_state(saved[COMMIT_KEY], str(file))
            return cls(file, ShardTables(commit, file))
        tables = StateTables(saved.get("state_dict", saved), file)
        if not tables.names():
            raise ValueError(f"{file}: it holds no tables")
        return cls(file, tables)

    def names(self) -> list[str]:
        """List the tables."""
        return self._tables.names()

    def excluded(self) -> list[str]:
        """List the parts that were left out on purpose: tables, their state, dense tensors."""
        return self._tables.excluded()

    def contents(self, name: str) -> TableContents:
        """Return the size and layout of a table, without reading its rows."""
        return self._tables.contents(name)

    def chunks(self, name: str, num_rows: int) -> Iterator[dict[str, Tensor]]:
        """Read all ranks' rows of a table, about ``num_rows`` at a time, by column."""
        return self._tables.chunks(name, num_rows)

    def pinned(self, name: str) -> Tensor:
        """Read the pinned ids of a table, int64 [n]."""
        return self._tables.pinned(name)

    def check_tables(self, tables: dict[str, HashTable], how: FitRules, whole: bool = True) -> None:
        """Raise ValueError unless these are the saved tables, of the same layout.

        Args:
            tables: Tables to load, by the name of the saved one.
            how: What may differ.
            whole: Whether they must be all tables of the checkpoint.
        """
        saved = set(self.names())
        missing, unknown = set(tables) - saved - set(self.excluded()), saved - set(tables)
        if missing or (whole and unknown):
            raise ValueError(
                f"{self.path}: it holds the tables {sorted(self.names())}, the model has "
                f"{sorted(tables)}: {sorted(missing)} would get no rows, {sorted(unknown)} have no "
                "place"
            )
        for name, table in tables.items():  # in their order, on all ranks
            if name in saved:
                self._tables.check_fit(name, table, how)

    def load(
        self, tables: dict[str, HashTable], how: FitRules, progress: Progress, whole: bool = True
    ) -> None:
        """Replace the rows of tables, of all or of none; all ranks call it together.

        Tables with rows keep them until every byte is checked. Empty ones are filled at once, and
        are empty again if a byte proves damaged. After any exception, all hold what they held. No
        other thread reads or changes the tables meanwhile.

        Args:
            tables: Tables to load, by the name of the saved one.
            how: What may differ.
            progress: Shows the progress of rank 0.
            whole: Whether they must be all tables of the checkpoint.

        Raises:
            ValueError: As for ``check_tables``, or ranks that load different things.
        """
        left_out = set(self.excluded()) - set(self.names())
        tables = {name: table for name, table in tables.items() if name not in left_out}
        collectives.run_on_all_ranks(lambda: self.check_tables(tables, how, whole))
        self._check_alike(tables, how)
        locks = distinct_locks(table.lock for table in tables.values())
        write(locks, self._tables.load, tables, how, progress)

    def _check_alike(self, tables: dict[str, HashTable], how: FitRules) -> None:
        """Raise ValueError unless all ranks load the same: each has a part of every table."""
        targets = {name: table.name for name, table in tables.items()}
        plans = collectives.gather(
            {"path": str(self.path), "save": self._tables.save_id, "tables": targets, "how": how}
        )
        for rank, plan in enumerate(plans):
            different = [key for key in plan if key != "path" and plan[key] != plans[0][key]]
            if different:
                shown = ["path", *different] if "save" in different else different
                first, other = ({key: of[key] for key in shown} for of in (plans[0], plan))
                raise ValueError(
                    f"{self.path}: ranks must load the same; rank 0 loads {first}, rank {rank} "
                    f"{other}"
                )


def read_lightning_file(file: Path, weights_only: bool = True) -> dict[str, Any]:
    """Read a file of Lightning, its tensors memory-mapped; ValueError if it is none."""
    if not os.path.lexists(file):
        raise NoCheckpointError(f"{file}: no such checkpoint")
    check_regular(file)
    try:
        _refuse_compressed(file)
        saved = torch.load(file, map_location="cpu", weights_only=weights_only, mmap=True)
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        # torch's own message advises to load the file without this protection.
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{file}: damaged, or it holds more than tensors and primitives"
            + ("" if found is None else f": an object of {found[1]}")
        ) from None
    except Exception as error:  # whatever a damaged pickle leads to
        reason = error if zipfile.is_zipfile(file) else "torch.save wrote no such file"
        raise ValueError(f"{file}: damaged, or no checkpoint ({reason})") from None
    if not isinstance(saved, dict):
        raise ValueError(f"{file}: no checkpoint: it holds a {type(saved).__name__}")
    return saved


def _refuse_compressed(file: Path) -> None:
    """Raise ValueError if an archive has compressed entries, as bombs have; torch writes none."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it has compressed entries")


__all__ = ["CheckpointReader", "NoCheckpointError", "read_lightning_file"]
