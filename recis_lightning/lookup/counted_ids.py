"""Ids that travel with the counts of their tables, which are too many for a head.

A head says how many ids a rank sends to another in all. So the other knows the size of a message
that begins with the counts of each source, and is as long as they and the ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from recis_lightning.distributed.joined_messages import Message, by_part, by_rank
from recis_lightning.ops.async_copy import to_device_async

Counts = npt.NDArray[np.int64]  # [num_ranks, num_sources]


def with_counts(ids: Tensor, counts: Counts, num_received: Sequence[int]) -> Message:
    """Return a message of ids and, before those of each rank, their counts.

    Args:
        ids: int64 [n] or [n, 2], by rank.
        counts: How many of each source go to each rank.
        num_received: How many come from each rank.
    """
    width = ids.shape[1] if ids.dim() == 2 else 1
    sent, received = _sizes(counts, counts.sum(1), width), _sizes(counts, num_received, width)
    told = to_device_async(np.ascontiguousarray(counts).reshape(-1), ids.device)
    message = by_rank([told, ids.reshape(-1)], sent)
    return Message(message, received.sum(1).tolist(), sent.sum(1).tolist())


def without_counts(
    received: Tensor, num_sources: int, num_received: Sequence[int], is_pair: bool
) -> tuple[Counts, Tensor]:
    """Return the counts and the ids of messages that ``with_counts`` made.

    Args:
        received: int64 [m], by rank.
        num_sources: Of the lookup, the same on all ranks.
        num_received: How many ids came from each rank.
        is_pair: Whether ids are [n, 2].

    Example:
        >>> import torch
        >>> message = with_counts(torch.tensor([7, 8, 9]), np.array([[1, 2]]), [3])
        >>> message.tensor, without_counts(message.tensor, 2, [3], False)
        (tensor([1, 2, 7, 8, 9]), (array([[1, 2]]), tensor([7, 8, 9])))
    """
    num_ranks, width = len(num_received), 2 if is_pair else 1
    counts = np.empty((num_ranks, num_sources), np.int64)
    told, ids = by_part(received, _sizes(counts, num_received, width))
    ids = ids.view(-1, 2) if is_pair else ids
    return told.cpu().numpy().reshape(num_ranks, num_sources), ids


def _sizes(counts: Counts, num_ids: Sequence[int] | Counts, width: int) -> Counts:
    """Return how many numbers of each part go to each rank, int64 [num_ranks, 2]."""
    num_ranks, num_sources = counts.shape
    return np.stack([np.full(num_ranks, num_sources), width * np.asarray(num_ids)], 1)


__all__ = ["with_counts", "without_counts"]
