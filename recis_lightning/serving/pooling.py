"""Pooling of bags in NumPy, to the bit as the CPU's kernels pool.

A kernel adds up a bag's rows in their order, in float32, and multiplies and adds weighted rows in
one rounding. Here one step takes the next row of every bag.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


class Bags(NamedTuple):
    """Bags of ids.

    Attributes:
        starts: int64 [B], where each begins.
        lengths: int64 [B].
        length: That of all bags, which lie one behind the other; None where they may differ.
    """

    starts: Integers
    lengths: Integers
    length: int | None = None


def pool(
    rows: Floats,
    known: npt.NDArray[np.bool_],
    padding: npt.NDArray[np.bool_] | None,
    bags: Bags,
    mode: str,
    weights: Floats | None,
) -> Floats:
    """Return the pooled rows of each bag, float32 [B, dim].

    Args:
        rows: float32 [n, dim]; zeros where an id has none.
        known: bool [n], whether an id has a row.
        padding: bool [n], whether an id is padding; None: none is.
        bags: Of the ids.
        mode: "sum", "mean" or "mean_by_count".
        weights: float32 [n] or None.

    Example:
        >>> rows = np.array([[1], [2], [3]], np.float32)
        >>> bags = Bags(np.array([0, 2]), np.array([2, 1]))
        >>> pool(rows, np.ones(3, bool), None, bags, "mean", None).tolist()
        [[1.5], [3.0]]
    """
    num_bags = len(bags.starts)
    total = np.zeros((num_bags, rows.shape[1]), np.float32)
    divisor = np.zeros(num_bags, np.float32)
    by_weights = mode == "mean" and weights is not None
    order, num_steps = None, bags.length or 0
    index: Any
    if bags.length is None:
        order = np.argsort(-bags.lengths, kind="stable")  # at each step, the bags left come first
        starts, shorter_first = bags.starts[order], -bags.lengths[order]
        num_steps = -int(shorter_first[0]) if num_bags else 0
    with np.errstate(all="ignore"):
        for place in range(num_steps):
            left, index = num_bags, slice(place, None, bags.length)
            if order is not None:
                left = int(np.searchsorted(shorter_first, -place, side="left"))
                index = starts[:left] + place
            part = total[:left]
            if weights is None:
                part += rows[index]
            else:
                added = multiply_add(rows[index], weights[index, None], part)
                np.copyto(part, added, where=known[index, None])
            if mode != "sum":
                shares = weights[index] if by_weights and weights is not None else _ONE
                counted = _ONE if padding is None else (~padding[index]).astype(np.float32)
                if padding is None:
                    divisor[:left] += shares
                else:
                    divisor[:left] += np.where(counted > 0, shares, np.float32(0))
        if mode != "sum":
            mean = total / divisor[:, None]
            total = np.where(divisor[:, None] == 0, np.float32(0), mean)
    if order is None:
        return total
    pooled = np.empty_like(total)
    pooled[order] = total
    return pooled


_ONE = np.float32(1)


def multiply_add(one: Floats, other: Floats, added: Floats) -> Floats:
    """Return ``one * other + added``, rounded once.

    In float64 the product is exact. The sum is rounded to odd, after which rounding it to float32
    gives what rounding the exact sum would have.

    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008.

    Example:
        >>> one = np.float32([1 + 2**-12])
        >>> float(multiply_add(one, one, np.float32([-1]))[0]) == 2**-11 + 2**-24
        True
    """
    product, term = one.astype(np.float64) * other, added.astype(np.float64)
    total = product + term
    share = total - product
    error = (product - (total - share)) + (term - share)
    bits = total.view(np.int64)
    is_rounded = (error != 0) & np.isfinite(total) & ((bits & 1) == 0)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where(is_rounded, bits + towards, bits).view(np.float64)
    return odd.astype(np.float32)


def tile(rows: Floats, bags: Bags, tile_len: int) -> Floats:
    """Return the first rows of each bag side by side, zero padded, float32 [B, tile_len * dim].

    Args:
        rows: float32 [n, dim], multiplied by weights if there are any.
        bags: Of the ids.
        tile_len: Rows of a bag.
    """
    dim = rows.shape[1]
    tiles = np.zeros((len(bags.starts), tile_len, dim), np.float32)
    place = np.arange(tile_len)
    used = place < bags.lengths[:, None]
    tiles[used] = rows[(bags.starts[:, None] + place)[used]]
    return tiles.reshape(len(tiles), tile_len * dim)


__all__ = ["Bags", "multiply_add", "pool", "tile"]
