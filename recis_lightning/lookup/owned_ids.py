"""Ids that a rank owns and was asked for: finds or inserts them, and gathers their rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.distributed.message_memory import MessageMemory
from recis_lightning.lookup.features import FeatureLayout, point_to_rows
from recis_lightning.lookup.local import find_or_insert_rows
from recis_lightning.lookup.regrouping import ReceivedParts
from recis_lightning.ops import embedding_bag, hash_index
from recis_lightning.ops import layout as fields
from recis_lightning.ops.embedding_bag import Plan
from recis_lightning.ops.layout import (
    NUM_REJECTED,
    PLAN_SIZE,
    SEGMENT_HEADER,
    SEGMENT_IDS,
    SEGMENT_START,
    UNKNOWN,
)
from recis_lightning.table.hash_table import HashTable

_gathered = MessageMemory()


class OwnedParts(NamedTuple):
    """Parts of bags whose rows this rank adds up.

    Attributes:
        sizes: int64 [p], ids of each, by source, then rank.
        bounds: int64 [m], which the plan's offsets point into.
        firsts: For each line of the plan, its first part.
    """

    sizes: Tensor
    bounds: Tensor
    firsts: npt.NDArray[np.int64]


class OwnedIds(NamedTuple):
    """Ids that this rank owns and was asked for, in parts of one table each.

    Attributes:
        part_tables: Table of each part that is not empty.
        plan: int64 [num_parts, PLAN_SIZE], of those parts.
        rows: int64 [r], this shard's rows of the ids.
        parts: Order of what travels: the ids, or parts of bags.
        pooled: The parts of bags, where rows are added up here; None where each travels.
    """

    part_tables: list[HashTable]
    plan: Plan
    rows: Tensor
    parts: ReceivedParts
    pooled: OwnedParts | None = None


def look_up_owned(
    layout: FeatureLayout,
    parts: ReceivedParts,
    ids: Tensor,
    occurrences: Tensor | None,
    training: bool,
) -> OwnedIds:
    """Find this shard's rows of received ids, int64 [r]; in training insert unknown ids.

    Args:
        layout: The group's features.
        parts: Their order.
        ids: int64 [r], by rank, then source.
        occurrences: int64 [r], how often each id occurs at its rank; None if nobody counts.
        training: Insert unknown ids and stamp rows; otherwise only read.
    """
    tables = layout.source_tables
    sources, sizes, _ = parts
    ids = parts.arrange(ids)
    starts = np.cumsum(sizes) - sizes
    # Tables that got no ids too: a lookup is one of all shards.
    segments = layout.source_segments[training][sources]
    segments[:, SEGMENT_START] = starts
    segments[:, SEGMENT_IDS] = ids.data_ptr()
    if training:
        split_ids = ids.split(sizes.tolist())
        part_tables = [layout.sources[source].table for source in sources.tolist()]
        occurrences = None if occurrences is None else parts.arrange(occurrences)
        rows, _ = find_or_insert_rows(
            layout, segments, split_ids, ids.numel(), part_tables, occurrences
        )
        if occurrences is not None:
            _count_rejections(layout, parts, rows, occurrences)
    else:
        rows = hash_index.find(segments, ids.numel(), layout.device)
    used = np.flatnonzero(sizes)
    used_tables = sources[used]
    plan = np.zeros((len(used), PLAN_SIZE), np.int64)
    plan[:, fields.PLAN_HEADER] = segments[used, SEGMENT_HEADER]
    plan[:, fields.PLAN_MODE] = fields.NONE
    plan[:, fields.PLAN_FIRST_ID] = starts[used]
    plan[:, fields.PLAN_NUM_BAGS] = plan[:, fields.PLAN_NUM_IDS] = sizes[used]
    plan[:, fields.PLAN_BAG_LENGTH] = 1
    point_to_rows(plan, rows)
    layout.bring_in(plan, rows, writes=training)
    return OwnedIds([tables[table] for table in used_tables.tolist()], plan, rows, parts)


def _count_rejections(
    layout: FeatureLayout, parts: ReceivedParts, rows: Tensor, occurrences: Tensor
) -> None:
    """Count occurrences that a table rejects unseen: the index counts a rank's ids once."""
    tables = layout.source_tables
    rejected = torch.where(rows == UNKNOWN, occurrences - 1, 0)
    split = rejected.split(parts.sizes.tolist())
    for source, part in zip(parts.sources.tolist(), split, strict=True):
        table = tables[source]
        is_unseen = layout.sources[source].admits == "none"
        if is_unseen or table.storage.admission_counter is None:
            table.storage.header.tensor[NUM_REJECTED] += part.sum()


def gather_owned(layout: FeatureLayout, owned: OwnedIds) -> Tensor:
    """Return the rows of owned ids in the order of the message, dtype [r, embedding_dim]."""
    size, device = owned.rows.numel(), layout.device
    values = _gathered.empty(size, layout.embedding_dim, layout.dtype, device)
    point_to_data(owned.plan, values)
    embedding_bag.gather(owned.plan, *layout.row_type)
    return owned.parts.restore(values)


def point_to_data(plan: Plan, data: Tensor, firsts: npt.NDArray[np.int64] | None = None) -> None:
    """Point each line of a plan to its rows of ``data``.

    Args:
        plan: The plan.
        data: [n, ...].
        firsts: Where the rows of each line start; None means at its FIRST_ID.
    """
    stride = data.stride(0) * data.element_size()
    firsts = plan[:, fields.PLAN_FIRST_ID] if firsts is None else firsts
    plan[:, fields.PLAN_DATA] = data.data_ptr() + stride * firsts
    plan[:, fields.PLAN_DATA_STRIDE] = stride


__all__ = ["OwnedIds", "OwnedParts", "gather_owned", "look_up_owned", "point_to_data"]
