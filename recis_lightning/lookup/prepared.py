"""Lookups whose ids were deduplicated and sent to their owners ahead of time.

Only what no table has a part in is done ahead: an id's owner, its position among the distinct ids,
and the messages with numbers of ids and with ids. A lookup uses it if it is given the same ids, by
value, on all ranks. Otherwise it does all of that itself, and what came ahead is dropped.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from recis_lightning.distributed.ahead_channel import AheadChannel, Begun, channel_of
from recis_lightning.distributed.joined_messages import exchange_messages
from recis_lightning.distributed.process_group import ProcessGroup, kept_of
from recis_lightning.jagged import FeatureBags
from recis_lightning.lookup.agreement import (
    agree_ahead,
    agree_on_prepared,
    describe,
    lookup_digest,
)
from recis_lightning.lookup.batch import Batch, join_occurrences
from recis_lightning.lookup.features import FeatureLayout, listed
from recis_lightning.lookup.row_source import PreparedIds
from recis_lightning.ops import backend

_MOST_KEPT = 8  # lookups of the same tables that nobody has come for


class Group(Protocol):
    """Group of features, as ``LookupGroup``."""

    layout: FeatureLayout
    rows: Any  # ``ShardedRows``
    process_group: ProcessGroup | None
    num_ranks: int


class _Part(NamedTuple):
    """Copy of what a group will look up.

    Attributes:
        sizes: n of each feature.
        ids: int64 [n], those of all features, one after the other.
        occurrences: int64 [n], how many occurrences each stands for; None means 1.
        is_counted: Whether it matters to the tables how often each id occurs.
    """

    sizes: list[int]
    ids: Tensor
    occurrences: Tensor | None
    is_counted: bool

    def equals(self, other: _Part) -> bool:
        """Return whether both are the same, by value."""
        mine, its = self.occurrences, other.occurrences
        if self.sizes != other.sizes or self.is_counted != other.is_counted:
            return False
        if mine is None or its is None:
            return mine is its and torch.equal(self.ids, other.ids)
        return torch.equal(self.ids, other.ids) and torch.equal(mine, its)


def _counts_occurrences(groups: Sequence[Group]) -> list[bool]:
    return [group.layout.counts_occurrences for group in groups]


def _occurrences_of(group: Group, bags: FeatureBags) -> Tensor | None:
    given = bags.occurrences
    return join_occurrences(bags, given, group.layout.device) if given else None


@dataclass(eq=False)
class _Kept:
    """Lookup that was begun, and what it is of."""

    groups: Sequence[Group]
    parts: Sequence[_Part]
    begun: Begun


class PreparedLookups:
    """Lookups of one process group that were begun ahead, and that nobody has come for.

    Attributes:
        num_used: How many used what came ahead.
    """

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self.num_used = 0

    def begin(self, groups: Sequence[Group], bags: Sequence[FeatureBags]) -> bool:
        """Begin a training lookup; return whether its ids are on their way.

        Args:
            groups: What is looked up; sharded, on the CPU.
            bags: For each group, those of its features, on the CPU; they are copied.
        """
        channel = channel_of(groups[0].process_group)
        if not channel.is_open:
            channel.begin_none()  # it asks for it to be opened
            return False
        parts = [
            _Part(of.sizes, torch.cat(of.ids), _occurrences_of(group, of), counts)
            for group, of, counts in zip(groups, bags, _counts_occurrences(groups), strict=True)
        ]
        told, text = lookup_digest(groups, training=True), describe(groups, training=True)
        names = listed([table.name for group in groups for table in group.layout.tables])
        sources = [(group.rows, part) for group, part in zip(groups, parts, strict=True)]

        def work(carrier: ProcessGroup) -> list[PreparedIds]:
            doing: Callable[[], str] = lambda: f"{text}, ahead"  # noqa: E731
            with backend.region("recis::look_ahead"):
                asked = [
                    source.ask(part.ids.split(part.sizes), part.occurrences)
                    for source, part in sources
                ]
                counts = [next(steps) for _, steps in asked]
                come = agree_ahead(groups, told, doing, carrier, counts)
                messages = [steps.send(of) for (_, steps), of in zip(asked, come, strict=True)]
                ids = exchange_messages(messages, lambda: f"looks up tables {names}", carrier)
            return [
                PreparedIds(deduplicated, of, received)
                for (deduplicated, _), of, received in zip(asked, come, ids, strict=True)
            ]

        begun = channel.begin(work)
        assert begun is not None
        self._kept.append(_Kept(groups, parts, begun))
        mine = self._of(groups)
        if len(mine) > _MOST_KEPT:
            self._kept.remove(mine[0])
        return True

    def claim(self, groups: Sequence[Group], batches: Sequence[Batch]) -> list[PreparedIds] | None:
        """Return what came ahead for a training lookup, if it did on all ranks.

        Args:
            groups: What is looked up.
            batches: For each group, what it looks up.

        Raises:
            RuntimeError: Another rank does something else, or has gone; says which.
        """
        fitting = self._fitting(groups, batches)
        if not fitting:
            return None
        number = agree_on_prepared(groups, list(fitting))
        if not number:
            return None
        self.num_used += 1
        prepared: list[PreparedIds] = fitting[number].wait(
            lambda: describe(groups, training=True), groups[0].process_group
        )
        before = [k for k in self._of(groups) if k.begun.number <= number]
        self._kept = [kept for kept in self._kept if kept not in before]
        return prepared

    def _of(self, groups: Sequence[Group]) -> list[_Kept]:
        """Return what was begun for some groups."""
        wanted = list(map(id, groups))
        return [kept for kept in self._kept if list(map(id, kept.groups)) == wanted]

    def _fitting(self, groups: Sequence[Group], batches: Sequence[Batch]) -> dict[int, Begun]:
        """Return the exchanges of what is looked up, by number; several of equal batches."""
        mine = [kept for kept in self._of(groups) if not kept.begun.has_failed()]
        if not mine:
            return {}
        asked = [
            _Part(batch.bags.sizes, torch.cat(batch.bags.ids), batch.occurrences, counts)
            for batch, counts in zip(batches, _counts_occurrences(groups), strict=True)
        ]
        return {
            kept.begun.number: kept.begun
            for kept in mine
            if all(map(_Part.equals, kept.parts, asked))
        }


def can_prepare(groups: Sequence[Group], bags: Sequence[FeatureBags]) -> bool:
    """Return whether a lookup's ids can be exchanged ahead: of sharded tables on the CPU."""
    return all(
        group.num_ranks > 1
        and group.rows.can_prepare
        and group.layout.device.type == "cpu"
        and not backend.is_async(group.layout.device)
        and all(ids.is_cpu for ids in of.ids)
        for group, of in zip(groups, bags, strict=True)
    )


def refuse_to_prepare(process_group: ProcessGroup | None) -> None:
    """Begin an empty exchange in the place of a lookup that this rank cannot read."""
    channel: AheadChannel = channel_of(process_group)
    channel.begin_none()


_prepared: weakref.WeakKeyDictionary[Any, PreparedLookups] = weakref.WeakKeyDictionary()


def prepared_of(process_group: ProcessGroup | None) -> PreparedLookups:
    """Return the lookups that were begun ahead in a process group that is there.

    Args:
        process_group: The group; None means all ranks.
    """
    return kept_of(process_group, _prepared, PreparedLookups)


__all__ = [
    "PreparedIds",
    "PreparedLookups",
    "can_prepare",
    "prepared_of",
    "refuse_to_prepare",
]
