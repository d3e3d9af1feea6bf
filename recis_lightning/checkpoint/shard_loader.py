"""Loader of table states that this rank needs a part of, for ``module.load_state_dict``."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from recis_lightning.checkpoint.commit import Commit
from recis_lightning.checkpoint.loading_file import loading_file
from recis_lightning.checkpoint.progress import progress_bar
from recis_lightning.checkpoint.saved_tables import FitRules
from recis_lightning.checkpoint.shard_tables import ShardTables
from recis_lightning.distributed import collectives
from recis_lightning.distributed.ownership import owner_of
from recis_lightning.table import state as table_state
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.state_schema import check_state


class ShardLoader:
    """Loader of states that refer to shard files, or hold the rows of all ranks.

    ``CheckpointHook`` loads all tables at once, before Lightning hands each its state, which refers
    to the same commit: ``note_loaded`` lets these tables keep their rows, each for one state. The
    commit is recognised as an object, not by its content: after the file is read once more it is
    another object, and is checked and loaded again. Without the hook, all files of a commit are
    checked when the first of its tables is loaded, so that a damaged one changes no table.
    """

    def __init__(self) -> None:
        self._checked: Any = None  # commit, as the states refer to it, whose files are checked
        self._loaded: weakref.WeakSet[HashTable] = weakref.WeakSet()  # tables that have its rows

    def note_loaded(self, commit: Any, tables: Iterable[HashTable]) -> None:
        """Let tables keep their rows when they are given the state of a checkpoint.

        Args:
            commit: The very object that the states refer to.
            tables: Tables that were loaded from it.
        """
        self._checked, self._loaded = commit, weakref.WeakSet(tables)

    def load(self, table: HashTable, state: dict[str, Any]) -> None:
        """Replace the rows of a table by this rank's part of a state.

        Raises:
            ValueError: The state is of another kind of table, or a file is missing or damaged.
        """
        if table_state.REFERENCE in state:
            self._load_shards(table, state.get("name"), state[table_state.REFERENCE])
            return
        check_state(state, table.name, table.embedding_dim)
        rank, world_size = collectives.rank(), collectives.world_size()
        table_state.load(table, _owned_part(state, rank, world_size))

    def _load_shards(self, table: HashTable, name: Any, commit: Any) -> None:
        if commit is self._checked and table in self._loaded:
            self._loaded.remove(table)
            return
        shards = ShardTables(Commit.from_state(commit, "checkpoint"), loading_file())
        if name not in shards.names() and name in shards.excluded():
            return  # left out on purpose: the table stays as it is
        if name not in shards.names():
            raise ValueError(
                f"state of table {table.name!r}: the checkpoint has no table {name!r}, it has "
                f"{shards.names()}"
            )
        shards.check_fit(name, table, FitRules(strict=False))
        if commit is not self._checked:
            shards.check(progress_bar)
            self.note_loaded(commit, ())
        shards.load_table(name, table, progress_bar)


def _owned_part(state: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """Return the part of a whole state that a rank owns."""
    keyed_by = table_state.KEYED_BY
    owned: dict[str, Tensor] = {
        ids: (owner_of(state[ids], world_size) == rank).nonzero().squeeze(1)
        for ids in set(keyed_by.values())
        if ids in state
    }
    rows = owned["ids"]
    part = {
        key: value[owned[keyed_by[key]]] if key in keyed_by else value
        for key, value in state.items()
    }
    part["weights"] = state["weights"][rows]
    part["slots"] = {name: slot[rows] for name, slot in state["slots"].items()}
    return part


SHARD_LOADER = ShardLoader()

__all__ = ["SHARD_LOADER", "ShardLoader"]
