"""A checkpoint that was found: which tables it holds, and how a rank takes up its rows."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recis_lightning.checkpoint.progress import Progress, no_progress, progress_bar
from recis_lightning.checkpoint.table_shards import Commit, TableShards
from recis_lightning.distributed import collectives
from recis_lightning.distributed.ownership import owner_of
from recis_lightning.table import state as table_state
from recis_lightning.table.hash_table import HashTable

COMMIT_FILE = "checkpoint.json"
KEY = "recis_lightning"  # of the commit in Lightning's checkpoint
FOLDER_SUFFIX = ".tables"  # of the folder beside it


class Source:
    """A checkpoint that was found, and how its tables are read by this rank.

    Args:
        path: A folder that ``save`` wrote to, or Lightning's checkpoint file.
        weights_only: As for ``torch.load``, which reads Lightning's file.

    Raises:
        ValueError: It is no checkpoint, or has no tables.
    """

    def __init__(self, path: str | os.PathLike[str], weights_only: bool = True) -> None:
        self.path = Path(path)
        self.shards: TableShards | None = None
        self.states: dict[str, dict[str, Any]] = {}
        if self.path.is_dir():
            main = self.path.with_name(self.path.name.removesuffix(FOLDER_SUFFIX))
            if (self.path / COMMIT_FILE).exists():
                self._open(_read_json(self.path / COMMIT_FILE), self.path / COMMIT_FILE)
                return
            if main == self.path or not main.is_file():
                raise ValueError(f"{self.path}: no checkpoint: it has no {COMMIT_FILE}")
            self.path = main
        saved = _read_main(self.path, weights_only)
        if saved.get(KEY) is not None:
            self._open(saved[KEY], self.path)
            return
        for key, state in saved.get("state_dict", saved).items():
            if key.endswith("_extra_state") and isinstance(state, dict) and "ids" in state:
                place = key.removesuffix("._extra_state").removesuffix(".table")
                self.states[state.get("name") or place or "table"] = state
        if not self.states:
            raise ValueError(f"{self.path}: it holds no tables")

    @classmethod
    def of_commit(cls, file: Path, state: Any) -> Source:
        """Return the source that a commit is, which ``file`` holds."""
        source = cls.__new__(cls)
        source.path, source.states = file, {}
        source._open(state, file)
        return source

    def _open(self, state: Any, file: Path) -> None:
        commit = Commit.from_state(state, str(self.path))
        self.shards = TableShards(
            commit, find_folder(commit, file), collectives.rank(), collectives.world_size()
        )

    def names(self) -> list[str]:
        """List the tables."""
        return list(self.states if self.shards is None else self.shards.commit.tables)

    def check_tables(self, own: dict[str, HashTable], strict: bool) -> None:
        """Raise ValueError unless these are the tables that were saved, of the same layout."""
        missing, unknown = set(own) - set(self.names()), set(self.names()) - set(own)
        if missing or unknown:
            raise ValueError(
                f"{self.path}: it holds the tables {sorted(self.names())}, the model has "
                f"{sorted(own)}: {sorted(missing)} would get no rows, {sorted(unknown)} have no "
                "place"
            )
        for name, table in own.items():
            if self.shards is None:
                table_state.check_state(self.states[name], name, table.embedding_dim)
            else:
                self.shards.check_fit(name, table, strict)

    def load(self, own: dict[str, HashTable], strict: bool, progress: Progress) -> None:
        """Let tables take up their rows, all or none; all ranks call it together.

        Where a table holds something already, every byte is checked before one changes. Empty
        ones are filled at once, and emptied again if a byte proves wrong.
        """
        collectives.run_on_all_ranks(lambda: self.check_tables(own, strict))
        if self.shards is None:
            for name, table in own.items():
                table.set_extra_state(self.states[name])
            return
        shards = self.shards
        fresh = not any(len(table) or table.step or table.num_updates for table in own.values())
        if not all(collectives.gather(fresh)):
            collectives.run_on_all_ranks(lambda: check(shards, progress))
        before = {table: table_state.settings(table) for table in own.values()}

        def restore() -> None:
            with shown(progress)("Loading tables", shards.num_bytes()) as advance:
                for name, table in own.items():
                    shards.restore(name, table, advance)

        try:
            collectives.run_on_all_ranks(restore)
        except BaseException:
            for table, settings in before.items():
                table_state.reset(table, settings)
            raise

    def pieces(self, name: str, num_rows: int) -> Iterator[dict[str, Tensor]]:
        """Read all ranks' rows of a table, checked, about ``num_rows`` at a time.

        Yields:
            By name, what belongs to a row: ids, weights, slots and policies' columns; at least
            once, if only to tell which these are.
        """
        if self.shards is not None:
            yield from self.shards.pieces(name, num_rows)
            return
        state = self.states[name]
        columns = {key: state[key] for key in table_state.row_columns(state)}
        yield {**columns, "weights": state["weights"], **state["slots"]}


def find_folder(commit: Commit, file: Path | None) -> Path:
    """Return where a commit's shards are: beside the file that holds it, or where they were.

    Args:
        commit: What names them.
        file: The file that holds the commit, or a link to it; None if nobody knows.
    """
    beside = () if file is None else (file.parent, file.resolve().parent)
    places = [*(parent / commit.folder for parent in beside), Path(commit.location)]
    for place in places:
        if place.is_dir():
            return place
    raise ValueError(
        f"{places[0]}: this folder with the rows of the checkpoint's tables is missing; if it was "
        "moved with the checkpoint, resume with CheckpointHook, or call "
        "recis_lightning.checkpoint.load(checkpoint, model)"
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        raise ValueError(f"{path}: damaged") from None


def _read_main(path: Path, weights_only: bool) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: not read with weights_only=True; if you trust the file, give "
            f"weights_only=False ({error})"
        ) from None
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path}: damaged, or no checkpoint ({error})") from None
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: no checkpoint: it holds a {type(saved).__name__}")
    return saved


def shown(progress: Progress) -> Progress:
    """Return what shows progress on rank 0, and nothing elsewhere."""
    return progress if collectives.rank() == 0 else no_progress


# ---- states that module.load_state_dict meets


class _Known:
    """What was done last with a commit, by identity: one that is read again is another."""

    state: Any = None  # checked
    tables: frozenset[HashTable] = frozenset()  # have taken up their rows of it


def check(shards: TableShards, progress: Progress) -> None:
    """Read this rank's share of the files, and raise ValueError if a byte is wrong."""
    with shown(progress)("Checking tables", shards.num_bytes()) as advance:
        shards.check(advance)


def note_loaded(state: Any, tables: Iterable[HashTable]) -> None:
    """Let ``module.load_state_dict`` pass over tables that have taken up their rows already.

    Args:
        state: The commit, the very object that the tables' states refer to.
        tables: These tables.
    """
    _Known.state, _Known.tables = state, frozenset(tables)


def _take_up(table: HashTable, state: dict[str, Any]) -> None:
    """Let a table take up this rank's part of what a checkpoint says of it."""
    if table_state.REFERENCE in state:
        known = state[table_state.REFERENCE]
        if known is _Known.state and table in _Known.tables:
            _Known.tables -= {table}
            return
        commit = Commit.from_state(known, "checkpoint")
        shards = TableShards(
            commit, find_folder(commit, None), collectives.rank(), collectives.world_size()
        )
        shards.check_fit(state["name"], table)
        if known is not _Known.state:
            check(shards, progress_bar)
            note_loaded(known, ())
        with shown(progress_bar)(f"Loading {state['name']}", shards.num_bytes()) as advance:
            shards.restore(state["name"], table, advance)
        return
    rank, world_size = collectives.rank(), collectives.world_size()
    table_state.check_state(state, table.name, table.embedding_dim)
    mine = {
        key: (owner_of(state[key], world_size) == rank).nonzero().squeeze(1)
        for key in set(table_state.KEYED_BY.values())
        if key in state
    }
    rows = mine["ids"]
    part = {
        key: value[mine[table_state.KEYED_BY[key]]] if key in table_state.KEYED_BY else value
        for key, value in state.items()
    }
    part["weights"] = state["weights"][rows]
    part["slots"] = {name: slot[rows] for name, slot in state["slots"].items()}
    table_state.load(table, part)


table_state.set_shard_loader(_take_up)

__all__ = [
    "COMMIT_FILE",
    "FOLDER_SUFFIX",
    "KEY",
    "Source",
    "find_folder",
    "note_loaded",
    "shown",
]
