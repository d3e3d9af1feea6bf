"""Throwing rows out of a table, and counting who came, went and came back."""

from __future__ import annotations

from torch import Tensor

from recis_lightning.arguments import check_int
from recis_lightning.eviction import Eviction, RowColumns
from recis_lightning.ops import hash_index
from recis_lightning.ops.table_header import NUM_REFUSED, STEP
from recis_lightning.pending_gradient import PendingGradient
from recis_lightning.readmissions import Readmissions
from recis_lightning.table_statistics import TableStatistics
from recis_lightning.table_storage import TableStorage


class TableEviction(TableStorage):
    """The storage of a table whose rows leave by a policy."""

    eviction: Eviction | None
    pending: list[PendingGradient]
    readmissions: Readmissions | None

    def start_counts(self) -> None:
        """Count from 0, and track nothing."""
        self._num_evicted = self._num_removed = self._num_loaded = 0
        self.readmissions = None

    @property
    def step(self) -> int:
        """What training lookups stamp rows with; ``HashTableFilterHook`` advances it."""
        return int(self._header[STEP])

    def evict(self) -> int:
        """Throw out the rows that the eviction policy names; return how many went.

        Weights, optimizer state and stamps of an evicted id are gone; when it returns it starts
        from its initial row. Rows with a pending gradient stay until the optimizer has stepped.
        """
        if self.eviction is None or not len(self):
            return 0
        last_seen = self._last_seen[: self.rows.num_rows]
        evicted = self.eviction.expired(RowColumns(self.step, last_seen))
        for record in self.pending:
            rows = record.rows_of(self)
            evicted[rows[rows >= 0]] = False
        if not bool(evicted.any()):
            return 0
        if self.readmissions is not None:
            ids, occupied = hash_index.id_of_row(self.header, self.rows.num_rows)
            self.readmissions.note_evicted(ids[evicted & occupied])
        removed = self.remove_rows(evicted)
        self._num_evicted += removed
        return removed

    def remove_rows(self, gone: Tensor) -> int:
        """See ``TableStorage``."""
        removed = super().remove_rows(gone)
        self._num_removed += removed
        return removed

    @property
    def column_bytes(self) -> int:
        """Bytes of what policies keep."""
        tracked = 0 if self.readmissions is None else self.readmissions.nbytes
        return super().column_bytes + tracked

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
        state, readmissions = self.rows.state_bytes, self.readmissions
        return TableStatistics(
            rows=len(self),
            capacity=self.capacity,
            load=len(self) / self.capacity,
            index_bytes=self._entries.nbytes,
            weight_bytes=self.rows.nbytes - state,
            state_bytes=state,
            column_bytes=self.column_bytes,
            admitted=len(self) + self._num_removed - self._num_loaded,
            refused=int(self._header[NUM_REFUSED]),
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


__all__ = ["TableEviction"]
