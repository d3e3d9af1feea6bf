"""Eviction of a table's rows, and counts of admitted, evicted and re-admitted ids."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from recis_lightning.arguments import check_kinds
from recis_lightning.distributed import collectives
from recis_lightning.distributed.process_group import ProcessGroup
from recis_lightning.eviction_policy import (
    COLUMNS,
    KEPT_COLUMNS,
    Eviction,
    RowColumns,
    RowLimit,
)
from recis_lightning.ops import embedding_bag, hash_index
from recis_lightning.ops.layout import NUM_IDS, NUM_REJECTED
from recis_lightning.row_ranking import count_marked
from recis_lightning.table.clock import TableClock
from recis_lightning.table.pending_gradient import PendingGradient
from recis_lightning.table.statistics import ReadmissionTracker, TableStatistics
from recis_lightning.table.storage import Storage
from recis_lightning.table.undo import Undo
from recis_lightning.table.versions import layout_version

_CHUNK_ROWS = 1 << 16  # rows whose norms are taken at once


class EvictionReport(int):
    """Number of rows that an eviction removed, or would; an int that can tell more.

    Attributes:
        by_policy: How many rows each policy of a composition named, by its ``repr``.
        bytes_freed: Bytes of these rows: weights, optimizer state and columns. They are there for
            new rows, or given back.
        bytes_returned: What ``nbytes`` fell by; 0 in a dry run.
        dry_run: Whether the rows are still there.
    """

    by_policy: dict[str, int]
    bytes_freed: int
    bytes_returned: int
    dry_run: bool

    @classmethod
    def of(
        cls,
        num_rows: int,
        by_policy: dict[str, int],
        bytes_freed: int,
        bytes_returned: int,
        dry_run: bool,
    ) -> EvictionReport:
        """Return a report of ``num_rows``, with its attributes."""
        report = cls(num_rows)
        report.by_policy, report.dry_run = by_policy, dry_run
        report.bytes_freed, report.bytes_returned = bytes_freed, bytes_returned
        return report

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"EvictionReport({int(self)} rows, {shown})"


class Evicted(NamedTuple):
    """Rows about to be evicted, as an ``on_evict`` callback gets them.

    Attributes:
        table: The table's name.
        ids: int64 [n], by row.
        weights: [n, embedding_dim] in the table's dtype, if rows were asked for.
        slots: Optimizer state, name -> float32 [n, words], if rows were asked for.
    """

    table: str
    ids: Tensor
    weights: Tensor | None
    slots: dict[str, Tensor] | None


_LONGEST_PAUSE = 15  # evictions between compactions


class _Listener(NamedTuple):
    callback: Callable[[Evicted], None]
    with_rows: bool


def kept_columns(policy: Eviction | None) -> tuple[str, ...]:
    """Return the columns that a table has to keep for a policy.

    Raises:
        ValueError: The policy asks for a column that does not exist.
    """
    wanted = frozenset() if policy is None else policy.columns
    if unknown := wanted - set(COLUMNS):
        raise ValueError(f"eviction: columns are {COLUMNS}, got {sorted(unknown)}")
    return tuple(name for name in KEPT_COLUMNS if name in wanted)


def clock_of(policy: Eviction | None) -> TableClock:
    """Return the clock by which a policy ages rows."""
    return TableClock(*((None, None) if policy is None else (policy.time_source, policy.max_jump)))


class CompactionSchedule:
    """Evictions after which a table gives memory back.

    At once where half of it is not needed. But where rows come and go, every eviction finds that,
    and the next lookups take the memory again: so the sooner a compaction follows the last one, the
    more evictions pass before the next, up to 15. Where an eighth is enough, none pass.

    Attributes:
        is_owed: Whether half was not needed at the last eviction, and there was no compaction.
    """

    def __init__(self) -> None:
        self.is_owed = False
        self._num_evictions = 0  # since the last compaction
        self._pause = 0

    def is_due(self, needed: int, held: int, may_move: bool = True) -> bool:
        """Count an eviction; return whether to compact after it.

        Args:
            needed: Blocks that the rows need.
            held: Blocks that they have.
            may_move: Whether rows may get other numbers now.
        """
        self._num_evictions += 1
        self.is_owed = 2 * needed <= held > 0
        is_paused = self._num_evictions <= self._pause and 8 * needed > held
        if not self.is_owed or is_paused or not may_move:
            return False
        is_soon = self._num_evictions <= _LONGEST_PAUSE + 1
        self._pause = min(2 * self._pause + 1, _LONGEST_PAUSE) if is_soon else 0
        self._num_evictions, self.is_owed = 0, False
        return True


class Evictor:
    """Eviction of one table, and its statistics.

    Args:
        policy: Which rows ``evict`` removes; None none.
        storage: Where the rows are.
        pending: The table's pending gradients, the list itself: their rows stay.

    Attributes:
        storage: As given; a table that moves to another device replaces it.
        pinned: int64 [n], the ids that are never evicted, ascending; None before any was pinned.
        num_evicted: Rows that ``evict`` removed.
        readmissions: Counts evicted ids that come back, if the table was asked to track them.
        limit: Policy by which lookups make room for new ids; None if they do not.
        halving_steps: Steps after which counts are halved; None if they are not.
        lookups: Records of lookups that may still read the table's rows or bring gradients for
            them; kept for a table with a limit only.
    """

    limit: RowLimit | None
    halving_steps: int | None

    def __init__(
        self, policy: Eviction | None, storage: Storage, pending: list[PendingGradient]
    ) -> None:
        self.storage, self._pending = storage, pending
        self._take_policy(policy)
        self.lookups: weakref.WeakSet[Any] = weakref.WeakSet()
        self.pinned: Tensor | None = None
        self.num_evicted = 0
        self._compactions = CompactionSchedule()
        self.readmissions: ReadmissionTracker | None = None
        self._listeners: OrderedDict[int, _Listener] = OrderedDict()

    @property
    def policy(self) -> Eviction | None:
        """Policy by which ``evict`` removes rows; None removes none."""
        return self._policy

    @policy.setter
    def policy(self, policy: Eviction | None) -> None:
        now, before = clock_of(policy), self.storage.now
        if isinstance(before, TableClock) and now.is_like(before):
            now = before  # with the jumps that it has bounded
        self.storage.now = now
        if self.limit is None and policy is not None and policy.lookup_limit is not None:
            self.storage.generation += 1  # lookups so far are not noted: their rows might go
        self._take_policy(policy)
        layout_version.advance()  # features know which of their tables have a limit

    def _take_policy(self, policy: Eviction | None) -> None:
        self._policy = policy
        self.limit = None if policy is None else policy.lookup_limit
        self.halving_steps = None if policy is None else policy.halving_steps

    @property
    def nbytes(self) -> int:
        """Bytes of pins and of evicted ids that are remembered."""
        tracked = 0 if self.readmissions is None else self.readmissions.nbytes
        return tracked + (0 if self.pinned is None else self.pinned.nbytes)

    def pin(self, ids: Tensor) -> None:
        """Never evict these ids, int64 [n] on the CPU."""
        self.pinned = (ids if self.pinned is None else torch.cat([self.pinned, ids])).unique()

    def unpin(self, ids: Tensor) -> None:
        """Let these ids, int64 [n] on the CPU, be evicted again."""
        if self.pinned is not None:
            self.pinned = self.pinned[~torch.isin(self.pinned, ids)]

    def listen(self, callback: Callable[[Evicted], None], with_rows: bool) -> RemovableHandle:
        """Call ``callback`` before rows go; the handle's ``remove()`` ends it."""
        handle = RemovableHandle(self._listeners)
        self._listeners[handle.id] = _Listener(callback, with_rows)
        return handle

    def statistics(self) -> TableStatistics:
        """Return the table's sizes, and what came and went since it was made."""
        storage, tracker = self.storage, self.readmissions
        counts = storage.header.read_counts()
        num_ids, capacity = int(counts[NUM_IDS]), storage.capacity
        state_bytes = storage.rows.state_bytes
        return TableStatistics(
            rows=num_ids,
            capacity=capacity,
            load=num_ids / capacity,
            index_bytes=storage.entries.nbytes,
            weight_bytes=storage.rows.nbytes - state_bytes,
            state_bytes=state_bytes,
            column_bytes=storage.column_bytes + self.nbytes,
            admitted=num_ids + storage.num_removed - storage.num_loaded,
            refused=int(counts[NUM_REJECTED]),
            evicted=self.num_evicted,
            readmitted=0 if tracker is None else tracker.count,
        )

    def track_readmissions(self, capacity: int) -> None:
        """Count from now on how many of the ``capacity`` ids evicted last come back."""
        if self.readmissions is None or self.readmissions.capacity != capacity:
            self.readmissions = ReadmissionTracker(capacity)

    def evict(
        self,
        policy: Eviction | None = None,
        dry_run: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> EvictionReport:
        """Remove the rows that a policy names; ``HashTable.evict`` describes it in full.

        Args:
            policy: Used instead of the table's own.
            dry_run: Remove nothing.
            process_group: Ranks that have the table's shards; None means all.
        """
        policy = self._policy if policy is None else policy
        if policy is None:
            return EvictionReport.of(0, {}, 0, 0, dry_run)
        check_kinds(policy=(policy, Eviction))
        storage = self.storage
        gone, by_policy = self._name_rows(policy, process_group)
        num_gone = count_marked(gone)
        freed = num_gone * (4 * storage.rows.row_words + 8 * len(storage.columns))
        if dry_run:
            return EvictionReport.of(num_gone, by_policy, freed, 0, dry_run)
        before = storage.nbytes
        if num_gone:
            self._remove(gone, num_gone)
        if (num_gone or self._compactions.is_owed) and self._compactions.is_due(
            storage.rows.blocks_for(len(storage)),
            len(storage.rows.addresses),
            may_move=not self._pending,
        ):
            storage.compact()
        returned = max(before - storage.nbytes, 0)
        return EvictionReport.of(num_gone, by_policy, freed, returned, False)

    def _remove(self, gone: Tensor, num_gone: int) -> None:
        ids, tracker = self._notify(gone), self.readmissions
        with self.undo() as undo:
            self.num_evicted += num_gone
            if tracker is not None and ids is not None:
                tracker.note_evicted(ids.cpu())
            self.storage.remove_rows(gone, undo)

    def undo(self) -> Undo:
        """Return a context in which an eviction is undone if it does not come to its end."""
        tracker = self.readmissions
        return self.storage.undo(self, *([] if tracker is None else [tracker]))

    def make_room(
        self,
        num_new: int,
        in_use: Iterable[Tensor],
        undo: Undo,
        process_group: ProcessGroup | None = None,
    ) -> None:
        """Remove as many rows as there are too many for a lookup's new ids, by the limit.

        Args:
            num_new: New ids, of all ranks.
            in_use: int64 [n] each, rows that must stay; negative ones are passed over.
            undo: From ``undo``; it puts everything back until it has ended.
            process_group: As for ``evict``; all ranks make room together.

        Raises:
            RuntimeError: Too few rows may go; nothing has changed.
        """
        limit, storage = self.limit, self.storage
        assert limit is not None
        columns = self._columns_for(limit, process_group)
        for rows in in_use:
            columns.evictable[rows[rows >= 0]] = False
        num_rows, num_evictable = limit.count(columns)
        excess = num_rows + num_new - limit.max_rows
        if excess > num_evictable:
            raise RuntimeError(
                f"table {storage.name!r}: {limit!r} has no room for {num_new} new ids: of "
                f"{num_rows} rows {num_evictable} may go, the others have ids of this lookup, wait "
                "for a backward pass or the optimizer, or are pinned; allow more rows or take "
                "smaller batches"
            )
        gone = limit.first(columns, excess)
        num_gone = count_marked(gone)
        if not num_gone:
            return
        ids, tracker = self._notify(gone), self.readmissions
        rows = gone.nonzero().squeeze(1)
        # New ids get these rows before the lookup has come to its end.
        undo.on_failure(partial(storage.rows.put_back, rows, storage.rows.copy_of(rows)))
        self.num_evicted += num_gone
        if tracker is not None and ids is not None:
            tracker.note_evicted(ids.cpu())
        storage.remove_rows(gone, undo, spares_lookups=True)

    def rows_named_by(self, policy: Eviction) -> Tensor:
        """Return the rows of this rank that ``evict`` would remove, bool [rows]."""
        return self._name_rows(policy, None)[0]

    def _name_rows(
        self, policy: Eviction, process_group: ProcessGroup | None
    ) -> tuple[Tensor, dict[str, int]]:
        """Return the rows that go, bool [rows], and how many each policy names."""
        storage, wanted = self.storage, policy.columns
        if missing := wanted & set(KEPT_COLUMNS) - set(storage.kept_columns):
            raise ValueError(
                f"policy: {policy!r} asks for {sorted(missing)}, which table {storage.name!r} does "
                "not keep; give it an eviction policy that does"
            )
        by_policy: dict[str, int] = {}
        return policy.name_rows(self._columns_for(policy, process_group), by_policy), by_policy

    def _columns_for(self, policy: Eviction, process_group: ProcessGroup | None) -> RowColumns:
        """Return what a policy decides by."""
        storage, wanted = self.storage, policy.columns
        device, num_rows = storage.header.device, storage.rows.num_rows
        occupied = storage.occupied_rows()
        columns = RowColumns(
            storage.step,
            occupied=occupied,
            evictable=self._evictable(occupied),
            sum_over_ranks=lambda part: collectives.sum_over_ranks(
                part.to(device), process_group
            ).to(part.device),
        )
        fields: dict[str, Any] = {
            name: storage.columns[name][:num_rows]
            for name in ("last_seen", "counts")
            if name in wanted
        }
        if "last_time" in wanted:
            fields["last_time"] = storage.columns["last_time"][:num_rows].double() / 1e6
            fields["now"] = storage.now()
        if "ids" in wanted:
            fields["ids"] = hash_index.id_of_row(storage.header, num_rows)[0]
        if "norms" in wanted:
            fields["norms"] = self._norms()
        return columns._replace(**fields)

    def _evictable(self, occupied: Tensor) -> Tensor:
        """Return bool [rows], the occupied ones without pin or pending gradient."""
        evictable = occupied.clone()
        for record in self._pending:
            rows = record.rows_of(self.storage.header)
            evictable[rows[rows >= 0]] = False
        if self.pinned is not None and self.pinned.numel():
            rows = self.storage.find(self.pinned)
            evictable[rows[rows >= 0]] = False
        return evictable

    def _norms(self) -> Tensor:
        """Return float32 [rows], the L2 norm of each row's weights."""
        storage = self.storage
        norms = torch.empty(storage.rows.num_rows, device=storage.header.device)
        layout = (storage.embedding_dim, storage.dtype)
        for start in range(0, len(norms), _CHUNK_ROWS):
            rows = torch.arange(start, min(start + _CHUNK_ROWS, len(norms)), device=norms.device)
            weights = embedding_bag.gather_rows(storage.header, rows, *layout)
            norms[rows] = torch.linalg.vector_norm(weights.float(), dim=1)
        return norms

    def _notify(self, gone: Tensor) -> Tensor | None:
        """Tell listeners which ids go; return them if anyone asks."""
        if self.readmissions is None and not self._listeners:
            return None
        storage, rows = self.storage, gone.nonzero().squeeze(1)
        ids = hash_index.id_of_row(storage.header, storage.rows.num_rows)[0][rows]
        read: tuple[Any, Any] = (None, None)
        if any(listener.with_rows for listener in self._listeners.values()):
            read = storage.rows.read(rows)
        before = (storage.generation, len(storage))
        for callback, with_rows in list(self._listeners.values()):
            weights, slots = read if with_rows else (None, None)
            callback(Evicted(storage.name, ids, weights, slots))
            if (self.storage.generation, len(self.storage)) != before:
                raise RuntimeError(f"an on_evict callback changed table {storage.name!r}")
        return ids


__all__ = ["Evicted", "EvictionReport", "Evictor", "clock_of", "kept_columns"]
