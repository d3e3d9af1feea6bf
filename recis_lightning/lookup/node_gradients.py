"""Gradients on their way over a node: added up over its ranks before they travel to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.distributed.joined_messages import Message, exchange_messages
from recis_lightning.lookup.exchange import Route
from recis_lightning.lookup.exchange_dtype import pack_gradients, unpack_gradients
from recis_lightning.lookup.features import point_to_rows
from recis_lightning.lookup.gradient_sums import sum_gradients, with_zeros
from recis_lightning.lookup.node_exchange import NodeHop, forwarded_sizes, ranks_heard_of
from recis_lightning.lookup.owned_ids import point_to_data
from recis_lightning.ops import layout as fields
from recis_lightning.ops.layout import PLAN_SIZE


def forward_gradients(
    routes: Sequence[Route], come: list[Tensor], sends: npt.NDArray[Any], purpose: str
) -> None:
    """Send on what goes over this rank, and replace it by what has come for its own rows.

    Args:
        routes: Of the lookups.
        come: For each the gradients that came from this node, float32 [r, embedding_dim + 1].
        sends: bool [num_ranks, num_lookups], whether the rank has gradients for it.
        purpose: What the rank does next.
    """
    hops = [(i, route.hop) for i, route in enumerate(routes) if route.hop is not None]
    if not hops:
        return
    messages = []
    for number, hop in hops:
        num_received, num_sent = forwarded_sizes(hop, sends[:, number])
        sums = _sums_of_node(come[number], hop) if sum(num_sent) else come[number][:0]
        packed = pack_gradients(sums, routes[number].layout.exchange_dtype)
        messages.append(Message(packed, num_received, num_sent))
    answers = exchange_messages(messages, lambda: purpose, routes[0].layout.process_group)
    for (number, hop), answer in zip(hops, answers, strict=True):
        gradients = unpack_gradients(answer, routes[number].layout.exchange_dtype)
        heard_of = ranks_heard_of(hop.nodes, sends[:, number])
        if not heard_of.all():
            gradients = with_zeros(gradients, hop.num_owned, heard_of)
        come[number] = gradients


def _sums_of_node(gradients: Tensor, hop: NodeHop) -> Tensor:
    """Add gradients of the ranks of this node up for each id that goes on, by rank.

    Args:
        gradients: float32 [r, embedding_dim + 1]; the last column is added up as well.
        hop: Of the lookup.
    """
    sums = gradients.new_zeros(sum(hop.num_forwarded), gradients.shape[1])
    plan = np.zeros((1, PLAN_SIZE), np.int64)
    plan[0, fields.PLAN_MODE], plan[0, fields.PLAN_BAG_LENGTH] = fields.NONE, 1
    plan[0, fields.PLAN_NUM_BAGS] = plan[0, fields.PLAN_NUM_IDS] = len(gradients)
    point_to_rows(plan, hop.inverse)
    point_to_data(plan, gradients)
    sum_gradients(plan, sums, 1.0)
    counts = torch.zeros_like(sums[:, -1]).index_add_(0, hop.inverse, gradients[:, -1].contiguous())
    sums[:, -1] = counts  # whole numbers: in any order
    return sums


__all__ = ["forward_gradients"]
