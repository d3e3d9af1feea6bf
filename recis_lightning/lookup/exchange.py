"""All-to-all of one lookup: ids to their owners, rows back.

TorchRec's names: *input_dist* sends ids, *lookup* finds their rows at the owner, *output_dist*
sends rows back. All tables of a group travel together. A message to a rank holds the ids of the
first table, then those of the second, and so on, each id once; a matrix of counts goes ahead. So
nothing but ids and rows travels with an id.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from recis_lightning.distributed.joined_messages import Message
from recis_lightning.lookup.dedup import DeduplicatedIds
from recis_lightning.lookup.exchange_dtype import pack_rows
from recis_lightning.lookup.features import FeatureLayout, point_to_rows
from recis_lightning.lookup.local import find_or_insert_rows
from recis_lightning.lookup.regrouping import ReceivedParts, received_parts
from recis_lightning.ops import backend, embedding_bag, hash_index
from recis_lightning.ops import layout as fields
from recis_lightning.ops.async_copy import to_device_async
from recis_lightning.ops.embedding_bag import Plan
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import (
    BLOCK_SHIFT,
    BLOCKS,
    NUM_REJECTED,
    PLAN_SIZE,
    ROW_BYTES,
    SEGMENT_HEADER,
    SEGMENT_IDS,
    SEGMENT_START,
    UNKNOWN,
)
from recis_lightning.table.hash_table import HashTable

Counts = npt.NDArray[np.int64]  # [num_ranks, num_sources], how many ids of each


def exchange_rows(
    layout: FeatureLayout,
    deduplicated: DeduplicatedIds,
    training: bool,
    occurrences_of: Tensor | None = None,
) -> Generator[Counts | Message, Any, ShardExchange]:
    """Fetch the rows of deduplicated ids from their owners; pause where messages travel.

    Pauses as ``RowSource.fetch`` says.

    Args:
        layout: The group's features; of each table this rank has a shard.
        deduplicated: The ids that this rank looks up.
        training: Insert unknown ids and stamp rows; otherwise only read.
        occurrences_of: int64 [n], how many occurrences each position of the lookup stands for;
            None means 1.
    """
    recv_counts = yield deduplicated.counts
    num_sent: list[int] = deduplicated.counts.sum(1).tolist()
    num_received: list[int] = recv_counts.sum(1).tolist()
    needs_occurrences = training and layout.counts_occurrences
    message = deduplicated.ids
    if needs_occurrences:
        message = torch.stack([message, deduplicated.occurrences(occurrences_of)], 1)
    ids, occurrences = (yield Message(message, num_received, num_sent)), None
    if needs_occurrences:
        ids, occurrences = ids.T.contiguous().unbind()
    owned = _look_up(layout, recv_counts, ids, occurrences, training)
    layout.bring_in(owned.plan, owned.rows, writes=training)
    found = pack_rows(_gather(layout, owned), layout.exchange_dtype)
    rows = yield Message(found, num_sent, num_received)
    return ShardExchange(Route(layout, num_sent, num_received, owned), rows.to(layout.dtype))


class OwnedIds(NamedTuple):
    """Ids that this rank owns and was asked for, in parts of one table each.

    Attributes:
        part_tables: Table of each part that is not empty.
        plan: int64 [num_parts, PLAN_SIZE], of those parts.
        rows: int64 [r], this shard's rows of the ids.
        parts: Their order.
    """

    part_tables: list[HashTable]
    plan: Plan
    rows: Tensor
    parts: ReceivedParts


def _look_up(
    layout: FeatureLayout,
    recv_counts: npt.NDArray[np.int64],
    ids: Tensor,
    occurrences: Tensor | None,
    training: bool,
) -> OwnedIds:
    """Find this shard's rows of received ids, int64 [r]; in training insert unknown ids.

    Args:
        layout: The group's features.
        recv_counts: int64 [num_ranks, num_sources].
        ids: int64 [r], by rank, then source.
        occurrences: int64 [r], how often each id occurs at its rank; None if nobody counts.
        training: As for ``exchange_rows``.
    """
    tables = layout.source_tables
    parts = received_parts(recv_counts, layout.device)
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


def _gather(layout: FeatureLayout, owned: OwnedIds) -> Tensor:
    """Return the rows of owned ids in the order of the message, dtype [r, embedding_dim]."""
    size, device = owned.rows.numel(), layout.device
    values = torch.empty(size, layout.embedding_dim, dtype=layout.dtype, device=device)
    point_to_data(owned.plan, values)
    embedding_bag.gather(owned.plan, *layout.row_type)
    return owned.parts.restore(values)


class Route(NamedTuple):
    """Way that ids took to their owners, by which gradients go.

    Attributes:
        layout: The group's features.
        num_sent: Number of ids sent to each rank.
        num_received: Number of ids received from each rank.
        owned: The ids received.
    """

    layout: FeatureLayout
    num_sent: list[int]
    num_received: list[int]
    owned: OwnedIds


class ShardExchange(NamedTuple):
    """Finished exchange of a lookup.

    Attributes:
        route: Way back to the owners.
        rows: dtype [u, embedding_dim], the rows of this rank's deduplicated ids.
    """

    route: Route
    rows: Tensor


def point_to_data(plan: Plan, data: Tensor) -> None:
    """Point each line of a plan to its rows of ``data``, which start at its FIRST_ID."""
    stride = data.stride(0) * data.element_size()
    plan[:, fields.PLAN_DATA] = data.data_ptr() + stride * plan[:, fields.PLAN_FIRST_ID]
    plan[:, fields.PLAN_DATA_STRIDE] = stride


def header_over(rows: Tensor) -> tuple[Header, tuple[Tensor, ...]]:
    """Return a table's header for rows that lie one after the other, and what it points to.

    Beside a GPU, whose kernels load four words at once, these are copies if the rows' size is no
    multiple of 16 bytes.
    """
    lacking = -rows.shape[1] * rows.element_size() % 16
    if lacking and backend.is_async(rows.device):
        rows = functional.pad(rows, (0, lacking // rows.element_size()))
    header = Header(rows.device, backend.is_async(rows.device))
    blocks = to_device_async(np.array([rows.data_ptr()]), rows.device)
    header.fields[BLOCKS] = blocks.data_ptr()
    header.fields[BLOCK_SHIFT] = len(rows).bit_length()
    header.fields[ROW_BYTES] = rows.stride(0) * rows.element_size()
    header.publish()
    return header, (rows, blocks)


__all__ = [
    "Counts",
    "OwnedIds",
    "Route",
    "ShardExchange",
    "exchange_rows",
    "header_over",
    "point_to_data",
]
