"""Ranking of a table's rows, over all ranks: which come first by their keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def count_marked(mask: Tensor) -> int:
    """Return the number of true items of a bool tensor; NumPy is many times as fast as ``sum``."""
    if mask.device.type == "cpu":
        return int(np.count_nonzero(mask.numpy()))
    return int(torch.count_nonzero(mask))


_DIGIT_BITS = 16


def lowest(
    keys: Sequence[Tensor],
    candidates: Tensor,
    count: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> Tensor:
    """Mark the ``count`` rows that come first by ``keys``, over all ranks.

    A radix selection: ranks sum the number of candidates with each value of a digit, from the
    highest digit on, and keep as candidates those with the value at which ``count`` is reached. No
    rank sees the rows of another.

    Args:
        keys: int64 [rows] each; the last one is different for any two rows of all ranks.
        candidates: bool [rows].
        count: Number of rows to mark, at most that of candidates.
        sum_over_ranks: As in ``RowColumns``.

    Returns:
        bool [rows].
    """
    marked = torch.zeros_like(candidates)
    if count <= 0:
        return marked
    left = candidates.nonzero().squeeze(1)
    for key in keys:
        for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
            digits = (key[left] >> shift) & ((1 << _DIGIT_BITS) - 1)
            if shift == 64 - _DIGIT_BITS:  # the sign bit: negative numbers come first
                digits ^= 1 << (_DIGIT_BITS - 1)
            reached = sum_over_ranks(torch.bincount(digits, minlength=1 << _DIGIT_BITS)).cumsum(0)
            at = int(torch.searchsorted(reached, count))
            marked[left[digits < at]] = True
            count -= int(reached[at - 1]) if at else 0
            left = left[digits == at]
            if count == int(reached[at]) - (int(reached[at - 1]) if at else 0):
                marked[left] = True
                return marked
    return marked


def ascending(scores: Tensor) -> Tensor:
    """Return int64 keys in the order of float64 scores that are >= 0 and no NaN.

    Example:
        >>> keys = ascending(torch.tensor([0.5, 0.0, 3.0], dtype=torch.float64))
        >>> keys.argsort().tolist()
        [1, 0, 2]
    """
    return scores.contiguous().view(torch.int64)


__all__ = ["ascending", "count_marked", "lowest"]
