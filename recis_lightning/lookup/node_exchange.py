"""All-to-all over nodes: what the ranks of a node ask another node for travels once between them.

A rank sends ids, in its node, to the rank that has their owners' place there. That rank sends each
distinct one on to its owner; rows come back the same way. Rows are those of the plain exchange, to
the bit. Gradients are added up over the ranks of a node, by rank, before they travel on; then over
the nodes, by node.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.distributed.joined_messages import Message
from recis_lightning.distributed.nodes import Nodes
from recis_lightning.lookup.counted_ids import with_counts, without_counts
from recis_lightning.lookup.exchange_dtype import pack_rows
from recis_lightning.lookup.features import FeatureLayout
from recis_lightning.lookup.owned_ids import OwnedIds, gather_owned, look_up_owned
from recis_lightning.lookup.regrouping import received_parts
from recis_lightning.ops.async_copy import to_device_async

Counts = npt.NDArray[np.int64]


class NodeHop(NamedTuple):
    """Way of a lookup's ids from this rank over its node, and of what others send over this rank.

    Attributes:
        nodes: The nodes.
        order: int64 [u], position of each id that is sent among this rank's deduplicated ones.
        num_sent: Number of ids sent to each rank of this node; 0 to others.
        num_received: Number of ids received from each rank of this node.
        inverse: int64 [sum(num_received)], position of each among the ids that are sent on.
        num_forwarded: Number of ids sent on to each rank.
        num_owned: Number of ids received from each rank that this one owns.
    """

    nodes: Nodes
    order: Tensor
    num_sent: list[int]
    num_received: list[int]
    inverse: Tensor
    num_forwarded: list[int]
    num_owned: list[int]


def exchange_by_node(
    layout: FeatureLayout, counts: Counts, message: Tensor, training: bool
) -> Generator[Any, Any, tuple[NodeHop, OwnedIds, Tensor]]:
    """Fetch the rows of deduplicated ids from their owners; pause as ``exchange_rows`` does.

    Args:
        layout: The group's features, which have nodes.
        counts: int64 [num_ranks, num_sources], how many ids each rank owns.
        message: int64 [u] or [u, 2], the ids by owner, then source; with their occurrences.
        training: Insert unknown ids and stamp rows; otherwise only read.

    Returns:
        The way, the ids that this rank owns, and dtype [u, embedding_dim], the rows of ``message``.
    """
    nodes: Nodes = layout.nodes  # type: ignore[assignment]
    device, is_pair = layout.device, message.dim() == 2
    sent_counts, order = _by_place(counts, nodes)
    order_on_device = to_device_async(order, device)
    recv_counts = yield sent_counts
    num_sent: list[int] = sent_counts.sum(1).tolist()
    num_received: list[int] = recv_counts.sum(1).tolist()
    message = message[order_on_device]
    if recv_counts.shape == sent_counts.shape:
        ids = yield Message(message, num_received, num_sent)
    else:
        counted = yield with_counts(message, sent_counts, num_received)
        recv_counts, ids = without_counts(counted, sent_counts.shape[1], num_received, is_pair)
    forwarded, inverse, forwarded_counts = _join(ids, recv_counts, nodes, device)
    lines = [0] * len(counts)
    lines[nodes.peers] = [1] * nodes.num_nodes
    told = yield Message(to_device_async(forwarded_counts, device), lines, lines)
    owned_counts, num_forwarded = np.zeros_like(counts), [0] * len(counts)
    owned_counts[nodes.peers] = told.cpu().numpy()
    num_forwarded[nodes.peers] = forwarded_counts.sum(1).tolist()
    num_owned: list[int] = owned_counts.sum(1).tolist()
    ids, occurrences = (yield Message(forwarded, num_owned, num_forwarded)), None
    if is_pair:
        ids, occurrences = ids.T.contiguous().unbind()
    parts = received_parts(owned_counts, device)
    owned = look_up_owned(layout, parts, ids, occurrences, training)
    found = pack_rows(gather_owned(layout, owned), layout.exchange_dtype)
    rows = yield Message(found, num_forwarded, num_owned)
    rows = (yield Message(rows[inverse], num_sent, num_received)).to(layout.dtype)
    back = torch.empty_like(rows).index_copy_(0, order_on_device, rows)
    hop = NodeHop(nodes, order_on_device, num_sent, num_received, inverse, num_forwarded, num_owned)
    return hop, owned, back


def _by_place(counts: Counts, nodes: Nodes) -> tuple[Counts, npt.NDArray[np.int64]]:
    """Return what goes to each rank of this node, and in which order.

    Args:
        counts: int64 [num_ranks, num_sources], how many ids each rank owns.
        nodes: The nodes.

    Returns:
        int64 [num_ranks, num_nodes * num_sources], how many of each node's and source's ids go to
        each rank; int64 [u], positions of ids by place of their owner, then node.

    Example:
        >>> counts, order = _by_place(np.array([[1], [2], [1], [1]]), Nodes(2, 2, 0, 0))
        >>> counts.tolist(), order.tolist()
        ([[1, 1], [2, 1], [0, 0], [0, 0]], [0, 3, 1, 2, 4])
    """
    num_ranks, num_sources = counts.shape
    shape = nodes.num_nodes, nodes.size
    sent = np.zeros((num_ranks, nodes.num_nodes * num_sources), np.int64)
    sent[nodes.own] = counts.reshape(*shape, num_sources).swapaxes(0, 1).reshape(nodes.size, -1)
    sizes = counts.sum(1)
    starts = np.cumsum(sizes) - sizes
    by_place, its_starts = (part.reshape(shape).T.reshape(-1) for part in (sizes, starts))
    shifts = its_starts - (np.cumsum(by_place) - by_place)
    return sent, np.repeat(shifts, by_place) + np.arange(sizes.sum())


def _join(
    received: Tensor, counts: Counts, nodes: Nodes, device: torch.device
) -> tuple[Tensor, Tensor, Counts]:
    """Return each distinct id of each node and source once.

    Args:
        received: int64 [r] or [r, 2], ids (with occurrences) by rank, then node and source.
        counts: int64 [num_ranks, num_nodes * num_sources], how many there are of each.
        nodes: The nodes.
        device: Where they are.

    Returns:
        int64 [f] or [f, 2], by node, then source, then id, occurrences added up; int64 [r], the
        position there of each; int64 [num_nodes, num_sources], how many there are.
    """
    num_parts, is_pair = counts.shape[1], received.dim() == 2
    parts = np.repeat(np.tile(np.arange(num_parts), len(counts)), counts.reshape(-1))
    keys = to_device_async(parts, device)
    ids = received[:, 0] if is_pair else received
    order = torch.argsort(ids, stable=True)
    order = order[torch.argsort(keys[order], stable=True)]
    keys, sorted_ids = keys[order], ids[order]
    is_new = torch.ones_like(keys, dtype=torch.bool)
    is_new[1:] = (keys[1:] != keys[:-1]) | (sorted_ids[1:] != sorted_ids[:-1])
    inverse = torch.empty_like(order).index_copy_(0, order, is_new.cumsum(0) - 1)
    distinct = sorted_ids[is_new]
    per_part = torch.bincount(keys[is_new], minlength=num_parts).cpu().numpy()
    if is_pair:
        occurrences = torch.zeros_like(distinct).index_add_(0, inverse, received[:, 1].contiguous())
        distinct = torch.stack([distinct, occurrences], 1)
    return distinct, inverse, per_part.reshape(nodes.num_nodes, -1)


def ranks_heard_of(nodes: Nodes, sends: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return which ranks send gradients on to this one, or would if it owned any.

    Args:
        nodes: The nodes.
        sends: bool [num_ranks], which ranks have some.
    """
    of_nodes = sends.reshape(nodes.num_nodes, nodes.size).any(1)
    return np.repeat(of_nodes, nodes.size)


def forwarded_sizes(hop: NodeHop, sends: npt.NDArray[Any]) -> tuple[list[int], list[int]]:
    """Return how many gradients this rank gets from each rank, and sends on to each.

    Args:
        hop: Of the lookup.
        sends: bool [num_ranks], which ranks have some.
    """
    heard_of = ranks_heard_of(hop.nodes, sends)
    does_send = bool(heard_of[hop.nodes.own].any())
    received: list[int] = (np.array(hop.num_owned) * heard_of).tolist()
    return received, hop.num_forwarded if does_send else [0] * len(sends)


__all__ = ["NodeHop", "exchange_by_node", "forwarded_sizes", "ranks_heard_of"]
