"""Groups of a module's features, made anew when tables have moved or ranks have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from recis_lightning.distributed import collectives
from recis_lightning.lookup import surroundings
from recis_lightning.lookup.features import Feature, FeatureLayout, kind_of
from recis_lightning.lookup.group import LookupGroup
from recis_lightning.lookup.joined import JoinedOutput
from recis_lightning.lookup.local import LocalRows
from recis_lightning.lookup.pooled_rows import PooledShardedRows
from recis_lightning.lookup.sharded import ShardedRows
from recis_lightning.table.hash_table import HashTable


def make_group(features: Sequence[Feature]) -> LookupGroup:
    """Return a group of features: with several ranks, their rows are sharded over these.

    Args:
        features: They must agree on what ``kind_of`` returns, and on the process group.

    Raises:
        RuntimeError: Lightning runs a strategy that tables do not work under.
    """
    layout = FeatureLayout(features)
    if collectives.world_size(layout.process_group) == 1:
        return LookupGroup(layout, LocalRows(layout), surroundings.NoRunner())
    runner = surroundings.runner_of(layout.tables)
    rows = PooledShardedRows(layout) if layout.pools_at_owner else ShardedRows(layout)
    return LookupGroup(layout, rows, runner)


class CurrentGroups:
    """Groups of a module's features; a copy of them, pickled or not, starts empty."""

    def __init__(self) -> None:
        self._groups: list[LookupGroup] = []
        self._joined: JoinedOutput | None = None
        self._recorded: dict[tuple[Feature, ...], CurrentGroups] = {}

    def of(self, features: Callable[[], Iterable[Feature]]) -> list[LookupGroup]:
        """Return the groups as long as they are current, else new ones.

        Args:
            features: Returns the module's features; their order is that of a group's.

        Raises:
            ValueError: Their tables are sharded over several process groups.
        """
        groups = self._groups
        if not groups or not all(group.is_current() for group in groups):
            members: dict[tuple[Any, ...], list[Feature]] = {}
            first: HashTable | None = None
            for feature in features():
                table = feature.table
                first = table if first is None else first
                if table.process_group is not first.process_group:
                    raise ValueError(
                        f"process_group: tables {first.name!r} and {table.name!r} of one module "
                        "are sharded over the ranks of different groups; expected one"
                    )
                kind = kind_of(feature)
                members.setdefault(kind, []).append(feature)
            groups = self._groups = list(map(make_group, members.values()))
        return groups

    def joined(self, names: Iterable[str]) -> JoinedOutput:
        """Return the joined output of the groups that ``of`` returned last.

        Args:
            names: All features, in the order of their columns; the same in every call.
        """
        if self._joined is None or self._joined.groups is not self._groups:
            self._joined = JoinedOutput(self._groups, list(names))
        return self._joined

    def recorded(self, features: tuple[Feature, ...]) -> CurrentGroups:
        """Return the groups of features that a recorded program looks up, made at its first run."""
        return self._recorded.setdefault(features, CurrentGroups())

    def __reduce__(self) -> tuple[Any, ...]:
        return CurrentGroups, ()


__all__ = ["CurrentGroups", "make_group"]
