"""Ledger of the training lookups that may still get gradients: the same on every rank.

A rank's loss may use any of its outputs, in any number of backward passes and any order. So
gradients stay where a backward pass leaves them, and the ledger keeps the way to the owners of each
lookup, in the order of the lookups, until no rank can have a gradient for it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recis_lightning.distributed.process_group import ProcessGroup, kept_of
from recis_lightning.lookup.exchange import Route
from recis_lightning.lookup.held_gradients import expected_references
from recis_lightning.lookup.room import note_lookup
from recis_lightning.lookup.row_source import OutputGradients
from recis_lightning.ops import layout as fields
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.pending_gradient import PendingGradient

# For maps over hundreds of tables.
_pending, _generation, _num_rooms = map(attrgetter, ("pending", "generation", "num_rooms"))


class UnsentGradient(NamedTuple):
    """Gradients that a backward pass left for rows of other ranks.

    Attributes:
        fetched: The lookup's ``FetchedShardedRows``.
        gradients: Of its outputs.
    """

    fetched: Any
    gradients: OutputGradients


class LedgerEntry:
    """Lookup that may still get gradients.

    Args:
        number: How many were before it.
        route: Way to the owners.
        fetched: The ``FetchedShardedRows`` by which this rank's graph and gradients know it.
    """

    def __init__(self, number: int, route: Route, fetched: Any) -> None:
        self.number, self.route = number, route
        self._fetched = weakref.ref(fetched)
        self._generations = list(map(_generation, route.layout.storages))
        self._num_rooms: list[int] | None = None  # when gradients came that keep their rows
        note_lookup(route.layout, self)

    def is_alive(self) -> bool:
        """Return whether this rank may have a gradient for it, now or later."""
        return self._fetched() is not None

    def is_stale(self) -> bool:
        """Return whether a table lost rows here since."""
        layout = self.route.layout
        if self._num_rooms not in (None, list(map(_num_rooms, layout.storages))):
            return True
        if layout.is_current():  # no table has another storage
            return list(map(_generation, layout.storages)) != self._generations
        return any(map(self._has_lost_rows, range(len(layout.tables))))

    def stale_tables(self) -> list[int]:
        """Return which tables, by position, lost rows here since."""
        storages, rooms = self.route.layout.storages, self._num_rooms
        return [
            position
            for position, storage in enumerate(storages)
            if self._has_lost_rows(position)
            or (rooms is not None and rooms[position] != storage.num_rooms)
        ]

    def _has_lost_rows(self, position: int) -> bool:
        layout = self.route.layout
        storage = layout.storages[position]
        is_moved = layout.tables[position].storage is not storage
        return is_moved or storage.generation != self._generations[position]

    def note_received(self) -> None:
        """Note that gradients of it are pending with their tables."""
        self._num_rooms = list(map(_num_rooms, self.route.layout.storages))

    def rows_in_use(self, table: HashTable) -> Iterator[Tensor]:
        """Yield rows of a table's shard that a gradient may still come for, int64 [n] each."""
        layout, owned = self.route.layout, self.route.owned
        if self._num_rooms is not None or self._has_lost_rows(layout.tables.index(table)):
            return
        for owner, line in zip(owned.part_tables, owned.plan, strict=True):
            if owner is table:
                first = int(line[fields.PLAN_FIRST_ID])
                yield owned.rows[first : first + int(line[fields.PLAN_NUM_IDS])]

    def unsent(self) -> dict[PendingGradient, set[HashTable]]:
        """Return this rank's gradients for it that have not travelled, and for which tables."""
        fetched = self._fetched()
        found: dict[PendingGradient, set[HashTable]] = {}
        if fetched is None:
            return found
        tables = self.route.layout.tables
        for table in compress(tables, map(_pending, tables)):
            for record in table.pending:
                unsent = record.unsent
                if isinstance(unsent, UnsentGradient) and unsent.fetched is fetched:
                    found.setdefault(record, set()).add(table)
        return found


class GradientLedger:
    """Training lookups of one process group that may still get gradients.

    Attributes:
        entries: In the order of the lookups; ranks drop them together.
        num_lookups: How many there were.
    """

    def __init__(self) -> None:
        self.entries: list[LedgerEntry] = []
        self.num_lookups = 0
        self._num_backward = _backward_passes.count

    @property
    def ran_backward(self) -> bool:
        """Whether this rank ran a backward pass, of whatever loss, since gradients travelled."""
        return _backward_passes.count > self._num_backward

    def note_sent(self) -> None:
        """Note that gradients travelled."""
        self._num_backward = _backward_passes.count

    def add(self, route: Route, fetched: Any) -> None:
        """Add a lookup, which all ranks have made."""
        self.entries.append(LedgerEntry(self.num_lookups, route, fetched))
        self.num_lookups += 1

    def oldest(self) -> int:
        """Return the number of the oldest lookup that this rank may have gradients for."""
        alive = (entry.number for entry in self.entries if entry.is_alive())
        return next(alive, self.num_lookups)

    def drop_before(self, number: int) -> None:
        """Drop the lookups before one, for which no rank has gradients."""
        entries = self.entries
        if entries and entries[0].number < number:
            self.entries = [entry for entry in entries if entry.number >= number]

    def keep(self, are_kept: Sequence[bool]) -> None:
        """Drop the entries for which no rank has gradients."""
        self.entries = [e for e, kept in zip(self.entries, are_kept, strict=True) if kept]

    def has(self, tables: Sequence[Any]) -> bool:
        """Return whether a lookup of one of ``tables`` may get gradients: the same on all ranks."""
        wanted = set(tables)
        return any(not wanted.isdisjoint(entry.route.layout.tables) for entry in self.entries)


def stack_bits(*lists: Sequence[bool], size: int) -> Any:
    """Return bits as numbers, int64 [size] for each list one after the other."""
    bits = np.zeros((len(lists), size, BITS), np.int64)
    for line, flags in zip(bits.reshape(len(lists), -1), lists, strict=True):
        line[: len(flags)] = flags
    return (bits << np.arange(BITS)).sum(-1).reshape(-1)


def split_bits(numbers: Any, num_lists: int, num_flags: int) -> Any:
    """Return bool [num_ranks, num_lists, num_flags] of a line of ``stack_bits`` for each rank."""
    lists = numbers.reshape(len(numbers), num_lists, -1)[:, :, : -(-num_flags // BITS)]
    bits = (lists[..., None] >> np.arange(BITS)) & 1
    return bits.reshape(len(numbers), num_lists, -1)[:, :, :num_flags].astype(bool)


BITS = 56
"""Bits of a number of ``stack_bits``."""


class _BackwardPasses:
    """Number of backward passes that this process ran."""

    def __init__(self) -> None:
        self.count = 0


_backward_passes = _BackwardPasses()
_ledgers: weakref.WeakKeyDictionary[Any, GradientLedger] = weakref.WeakKeyDictionary()


def ledger_of(process_group: ProcessGroup | None) -> GradientLedger:
    """Return the ledger of a process group that is there; it goes with the group.

    Args:
        process_group: The group; None means all ranks.
    """
    return kept_of(process_group, _ledgers, GradientLedger)


_after_backward: list[Callable[[], None]] = []


def call_after_backward(call: Callable[[], None]) -> None:
    """Have a function called when a backward pass has ended, once passes are counted."""
    _after_backward.append(call)


def count_backward_passes() -> None:
    """From now on, let ledgers know of every backward pass.

    One whose loss uses no table is one as well, and a rank that runs none forgot it.
    """
    expected_references()  # it runs one, once
    original = torch.autograd.backward
    if getattr(original, "tells_ledger", False):
        return

    @functools.wraps(original)
    def backward(*args: Any, **kwargs: Any) -> None:
        _backward_passes.count += 1
        original(*args, **kwargs)
        if torch._C._current_graph_task_id() == -1:  # not within another one
            for call in _after_backward:
                call()

    backward.tells_ledger = True  # type: ignore[attr-defined]
    torch.autograd.backward = backward


__all__ = [
    "BITS",
    "GradientLedger",
    "LedgerEntry",
    "UnsentGradient",
    "call_after_backward",
    "count_backward_passes",
    "ledger_of",
    "split_bits",
    "stack_bits",
]
