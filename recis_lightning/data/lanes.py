"""Reading the blocks of a run of rows, one ahead, and cutting them into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from torch import Tensor

from recis_lightning.data.file_reader import Split
from recis_lightning.data.order import Block, Deal, Span, row_order
from recis_lightning.data.rows import Batch, join_rows, select_rows

__all__ = ["Lane", "Plan"]


class Plan(NamedTuple):
    """Rest of an epoch.

    Attributes:
        blocks: Blocks of the epoch.
        deal: Share of today's ranks in what earlier numbers of ranks left.
        first: Batches of the epoch before the next one.
        skipped: Batches of ``deal`` among them.
        splits: Splits that the blocks are made of.
        epoch: The epoch.
    """

    blocks: Sequence[Block]
    deal: Deal
    first: int
    skipped: int
    splits: Sequence[Split]
    epoch: int


class Lane:
    """Reader of one lane: its spans, and the block that it is in.

    Args:
        read_block: Function that reads the rows of a block.
        empty: Function that returns a batch without rows.
        blocks: Blocks of the epoch.
        spans: Rows of the lane.
        order: ``shuffle_rows``, seed and epoch.
        pool: Where the next block is read; None reads none ahead.
    """

    def __init__(
        self,
        read_block: Callable[[Block], Batch],
        empty: Callable[[], Batch],
        blocks: Sequence[Block],
        spans: Sequence[Span],
        order: tuple[int, int, int],
        pool: ThreadPoolExecutor | None,
    ) -> None:
        self._read_block, self._empty = read_block, empty
        self._blocks, self._pool, self._shuffle = blocks, pool, order
        self._spans = list(reversed(spans))
        self._block = self._next_block = -1
        self._rows: Batch = {}
        self._order: Tensor | None = None
        self._next: Future[Batch] | None = None

    def skip(self, num_rows: int) -> None:
        """Pass over rows without reading them."""
        for _ in self._pieces(num_rows):
            pass

    def take(self, num_rows: int) -> Batch:
        """Return the next rows, as a copy."""
        parts = []
        for span in self._pieces(num_rows):
            self._open(span.block)
            rows: Tensor | slice = slice(span.start, span.stop)
            if self._order is not None:
                rows = self._order[rows]
            parts.append({name: select_rows(value, rows) for name, value in self._rows.items()})
        return join_rows(parts) if parts else self._empty()

    def _pieces(self, num_rows: int) -> Iterator[Span]:
        while num_rows:
            block, start, stop = self._spans.pop()
            middle = min(stop, start + num_rows)
            if middle < stop:
                self._spans.append(Span(block, middle, stop))
            num_rows -= middle - start
            yield Span(block, start, middle)

    def _open(self, block: int) -> None:
        """Make a block the current one, and start to read the one after it."""
        if block == self._block:
            return
        self._rows = {}
        if self._next is not None and block == self._next_block:
            self._rows = self._next.result()
        else:
            self._rows = self._read_block(self._blocks[block])
        self._order = row_order(block, self._blocks[block].num_rows, *self._shuffle)
        self._block, self._next = block, None
        later = next((span.block for span in reversed(self._spans) if span.block != block), -1)
        if later >= 0 and self._pool is not None:
            self._next_block = later
            self._next = self._pool.submit(self._read_block, self._blocks[later])
