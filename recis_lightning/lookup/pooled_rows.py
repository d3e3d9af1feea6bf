"""Rows that their owners add up: of long bags, fewer bytes come back than a row for each id.

A rank sends the ids of its bags to their owners, and each returns one row for each bag that it owns
ids of. Gradients go the same way: one for each of these, which the owner's update reads for all of
the part's ids. Sums are taken by bag, then owner, then position, the same in every run.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from recis_lightning.distributed import collectives
from recis_lightning.distributed.joined_messages import Message, by_part
from recis_lightning.lookup.batch import Batch
from recis_lightning.lookup.counted_ids import with_counts, without_counts
from recis_lightning.lookup.early_gradients import early_of
from recis_lightning.lookup.exchange import Route
from recis_lightning.lookup.exchange_dtype import pack_rows
from recis_lightning.lookup.features import FeatureLayout
from recis_lightning.lookup.gradient_ledger import count_backward_passes, ledger_of
from recis_lightning.lookup.owned_ids import (
    OwnedIds,
    OwnedParts,
    look_up_owned,
    point_to_data,
)
from recis_lightning.lookup.pooled_bags import Counts, split_bags
from recis_lightning.lookup.regrouping import parts_by_source
from recis_lightning.lookup.row_source import PreparedIds
from recis_lightning.lookup.sharded import FetchedShardedRows, drop_rows_of_other_ranks
from recis_lightning.ops import embedding_bag
from recis_lightning.ops import layout as fields
from recis_lightning.ops.embedding_bag import Plan


class PooledShardedRows:
    """``RowSource`` of pooled features whose rows their owners add up.

    Args:
        layout: The group's features, of modes "sum" and "mean", without weights.

    Raises:
        ValueError: The process group cannot carry what the tables' device holds.
    """

    is_sharded: ClassVar[bool] = True
    can_prepare: ClassVar[bool] = False

    def __init__(self, layout: FeatureLayout) -> None:
        self._layout = layout
        count_backward_passes()
        early_of(layout.process_group)  # from now on, backward passes that use no output count too
        collectives.check_backend(layout.tables[0].name, layout.device, layout.process_group)
        for table in layout.tables:
            table.needs_reshard = True  # from a run with another number of ranks

    def fetch(
        self,
        batch: Batch,
        plan: Plan,
        training: bool,
        learns: bool,
        prepared: PreparedIds | None = None,
    ) -> Generator[Any, Any, FetchedShardedRows]:
        """Ask the owners for the sums of their parts of bags, and fill the outputs."""
        layout = self._layout
        records = learns and torch.is_grad_enabled() and any(layout.trains())
        for table in layout.tables:
            if table.needs_reshard:
                drop_rows_of_other_ranks(table)
        num_ranks = collectives.world_size(layout.process_group)
        split = split_bags(layout, batch.bags, num_ranks)
        sent = np.concatenate([split.num_ids, split.num_parts], 1)
        recv = yield sent
        totals: list[int] = recv.sum(1).tolist()
        if recv.shape == sent.shape:
            received = yield Message(split.message, totals, sent.sum(1).tolist())
        else:
            counted = yield with_counts(split.message, sent, totals)
            recv, received = without_counts(counted, sent.shape[1], totals, False)
        num_ids, num_parts = np.split(recv, 2, axis=1)
        owned = _look_up(layout, num_ids, num_parts, received, training)
        found = pack_rows(_add_up(layout, owned), layout.exchange_dtype)
        num_sent: list[int] = split.num_parts.sum(1).tolist()
        num_received: list[int] = num_parts.sum(1).tolist()
        rows = (yield Message(found, num_sent, num_received)).to(layout.dtype)
        fetched = FetchedShardedRows(split.parts, layout, rows, (split.bounds, split.weights))
        split.enter(plan)
        plan[:, fields.PLAN_HEADER] = fetched.header.address
        embedding_bag.gather(plan, *layout.row_type)
        if records:
            route = Route(layout, num_sent, num_received, owned)
            ledger_of(layout.process_group).add(route, fetched)
        return fetched


def _look_up(
    layout: FeatureLayout, num_ids: Counts, num_parts: Counts, received: Tensor, training: bool
) -> OwnedIds:
    """Find this shard's rows of received bags; in training insert unknown ids.

    Args:
        layout: The group's features.
        num_ids: int64 [num_ranks, num_sources], how many ids came.
        num_parts: int64 [num_ranks, num_sources], how many parts of bags.
        received: int64 [m], by rank, as ``SplitBags.message``.
        training: Insert unknown ids and stamp rows; otherwise only read.
    """
    device = layout.device
    sizes, ids = by_part(received, np.stack([num_parts.sum(1), num_ids.sum(1)], 1))
    by_source = parts_by_source(num_ids, device)
    owned = look_up_owned(layout, by_source, ids, None, training)
    parts = parts_by_source(num_parts, device)
    sizes = parts.arrange(sizes)
    used = np.flatnonzero(by_source.sizes)
    counts, num_sources = parts.sizes, len(parts.sizes)
    # Bounds of a source's parts: one more than parts, from 0 on.
    ends = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    lasts = np.cumsum(counts)
    firsts = lasts - counts
    bounds = torch.cat(
        [ends[first : last + 1] - ends[first] for first, last in zip(firsts, lasts, strict=True)]
    )
    starts = firsts + np.arange(num_sources)  # of each source's bounds
    plan = owned.plan
    plan[:, fields.PLAN_MODE], plan[:, fields.PLAN_BAG_LENGTH] = fields.SUM, -1
    plan[:, fields.PLAN_NUM_BAGS] = counts[used]
    plan[:, fields.PLAN_OFFSETS] = bounds.data_ptr() + 8 * starts[used]
    return owned._replace(parts=parts, pooled=OwnedParts(sizes, bounds, firsts[used]))


def _add_up(layout: FeatureLayout, owned: OwnedIds) -> Tensor:
    """Return the sum of each part's rows in the order of the message, dtype [p, embedding_dim]."""
    assert owned.pooled is not None
    num_parts, device = len(owned.pooled.sizes), layout.device
    values = torch.empty(num_parts, layout.embedding_dim, dtype=layout.dtype, device=device)
    point_to_data(owned.plan, values, owned.pooled.firsts)
    embedding_bag.gather(owned.plan, *layout.row_type)
    return owned.parts.restore(values)


__all__ = ["PooledShardedRows"]
