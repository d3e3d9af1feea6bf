"""Order of received ids by table instead of by rank.

A message holds for each rank the ids of the first table, then those of the second, and so on. To
describe it part by part to kernels takes the host a line for each rank and table. Where these parts
are small, the ids are put into the order of tables instead, and a line a table is enough; then
their rows have to be put back, and gradients as well.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops.async_copy import to_device_async

IDS_OF_PART = 64
"""Mean number of ids below which parts are small: one costs as much time as copying their rows."""


class ReceivedParts(NamedTuple):
    """Parts of what a rank receives, each of one source (a table, and who may insert).

    Attributes:
        sources: int64 [num_parts], the source of each.
        sizes: int64 [num_parts], its number of ids, which lie one after the other.
        order: int64 [r], for each id its position in the message; None if that is the same order.
    """

    sources: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    order: Tensor | None

    def arrange(self, received: Tensor) -> Tensor:
        """Put what came for each id, [r, ...], into the order of the parts."""
        return received if self.order is None else received[self.order]

    def restore(self, values: Tensor) -> Tensor:
        """Put values for each id, [r, ...], back into the order of the message."""
        if self.order is None:
            return values
        return torch.empty_like(values).index_copy_(0, self.order, values)


def received_parts(counts: npt.NDArray[np.int64], device: torch.device) -> ReceivedParts:
    """Divide received ids into parts: by rank and source, or by source if the former are small.

    The order of a source's ids is that of the ranks either way, so rows and sums of gradients are
    the same.

    Args:
        counts: int64 [num_ranks, num_sources], how many ids came.
        device: Where they are.
    """
    num_ranks, num_sources = counts.shape
    if num_ranks == 1 or (num_sources > 1 and counts.sum() >= IDS_OF_PART * counts.size):
        sources = np.tile(np.arange(num_sources), num_ranks)
        return ReceivedParts(sources, counts.reshape(-1), None)
    return parts_by_source(counts, device)


def parts_by_source(counts: npt.NDArray[np.int64], device: torch.device) -> ReceivedParts:
    """Divide received ids into a part for each source; as ``received_parts``."""
    num_ranks, num_sources = counts.shape
    sources, sizes = np.arange(num_sources), counts.sum(0)
    if num_sources == 1:
        return ReceivedParts(sources, sizes, None)
    flat, by_source = counts.reshape(-1), counts.T.reshape(-1)
    starts = (np.cumsum(flat) - flat).reshape(num_ranks, num_sources).T.reshape(-1)
    shifts = starts - (np.cumsum(by_source) - by_source)
    order = np.repeat(shifts, by_source) + np.arange(counts.sum())
    return ReceivedParts(sources, sizes, to_device_async(order, device))


__all__ = ["IDS_OF_PART", "ReceivedParts", "parts_by_source", "received_parts"]
