"""Rows of tables that are sharded over ranks.

A lookup is a few local ops with three messages between: a head with counts, ids, rows. Gradients
travel later, where all ranks are level: see ``gradient_exchange``.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from recis_lightning.distributed import collectives
from recis_lightning.distributed.joined_messages import Message
from recis_lightning.distributed.ownership import owner_of
from recis_lightning.lookup.batch import Batch
from recis_lightning.lookup.dedup import DeduplicatedIds, Deduplicator
from recis_lightning.lookup.early_gradients import early_of, note_gradients
from recis_lightning.lookup.exchange import Counts, ShardExchange, exchange_rows, header_over
from recis_lightning.lookup.features import FeatureLayout
from recis_lightning.lookup.gradient_ledger import (
    UnsentGradient,
    count_backward_passes,
    ledger_of,
)
from recis_lightning.lookup.row_source import OutputGradients, PreparedIds
from recis_lightning.ops import embedding_bag
from recis_lightning.ops import layout as fields
from recis_lightning.ops.embedding_bag import Plan
from recis_lightning.ops.header import Header
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.pending_gradient import PendingGradient


class ShardedRows:
    """``RowSource`` of tables sharded over the ranks of their process group.

    Every rank looks up the same features in the same order, with empty ids where it has none: a
    lookup is one collective operation. A backward pass is none.

    Args:
        layout: The group's features.

    Raises:
        ValueError: The process group cannot carry what the tables' device holds.
    """

    is_sharded: ClassVar[bool] = True
    can_prepare: ClassVar[bool] = True

    def __init__(self, layout: FeatureLayout) -> None:
        self._layout = layout
        count_backward_passes()
        process_group = layout.process_group
        early_of(process_group)  # from now on, backward passes that use no output count too
        collectives.check_backend(layout.tables[0].name, layout.device, process_group)
        for table in layout.tables:
            table.needs_reshard = True  # from a run with another number of ranks
        self._deduplicator = self._make_deduplicator()
        self._ahead: Deduplicator | None = None  # that of ``ask``, whose thread is another one

    def _make_deduplicator(self) -> Deduplicator:
        layout = self._layout
        return Deduplicator(
            layout.training,
            layout.segment_sources,
            len(layout.sources),
            collectives.world_size(layout.process_group),
            layout.device,
        )

    def ask(
        self, ids: Sequence[Tensor], occurrences: Tensor | None
    ) -> tuple[DeduplicatedIds, Generator[Any, Any, Any]]:
        """Begin a training lookup ahead of time, in the one thread that does so.

        Args:
            ids: int64 [n_i] of each feature.
            occurrences: int64 [n], how many occurrences each stands for; None means 1.

        Returns:
            The deduplicated ids, and the exchange. That yields numbers of ids, and then the message
            with ids; whoever goes further than that needs the tables.
        """
        if self._ahead is None:
            self._ahead = self._make_deduplicator()
        deduplicated = self._ahead.deduplicate(ids)
        return deduplicated, exchange_rows(self._layout, deduplicated, True, occurrences)

    def fetch(
        self,
        batch: Batch,
        plan: Plan,
        training: bool,
        learns: bool,
        prepared: PreparedIds | None = None,
    ) -> Generator[Counts | Message, Any, FetchedShardedRows]:
        """Ask ids of the ranks that own them, and fill the outputs."""
        layout = self._layout
        # Backward may come to it: autograd records what is looked up now.
        records = learns and torch.is_grad_enabled() and any(layout.trains())
        for table in layout.tables:
            if table.needs_reshard:
                drop_rows_of_other_ranks(table)
        if prepared is None:
            deduplicated = self._deduplicator.deduplicate(batch.bags.ids)
            exchange = exchange_rows(layout, deduplicated, training, batch.occurrences)
            route, rows = yield from exchange
        else:
            deduplicated = prepared.deduplicated
            exchange = exchange_rows(layout, deduplicated, training, batch.occurrences)
            route, rows = yield from _after_ids(exchange, prepared)
        inverse = deduplicated.inverse
        fetched = FetchedShardedRows(inverse, layout, rows)
        plan[:, fields.PLAN_HEADER] = fetched.header.address
        batch.lines.point_to_rows(plan, inverse)
        embedding_bag.gather(plan, *layout.row_type)
        if records:
            ledger_of(layout.process_group).add(route, fetched)
        return fetched


def _after_ids(
    exchange: Generator[Counts | Message, Any, ShardExchange], prepared: PreparedIds
) -> Generator[Message, Any, ShardExchange]:
    """Go on with an exchange whose first two messages came ahead."""
    next(exchange)
    exchange.send(prepared.received_counts)
    message: Any = exchange.send(prepared.received)
    while True:
        answer = yield message
        try:
            message = exchange.send(answer)
        except StopIteration as end:
            result: ShardExchange = end.value
            return result


@final
class FetchedShardedRows:
    """``FetchedRows`` that came from the ranks that own them.

    Args:
        rows: int64 [n], the inverse of the deduplicated ids.
        layout: The group's features.
        received: dtype [u, embedding_dim], the rows of the deduplicated ids.
        kept: What the lookup's plan points into.

    Attributes:
        header: A table's header by which kernels find ``received``.
    """

    def __init__(
        self, rows: Tensor, layout: FeatureLayout, received: Tensor, kept: Sequence[Tensor] = ()
    ) -> None:
        self.rows, self._layout, self._kept = rows, layout, kept
        self.header, self._memory = header_over(received)

    @property
    def is_own(self) -> bool:
        """False: ranks learn together of rows that were lost, where gradients travel."""
        return False

    def header_of(self, feature: int) -> Header:
        """Return the header of the received rows."""
        return self.header

    def version_of(self, feature: int) -> int:
        """Return 0: nobody overwrites what was received."""
        return 0

    def return_gradients(self, gradients: OutputGradients) -> None:
        """Leave gradients with the tables, to be sent where all ranks are level."""
        if not gradients.features:
            return
        plan = gradients.plan
        record = PendingGradient([], plan[:0], self.rows[:0], gradients.buffers())
        record.unsent = UnsentGradient(self, gradients)
        tables = (self._layout.feature_tables[feature] for feature in gradients.features)
        for table in dict.fromkeys(tables):
            table.pending.append(record)
        note_gradients(self._layout)


def drop_rows_of_other_ranks(table: HashTable) -> None:
    """Forget what a table knows of ids that other ranks own.

    Loading one state on every rank, and inserting the same ids on each, brings such rows.
    """
    ids, rows = table.ids_map()
    dropped = torch.zeros(table.storage.rows.num_rows, dtype=torch.bool, device=table.device)
    dropped[rows[_is_of_other_rank(table, ids)]] = True
    if bool(dropped.any()):
        table.storage.remove_rows(dropped)
    counter = table.storage.admission_counter
    if counter is not None:
        counted = counter.state().get("pending_ids", ids[:0])
        counter.forget(counted[_is_of_other_rank(table, counted)])
    table.needs_reshard = False


def _is_of_other_rank(table: HashTable, ids: Tensor) -> Tensor:
    size = collectives.world_size(table.process_group)
    return owner_of(ids, size) != collectives.rank(table.process_group)


__all__ = ["FetchedShardedRows", "ShardedRows", "drop_rows_of_other_ranks"]
