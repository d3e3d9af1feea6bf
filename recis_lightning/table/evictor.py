"""Throwing rows out of a table, and counting who came, went and came back."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from recis_lightning.arguments import check_ids, check_int
from recis_lightning.distributed import collectives
from recis_lightning.eviction import COLUMNS, KEPT_COLUMNS, Eviction, RowColumns, count_marked
from recis_lightning.ops import embedding_bag, hash_index
from recis_lightning.ops.layout import NUM_IDS, NUM_REFUSED, STEP, TIME
from recis_lightning.table.pending_gradient import PendingGradient
from recis_lightning.table.readmissions import Readmissions
from recis_lightning.table.statistics import TableStatistics
from recis_lightning.table.storage import TableStorage

_PIECE_ROWS = 1 << 16  # rows whose norms are taken at once


class EvictionReport(int):
    """How many rows an eviction threw out, or would; an int that can tell more.

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
        """Make a report."""
        report = cls(num_rows)
        report.by_policy, report.dry_run = by_policy, dry_run
        report.bytes_freed, report.bytes_returned = bytes_freed, bytes_returned
        return report

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"EvictionReport({int(self)} rows, {shown})"


class Evicted(NamedTuple):
    """What an ``on_evict`` callback gets.

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


class _Listener(NamedTuple):
    callback: Callable[[Evicted], None]
    with_rows: bool


class TableEviction(TableStorage):
    """The storage of a table whose rows leave by a policy."""

    eviction: Eviction | None
    pending: list[PendingGradient]
    readmissions: Readmissions | None

    def start_eviction(self) -> None:
        """Keep the columns that the policy asks for, count from 0, and track nothing."""
        wanted = frozenset() if self.eviction is None else self.eviction.columns
        if unknown := wanted - set(COLUMNS):
            raise ValueError(f"eviction: columns are {COLUMNS}, got {sorted(unknown)}")
        self.kept_columns = tuple(name for name in KEPT_COLUMNS if name in wanted)
        self._num_evicted = self._num_removed = self._num_loaded = 0
        self.readmissions = None
        self._listeners: OrderedDict[int, _Listener] = OrderedDict()

    @property
    def step(self) -> int:
        """What training lookups stamp rows with; ``HashTableFilterHook`` advances it."""
        return int(self.header.fields[STEP])

    # ---- the time, for policies that ask for it

    def _now(self) -> float:
        source = None if self.eviction is None else self.eviction.time_source
        return (source or time.time)()

    def read_clock(self) -> None:
        """Enter the time into the header, if the table keeps times."""
        if "last_time" in self.kept_columns:
            self.header.fields[TIME] = round(self._now() * 1e6)
            self.header.publish()

    def ages(self, rows: Tensor) -> Tensor:
        """Return for each row the microseconds since its last training lookup, int64 [n]."""
        return round(self._now() * 1e6) - self._columns["last_time"][rows]

    def set_ages(self, rows: Tensor, ages: Tensor) -> None:
        """Set what ``ages`` returns."""
        self._columns["last_time"][rows] = round(self._now() * 1e6) - ages

    # ---- the keep list

    _pinned: Tensor | None = None  # ascending

    @property
    def pinned(self) -> Tensor:
        """int64 [n], the ids that are never evicted, ascending."""
        return torch.empty(0, dtype=torch.int64) if self._pinned is None else self._pinned

    def pin(self, ids: Tensor) -> None:
        """Never evict these ids; ``delete`` and ``clear`` still remove their rows.

        An id need not have a row yet. Pins are part of a saved table.

        Args:
            ids: int64 [*].
        """
        self._pinned = torch.cat([self.pinned, check_ids(ids).reshape(-1).cpu()]).unique()

    def unpin(self, ids: Tensor) -> None:
        """Let these ids be evicted again; those that are not pinned are passed over.

        Args:
            ids: int64 [*].
        """
        going = check_ids(ids).reshape(-1).cpu()
        self._pinned = self.pinned[~torch.isin(self.pinned, going)]

    # ---- evicting

    def on_evict(
        self, callback: Callable[[Evicted], None], with_rows: bool = False
    ) -> RemovableHandle:
        """Have ``callback`` called with what an eviction is about to throw out.

        It is called before rows go, not for a dry run or where nothing goes; if it raises, all
        rows stay. It must leave the table alone. Copies of the table do not have it.

        Args:
            callback: Gets an ``Evicted``.
            with_rows: Whether it gets weights and optimizer state too.

        Returns:
            A handle whose ``remove()`` ends it.
        """
        handle = RemovableHandle(self._listeners)
        self._listeners[handle.id] = _Listener(callback, with_rows)
        return handle

    def evict(self, policy: Eviction | None = None, dry_run: bool = False) -> EvictionReport:
        """Throw out the rows that the eviction policy names.

        Weights, optimizer state and columns of an evicted id are gone; when it returns it must be
        admitted again, and starts from its initial row. Pinned ids stay, and rows with a pending
        gradient until the optimizer has stepped. When half of the memory for rows would do for
        those that are left, memory is given back, unless gradients are pending; rows then have
        other numbers.

        With several ranks, a ``MaxRows`` must be asked on all of them together.

        Args:
            policy: Used instead of the table's own; it may ask only for columns that the table
                keeps for its own policy, or that need not be kept ("ids", "norms").
            dry_run: Change nothing, and say what would go.

        Returns:
            How many rows went, an int, with ``by_policy``, ``bytes_freed``, ``bytes_returned``.

        Raises:
            TypeError: ``policy`` is no policy.
            ValueError: It asks for a column that the table does not keep.
        """
        policy = self.eviction if policy is None else policy
        if policy is None:
            return EvictionReport.of(0, {}, 0, 0, dry_run)
        if not isinstance(policy, Eviction):
            raise TypeError(f"policy: expected an Eviction, got {policy!r}")
        gone, by_policy = self._name_rows(policy)
        num_gone = count_marked(gone)
        freed = num_gone * (4 * self.rows.row_words + 8 * len(self._columns))
        if dry_run or not num_gone:
            return EvictionReport.of(num_gone, by_policy, freed, 0, dry_run)
        self._tell(gone)
        before = self.nbytes
        self.remove_rows(gone)
        self._num_evicted += num_gone
        if 2 * self.rows.blocks_for(len(self)) <= len(self.rows.addresses) and not self.pending:
            self.compact()
        return EvictionReport.of(num_gone, by_policy, freed, max(before - self.nbytes, 0), False)

    def _name_rows(self, policy: Eviction) -> tuple[Tensor, dict[str, int]]:
        """Return the rows that go, bool [rows], and how many each policy names."""
        wanted = policy.columns
        if missing := wanted & set(KEPT_COLUMNS) - set(self.kept_columns):
            raise ValueError(
                f"policy: {policy!r} asks for {sorted(missing)}, which table {self.name!r} does "
                "not keep; give it an eviction policy that does"
            )
        occupied = self._live_rows()
        evictable = occupied.clone()
        for record in self.pending:
            rows = record.rows_of(self)
            evictable[rows[rows >= 0]] = False
        if self._pinned is not None and self._pinned.numel():
            rows = self._find(self._pinned)
            evictable[rows[rows >= 0]] = False
        columns = RowColumns(
            self.step,
            occupied=occupied,
            evictable=evictable,
            sum_over_ranks=lambda part: collectives.sum_over_ranks(part.to(self.header.device)).to(
                part.device
            ),
        )
        found: dict[str, Any] = {
            name: self._columns[name][: self.rows.num_rows]
            for name in ("last_seen", "counts")
            if name in wanted
        }
        if "last_time" in wanted:
            found["last_time"] = self._columns["last_time"][: self.rows.num_rows].double() / 1e6
            found["now"] = self._now()
        if "ids" in wanted:
            found["ids"] = hash_index.id_of_row(self.header, self.rows.num_rows)[0]
        if "norms" in wanted:
            found["norms"] = self._norms()
        by_policy: dict[str, int] = {}
        return policy.name_rows(columns._replace(**found), by_policy), by_policy

    def _find(self, ids: Tensor) -> Tensor:
        """Return int64 [n], the row of each id, negative where there is none."""
        raise NotImplementedError

    def _norms(self) -> Tensor:
        norms = torch.empty(self.rows.num_rows, device=self.header.device)
        for start in range(0, len(norms), _PIECE_ROWS):
            rows = torch.arange(start, min(start + _PIECE_ROWS, len(norms)), device=norms.device)
            weights = embedding_bag.gather_rows(self.header, rows, self.embedding_dim, self.dtype)
            norms[rows] = torch.linalg.vector_norm(weights.float(), dim=1)
        return norms

    def _tell(self, gone: Tensor) -> None:
        """Tell whoever listens which ids go."""
        if self.readmissions is None and not self._listeners:
            return
        rows = gone.nonzero().squeeze(1)
        ids = hash_index.id_of_row(self.header, self.rows.num_rows)[0][rows]
        read: tuple[Any, Any] = (None, None)
        if any(listener.with_rows for listener in self._listeners.values()):
            read = self.rows.read(rows)
        before = (self.generation, len(self))
        for callback, with_rows in list(self._listeners.values()):
            weights, slots = read if with_rows else (None, None)
            callback(Evicted(self.name, ids, weights, slots))
            if (self.generation, len(self)) != before:
                raise RuntimeError(f"an on_evict callback changed table {self.name!r}")
        if self.readmissions is not None:
            self.readmissions.note_evicted(ids.cpu())

    def remove_rows(self, gone: Tensor) -> int:
        """See ``TableStorage``."""
        removed = super().remove_rows(gone)
        self._num_removed += removed
        return removed

    # ---- counts

    @property
    def column_bytes(self) -> int:
        """Bytes of what policies keep."""
        tracked = 0 if self.readmissions is None else self.readmissions.nbytes
        pinned = 0 if self._pinned is None else self._pinned.nbytes
        return super().column_bytes + tracked + pinned

    def statistics(self) -> TableStatistics:
        """Return sizes now, and counts since the table was made.

        Example:
            >>> import torch
            >>> from recis_lightning import HashTable
            >>> table = HashTable(2)
            >>> table.insert(torch.tensor([7, 8, 9]), torch.ones(3, 2))
            >>> statistics = table.statistics()
            >>> statistics.rows, statistics.capacity, statistics.admitted
            (3, 64, 3)
        """
        counts = self.header.read_counts()
        num_ids, capacity = int(counts[NUM_IDS]), self.capacity
        state, readmissions = self.rows.state_bytes, self.readmissions
        return TableStatistics(
            rows=num_ids,
            capacity=capacity,
            load=num_ids / capacity,
            index_bytes=self._entries.nbytes,
            weight_bytes=self.rows.nbytes - state,
            state_bytes=state,
            column_bytes=self.column_bytes,
            admitted=num_ids + self._num_removed - self._num_loaded,
            refused=int(counts[NUM_REFUSED]),
            evicted=self._num_evicted,
            readmitted=0 if readmissions is None else readmissions.count,
        )

    def track_readmissions(self, capacity: int = 1 << 20) -> None:
        """Count from now on how many evicted ids come back, for ``statistics().readmitted``.

        Args:
            capacity: Evicted ids remembered, at about 17 bytes each; of more, those evicted first
                are forgotten. A call that changes nothing keeps what is remembered.

        Raises:
            TypeError, ValueError: ``capacity`` is no int >= 1.
        """
        check_int("capacity", capacity, least=1)
        if self.readmissions is None or self.readmissions.capacity != capacity:
            self.readmissions = Readmissions(capacity)


__all__ = ["Evicted", "EvictionReport", "TableEviction"]
