"""Order of the rows of an epoch, and how ranks, lanes and batches share it: pure functions.

Splits, shuffled by (seed, epoch), are joined to *blocks* of at least ``shuffle_rows`` rows, and the
rows of a block are shuffled. So an epoch is a sequence of rows, the same on every rank, and what is
left of it is a list of *spans*. A *deal* shares spans out: the sequence is cut into as many runs of
equal length as there are ranks (to one row), a rank's run into lanes, and batch ``t`` of a rank
comes from lane ``t % lanes``. All ranks take the same number of batches. What no batch has taken
yet is again a list of spans, which another number of ranks may share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Block", "Deal", "Span", "blocks_of", "row_order", "whole"]


class Block(NamedTuple):
    """Splits whose rows are shuffled together.

    Attributes:
        splits: Indices of the splits, in order.
        num_rows: Their rows.
    """

    splits: tuple[int, ...]
    num_rows: int


class Span(NamedTuple):
    """Rows ``[start, stop)`` of a block, counted in the block's shuffled order."""

    block: int
    start: int
    stop: int


def blocks_of(sizes: Sequence[int], shuffle_rows: int, seed: int, epoch: int) -> list[Block]:
    """Shuffle splits and join them to blocks.

    Args:
        sizes: Rows of each split.
        shuffle_rows: Rows that a block has at least, the last excepted; 0 keeps the order of the
            splits, a block each.
        seed: Of the order.
        epoch: Another order for each.

    Example:
        >>> blocks_of([3, 2], shuffle_rows=0, seed=0, epoch=0)
        [Block(splits=(0,), num_rows=3), Block(splits=(1,), num_rows=2)]
        >>> blocks_of([3, 2, 4], shuffle_rows=4, seed=0, epoch=0)
        [Block(splits=(2,), num_rows=4), Block(splits=(0, 1), num_rows=5)]
    """
    if not shuffle_rows:
        return [Block((index,), size) for index, size in enumerate(sizes)]
    blocks, held, num_held = [], [], 0
    for index in _random(seed, epoch).permutation(len(sizes)).tolist():
        held.append(index)
        num_held += sizes[index]
        if num_held >= shuffle_rows:
            blocks.append(Block(tuple(held), num_held))
            held, num_held = [], 0
    return [*blocks, Block(tuple(held), num_held)] if held else blocks


def row_order(block: int, num_rows: int, shuffle_rows: int, seed: int, epoch: int) -> Tensor | None:
    """Return the shuffled order of a block's rows, int64 [num_rows]; None if they keep theirs."""
    if not shuffle_rows:
        return None
    return torch.from_numpy(_random(seed, epoch, block).permutation(num_rows))


def _random(*key: int) -> np.random.Generator:
    # PCG64 with a seed sequence: NumPy promises the same streams in later versions.
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def whole(blocks: Sequence[Block]) -> list[Span]:
    """Return all rows of an epoch."""
    return [Span(index, 0, block.num_rows) for index, block in enumerate(blocks) if block.num_rows]


class Deal:
    """Spans, shared out to ranks, lanes and batches.

    Args:
        spans: Rows to share.
        num_ranks: R.
        batch_size: Rows of a batch of one rank.
        lanes: Runs of rows that a rank reads side by side.
        drop_last: Whether rows that do not fill a batch on every rank are left out; otherwise a
            rank's last batch has between 1 and ``batch_size + 1`` rows (none, if there are fewer
            rows than ranks).

    Attributes:
        num_batches: Batches of each rank, T.

    Example:
        Seven rows for two ranks, by two: the runs have three and four rows.

        >>> deal = Deal([Span(0, 0, 5), Span(1, 0, 2)], num_ranks=2, batch_size=2)
        >>> deal.num_batches, deal.batch_sizes(0), deal.batch_sizes(1)
        (2, [2, 1], [2, 2])
        >>> deal.lanes_of(1)
        [[Span(block=0, start=3, stop=5), Span(block=1, start=0, stop=2)]]
        >>> deal.left_after(1)
        [Span(block=0, start=2, stop=3), Span(block=1, start=0, stop=2)]
    """

    def __init__(
        self,
        spans: Sequence[Span],
        num_ranks: int,
        batch_size: int,
        lanes: int = 1,
        drop_last: bool = False,
    ) -> None:
        total = sum(span.stop - span.start for span in spans)
        bounds = [total * rank // num_ranks for rank in range(1, num_ranks)]
        self._runs = _cut(spans, bounds)
        self._batch_size, self._lanes = batch_size, lanes
        self._drop_last = drop_last
        least = total // num_ranks
        if drop_last:
            self.num_batches = least // batch_size
        else:
            self.num_batches = max(-(-least // batch_size), min(total, 1))

    def batch_sizes(self, rank: int) -> list[int]:
        """Return the rows of each batch of a rank."""
        sizes = [self._batch_size] * self.num_batches
        if sizes and not self._drop_last:
            rows = sum(span.stop - span.start for span in self._runs[rank])
            sizes[-1] = rows - self._batch_size * (self.num_batches - 1)
        return sizes

    def lanes_of(self, rank: int) -> list[list[Span]]:
        """Return the spans of each lane of a rank, in order; its batches take them in turn."""
        sizes = self.batch_sizes(rank)
        rows = [sum(sizes[lane :: self._lanes]) for lane in range(self._lanes)]
        return _cut(self._runs[rank], np.cumsum(rows).tolist())[: self._lanes]

    def left_after(self, num_batches: int) -> list[Span]:
        """Return what is left of the rows after ``num_batches`` of every rank, in order."""
        left: list[Span] = []
        for rank in range(len(self._runs)):
            sizes = self.batch_sizes(rank)[:num_batches]
            for lane, spans in enumerate(self.lanes_of(rank)):
                left += _cut(spans, [sum(sizes[lane :: self._lanes])])[1]
        return left


def _cut(spans: Sequence[Span], bounds: Sequence[int]) -> list[list[Span]]:
    """Cut a sequence of rows at ascending positions into ``len(bounds) + 1`` parts."""
    parts: list[list[Span]] = [[]]
    position, ends = 0, list(bounds)
    for span in spans:
        start = span.start
        while ends and ends[0] < position + span.stop - start:
            middle = start + ends.pop(0) - position
            if middle > start:
                parts[-1].append(Span(span.block, start, middle))
            parts.append([])
            position, start = position + middle - start, middle
        parts[-1].append(Span(span.block, start, span.stop))
        position += span.stop - start
    return parts + [[] for _ in ends]
