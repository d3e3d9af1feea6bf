"""Rows in fixed-size blocks: growth copies nothing.

A row is a table's weights for one id and the optimizer's state behind them, so that one update is
one contiguous read and write. Blocks never move; kernels find them through a table of their
addresses.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import row_columns
from recis_lightning.ops.row_columns import Column
from recis_lightning.ops.table_header import (
    BLOCK_SHIFT,
    BLOCKS,
    FREE_ROWS,
    NEXT_ROW,
    NUM_FREE,
    NUM_STATE,
    ROW_BYTES,
    STATE_FILL,
)

_BLOCK_BYTES = 1 << 18  # about this much a block: small tables stay small, tables of blocks too
_LINE_BYTES = 64
_PIECE_ROWS = 1 << 16  # rows read or written at once where all of them are copied


class RowStore:
    """The rows of one table.

    Args:
        header: The table's header; the store owns its row fields.
        embedding_dim: Weights in a row.
        dtype: float32 or bfloat16 weights; state is float32.
        slots: Optimizer state: name -> float32 words a row.
        state_fill: What state starts from.
    """

    def __init__(
        self,
        header: Tensor,
        embedding_dim: int,
        dtype: torch.dtype,
        slots: dict[str, int] | None = None,
        state_fill: float = 0.0,
    ) -> None:
        self.header = header
        self.embedding_dim = embedding_dim
        self.dtype = dtype
        self._header = header.numpy()
        self._header[NEXT_ROW] = self._header[NUM_FREE] = 0
        self._chunks: list[npt.NDArray[np.float32]] = []
        self._set_layout(dict(slots or {}), state_fill)
        self.set_free_rows(torch.empty(0, dtype=torch.int64))

    def _set_layout(self, slots: dict[str, int], state_fill: float) -> None:
        self.slots, self.state_fill = slots, state_fill
        self.row_words = self.weight_words + sum(slots.values())
        row_bytes = 4 * self.row_words
        shift = max(3, (_BLOCK_BYTES // row_bytes).bit_length() - 1)
        self.block_shift = shift
        self.addresses = np.empty(0, np.int64)
        header = self._header
        header[ROW_BYTES], header[BLOCK_SHIFT] = row_bytes, shift
        header[NUM_STATE] = sum(slots.values())
        header[STATE_FILL] = np.float64(state_fill).view(np.int64)
        header[BLOCKS] = self.addresses.ctypes.data

    @property
    def weight_words(self) -> int:
        """Float32 words that the weights of a row take."""
        return self.embedding_dim if self.dtype is torch.float32 else (self.embedding_dim + 1) // 2

    @property
    def num_rows(self) -> int:
        """Rows that were ever handed out, freed ones included."""
        return int(self._header[NEXT_ROW])

    @property
    def capacity(self) -> int:
        """Rows there is memory for."""
        return len(self.addresses) << self.block_shift

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, the addresses and the list of freed rows."""
        blocks = sum(chunk.nbytes for chunk in self._chunks)
        return blocks + self.addresses.nbytes + self._free_rows.nbytes

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer state in all blocks."""
        return 4 * sum(self.slots.values()) * self.capacity

    def reserve(self, num_new: int) -> None:
        """Make room for ``num_new`` rows more; freed rows count as room."""
        unused = self.capacity - self.num_rows + int(self._header[NUM_FREE])
        if num_new <= unused:
            return
        block_rows = 1 << self.block_shift
        missing = -(-(num_new - unused) // block_rows)
        num_blocks = max(missing, len(self.addresses) // 8)
        words = num_blocks * block_rows * self.row_words
        chunk = self._allocate(words)
        self._chunks.append(chunk)
        first, size = chunk.ctypes.data, 4 * self.row_words * block_rows
        new = first + size * np.arange(num_blocks, dtype=np.int64)
        self.addresses = np.concatenate([self.addresses, new])
        self._header[BLOCKS] = self.addresses.ctypes.data

    def blocks_for(self, num_rows: int) -> int:
        """Return how many blocks hold so many rows."""
        return -(-num_rows >> self.block_shift)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy whole rows to other places.

        Args:
            source: int64 [n].
            target: int64 [n], distinct, none of them in ``source``.
        """
        words = torch.empty(min(source.numel(), _PIECE_ROWS), self.row_words)
        for start in range(0, source.numel(), _PIECE_ROWS):
            piece = slice(start, min(start + _PIECE_ROWS, source.numel()))
            columns = [Column(words[: piece.stop - piece.start], 0)]
            row_columns.read_columns(self.header, source[piece], columns)
            row_columns.write_columns_(self.header, target[piece], columns)

    def shrink(self, num_rows: int) -> None:
        """Keep the first ``num_rows`` rows, none of them freed, and the blocks that hold them.

        The blocks of an allocation that is kept in part are copied to one of their size.
        """
        num_blocks = self.blocks_for(num_rows)
        kept, first = [], 0
        for chunk in self._chunks:
            blocks = chunk.size // (self.row_words << self.block_shift)
            wanted = min(blocks, num_blocks - first)
            if wanted == blocks:
                kept.append(chunk)
            elif wanted > 0:
                words = (wanted << self.block_shift) * self.row_words
                smaller = self._allocate(words)
                smaller[:] = chunk[:words]
                kept.append(smaller)
            first += blocks
        self._chunks = kept
        size = 4 * self.row_words << self.block_shift
        starts = [
            chunk.ctypes.data + np.arange(0, chunk.nbytes, size, dtype=np.int64) for chunk in kept
        ]
        self.addresses = np.concatenate([np.empty(0, np.int64), *starts])
        self._header[BLOCKS] = self.addresses.ctypes.data
        self._header[NEXT_ROW] = num_rows
        self.set_free_rows(torch.empty(0, dtype=torch.int64))

    def _allocate(self, words: int) -> npt.NDArray[np.float32]:
        # NumPy, unlike torch, asks for huge pages; rows start on a cache line.
        buffer = np.empty(4 * words + _LINE_BYTES, np.uint8)
        skip = -buffer.ctypes.data % _LINE_BYTES
        return buffer[skip : skip + 4 * words].view(np.float32)

    def set_free_rows(self, rows: Tensor) -> None:
        """Replace the stack of freed rows; the last one is reused first."""
        self._free_rows = rows.contiguous()
        self._header[FREE_ROWS] = self._free_rows.data_ptr()
        self._header[NUM_FREE] = rows.numel()

    @property
    def free_rows(self) -> Tensor:
        """int64 [n], the stack of freed rows."""
        return self._free_rows[: int(self._header[NUM_FREE])]

    def relayout(self, slots: dict[str, int], state_fill: float) -> None:
        """Change the optimizer state behind the weights, keeping weights and slots that stay.

        Raises:
            MemoryError: No room for both layouts at once; the store is as it was.
        """
        if list(slots.items()) == list(self.slots.items()):
            self.state_fill = state_fill
            self._header[STATE_FILL] = np.float64(state_fill).view(np.int64)
            return
        old = RowStore.__new__(RowStore)
        old.__dict__.update(self.__dict__)
        old.header = self.header.clone()
        self._chunks = []
        self._set_layout(dict(slots), state_fill)
        free = int(self._header[NUM_FREE])
        self._header[NUM_FREE] = 0
        count = self.num_rows
        self._header[NEXT_ROW] = 0
        try:
            self.reserve(count)
        except MemoryError:
            header = self.header
            header.copy_(old.header)
            self.__dict__.update(old.__dict__)
            self.header = header
            raise
        self._header[NEXT_ROW], self._header[NUM_FREE] = count, free
        for start in range(0, count, _PIECE_ROWS):
            rows = torch.arange(start, min(start + _PIECE_ROWS, count))
            weights, state = old.read(rows)
            kept = {name: state[name] for name in slots if old.slots.get(name) == slots[name]}
            self.write(rows, weights, kept)

    def read(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Copy rows out.

        Args:
            rows: int64 [n], none negative.

        Returns:
            weights: [n, embedding_dim] in the store's dtype.
            slots: name -> float32 [n, words].
        """
        weights = torch.empty(rows.numel(), self.embedding_dim, dtype=self.dtype)
        slots = {name: torch.empty(rows.numel(), words) for name, words in self.slots.items()}
        row_columns.read_columns(self.header, rows, self._columns(weights, slots))
        return weights, slots

    def write(self, rows: Tensor, weights: Tensor, slots: dict[str, Tensor]) -> None:
        """Overwrite whole rows; slots that are not given start afresh.

        Args:
            rows: int64 [n], distinct.
            weights: [n, embedding_dim] in the store's dtype.
            slots: name -> float32 [n, words].
        """
        filled = {
            name: torch.full((1, words), self.state_fill) for name, words in self.slots.items()
        }
        given = {name: slots[name].contiguous() for name in self.slots if name in slots}
        columns = self._columns(weights.contiguous(), {**filled, **given})
        row_columns.write_columns_(self.header, rows, columns)

    def _columns(self, weights: Tensor, slots: dict[str, Tensor]) -> list[Column]:
        """Say where in a row weights and slots stand."""
        columns, words = [Column(weights, 0)], self.weight_words
        for name, width in self.slots.items():
            columns.append(Column(slots[name], 4 * words))
            words += width
        return columns


__all__ = ["RowStore"]
