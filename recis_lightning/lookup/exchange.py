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
from recis_lightning.lookup.counted_ids import with_counts, without_counts
from recis_lightning.lookup.dedup import DeduplicatedIds
from recis_lightning.lookup.exchange_dtype import pack_rows
from recis_lightning.lookup.features import FeatureLayout
from recis_lightning.lookup.node_exchange import NodeHop, exchange_by_node
from recis_lightning.lookup.owned_ids import OwnedIds, gather_owned, look_up_owned
from recis_lightning.lookup.regrouping import received_parts
from recis_lightning.ops import backend
from recis_lightning.ops.async_copy import to_device_async
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import BLOCK_SHIFT, BLOCKS, ROW_BYTES

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
    needs_occurrences = training and layout.counts_occurrences
    message = deduplicated.ids
    if needs_occurrences:
        message = torch.stack([message, deduplicated.occurrences(occurrences_of)], 1)
    if layout.nodes is not None:
        num_sent: list[int] = deduplicated.counts.sum(1).tolist()
        hop, owned, rows = yield from exchange_by_node(
            layout, deduplicated.counts, message, training
        )
        return ShardExchange(Route(layout, num_sent, hop.num_owned, owned, hop), rows)
    recv_counts = yield deduplicated.counts
    num_sent = deduplicated.counts.sum(1).tolist()
    num_received: list[int] = recv_counts.sum(1).tolist()
    if recv_counts.shape == deduplicated.counts.shape:
        ids = yield Message(message, num_received, num_sent)
    else:  # known are the numbers of all tables together
        counted = yield with_counts(message, deduplicated.counts, num_received)
        num_sources = deduplicated.counts.shape[1]
        recv_counts, ids = without_counts(counted, num_sources, num_received, needs_occurrences)
    occurrences = None
    if needs_occurrences:
        ids, occurrences = ids.T.contiguous().unbind()
    parts = received_parts(recv_counts, layout.device)
    owned = look_up_owned(layout, parts, ids, occurrences, training)
    found = pack_rows(gather_owned(layout, owned), layout.exchange_dtype)
    rows = yield Message(found, num_sent, num_received)
    return ShardExchange(Route(layout, num_sent, num_received, owned), rows.to(layout.dtype))


class Route(NamedTuple):
    """Way that ids took to their owners, by which gradients go.

    Attributes:
        layout: The group's features.
        num_sent: Number of ids that each rank owns of those that this one asked for.
        num_received: Number of ids received from each rank.
        owned: The ids received.
        hop: Way over the ranks of this node, where ids take one.
    """

    layout: FeatureLayout
    num_sent: list[int]
    num_received: list[int]
    owned: OwnedIds
    hop: NodeHop | None = None

    @property
    def first_sent(self) -> list[int]:
        """Number of ids that went to each rank first: to the owner, or in this node."""
        return self.num_sent if self.hop is None else self.hop.num_sent

    @property
    def first_received(self) -> list[int]:
        """Number of ids that came from each rank first."""
        return self.num_received if self.hop is None else self.hop.num_received


class ShardExchange(NamedTuple):
    """Finished exchange of a lookup.

    Attributes:
        route: Way back to the owners.
        rows: dtype [u, embedding_dim], the rows of this rank's deduplicated ids.
    """

    route: Route
    rows: Tensor


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
    "Route",
    "ShardExchange",
    "exchange_rows",
    "header_over",
]
