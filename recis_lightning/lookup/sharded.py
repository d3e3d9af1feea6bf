"""Rows of tables that are sharded over ranks.

A lookup is a few local ops with three messages between: counts, ids, rows.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import torch
from torch import Tensor

from recis_lightning.distributed import collectives
from recis_lightning.distributed.ownership import owner_of
from recis_lightning.lookup.batch import Batch
from recis_lightning.lookup.dedup import Deduplicator
from recis_lightning.lookup.exchange import ShardExchange, exchange_rows
from recis_lightning.lookup.features import FeatureLayout
from recis_lightning.lookup.row_source import OutputGradients
from recis_lightning.ops import embedding_bag
from recis_lightning.ops import layout as fields
from recis_lightning.ops.embedding_bag import Plan
from recis_lightning.ops.header import Header
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.pending_gradient import PendingGradient


class ShardedRows:
    """``RowSource`` of tables sharded over the ranks of torch's default process group.

    Every rank looks up the same features in the same order, with empty ids where it has none, and
    runs the same backward passes: a lookup or backward pass is one collective operation.

    Args:
        layout: The group's features.

    Raises:
        ValueError: The process group cannot carry what the tables' device holds.
    """

    def __init__(self, layout: FeatureLayout) -> None:
        self._layout = layout
        collectives.check_backend(layout.tables[0].name, layout.device)
        for table in layout.tables:
            table.needs_reshard = True  # from a run with another number of ranks
        self._deduplicator = Deduplicator(
            layout.training,
            layout.segment_sources,
            len(layout.sources),
            collectives.world_size(),
            layout.device,
        )

    def fetch(
        self, batch: Batch, plan: Plan, training: bool
    ) -> Generator[None, None, FetchedShardedRows]:
        """Ask ids of the ranks that own them, and fill the outputs."""
        layout = self._layout
        for table in layout.tables:
            if table.needs_reshard:
                drop_rows_of_other_ranks(table)
        deduplicated = self._deduplicator.deduplicate(batch.bags.ids)
        exchange = yield from exchange_rows(layout, deduplicated, training)
        inverse = deduplicated.inverse
        plan[:, fields.PLAN_HEADER] = exchange.header.address
        batch.lines.point_to_rows(plan, inverse)
        embedding_bag.gather(plan, *layout.row_type)
        return FetchedShardedRows(inverse, layout, exchange)


class FetchedShardedRows(NamedTuple):
    """``FetchedRows`` that came from the ranks that own them.

    Attributes:
        rows: int64 [n], the inverse of the deduplicated ids.
        layout: The group's features.
        exchange: The exchange that fetched the rows.
    """

    rows: Tensor
    layout: FeatureLayout
    exchange: ShardExchange

    def header_of(self, feature: int) -> Header:
        """Return the header of the received rows."""
        return self.exchange.header

    def version_of(self, feature: int) -> int:
        """Return 0: nobody overwrites what was received."""
        return 0

    def return_gradients(self, gradients: OutputGradients) -> None:
        """Send gradients to the owners of ids, and leave those that come with the tables."""
        plan = gradients.plan
        updated = self.exchange.return_gradients(plan, self._has_gradient(gradients))
        # Ids of other ranks: nothing to apply here, but the table's update has this rank's part.
        tables = (self.layout.feature_tables[feature] for feature in gradients.features)
        for table in dict.fromkeys(tables):
            if table not in updated:
                table.pending.append(PendingGradient([], plan[:0], self.rows[:0], []))

    def _has_gradient(self, gradients: OutputGradients) -> Tensor | None:
        """Return bool [u], which deduplicated ids have a gradient; None if all do."""
        features = self.layout.features
        is_tiled = any(features[index].mode == "tile" for index in gradients.features)
        if len(gradients.features) == len(features) and not is_tiled:
            return None
        size = len(self.exchange.rows)
        has_gradient = torch.zeros(size + 1, dtype=torch.bool, device=self.rows.device)
        for line, index in zip(gradients.plan, gradients.features, strict=True):
            first = int(line[fields.PLAN_FIRST_ID])
            rows = self.rows[first : first + int(line[fields.PLAN_NUM_IDS])]
            if features[index].mode == "tile":
                _, position = gradients.batch.bags_of(index).positions()
                rows = rows.masked_fill(position >= features[index].tile_len, -1)
            has_gradient[torch.where(rows < 0, size, rows)] = True  # no mask: a GPU's would wait
        return has_gradient[:size]


def drop_rows_of_other_ranks(table: HashTable) -> None:
    """Forget what a table knows of ids that other ranks own.

    Loading one state on every rank, and inserting the same ids on each, brings such rows.
    """
    ids, rows = table.ids_map()
    dropped = torch.zeros(table.storage.rows.num_rows, dtype=torch.bool, device=table.device)
    dropped[rows[_is_of_other_rank(ids)]] = True
    if bool(dropped.any()):
        table.storage.remove_rows(dropped)
    counter = table.storage.admission_counter
    if counter is not None:
        counted = counter.state().get("pending_ids", ids[:0])
        counter.forget(counted[_is_of_other_rank(counted)])
    table.needs_reshard = False


def _is_of_other_rank(ids: Tensor) -> Tensor:
    return owner_of(ids, collectives.world_size()) != collectives.rank()


__all__ = ["FetchedShardedRows", "ShardedRows", "drop_rows_of_other_ranks"]
