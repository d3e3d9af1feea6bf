"""Readers of the memory that tables and plans point to, as tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from recis_lightning.ops import layout as fields


def memory(address: int, count: int, dtype: torch.dtype) -> Tensor:
    """View ``count`` items at an address; the owner of the memory keeps it alive."""
    if count <= 0:
        return torch.empty(0, dtype=dtype, device="cpu")
    buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype)


def header_at(address: int) -> Tensor:
    """View the header at an address, as segments and plans hold it."""
    return memory(address, fields.HEADER_SIZE, torch.int64)


def float_field(header: Tensor, field: int) -> float:
    """Read a header field that holds the bits of a float64."""
    return float(header[field : field + 1].view(torch.float64))


class Rows:
    """Rows of a table's blocks, read and written as float32 words."""

    def __init__(self, addresses: Tensor, block_shift: int, row_bytes: int) -> None:
        self.addresses, self.shift, self.words = addresses, block_shift, row_bytes // 4

    @classmethod
    def of(cls, header: Tensor, rows: Tensor) -> Rows:
        """Return a table's rows, as far as the block of the last of ``rows``."""
        shift = int(header[fields.BLOCK_SHIFT])
        num_blocks = (int(rows.max()) >> shift) + 1 if rows.numel() else 0
        addresses = memory(int(header[fields.BLOCKS]), num_blocks, torch.int64)
        return cls(addresses, shift, int(header[fields.ROW_BYTES]))

    def _per_block(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield each block [block_rows, words] with indices in ``rows`` and in the block."""
        blocks = rows >> self.shift
        for block in torch.unique(blocks).tolist():
            if block >= 0:
                indices = (blocks == block).nonzero().squeeze(1)
                inside = rows[indices] & ((1 << self.shift) - 1)
                size = self.words * (int(inside.max()) + 1)  # the last block may be a part
                content = memory(int(self.addresses[block]), size, torch.float32)
                yield content.view(-1, self.words), indices, inside

    def read(self, rows: Tensor) -> Tensor:
        """Copy rows to float32 [n, words], zeros for negative rows."""
        values = torch.zeros(rows.numel(), self.words, device="cpu")
        for block, indices, inside in self._per_block(rows):
            values[indices] = block[inside]
        return values

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Overwrite whole rows with float32 [n, words]."""
        for block, indices, inside in self._per_block(rows):
            block[inside] = values[indices]


def weights_of(words: Tensor, embedding_dim: int, bfloat16: bool) -> Tensor:
    """View the weights at the front of whole rows, [n, embedding_dim] in their own dtype."""
    return (words.view(torch.bfloat16) if bfloat16 else words)[:, :embedding_dim]


def state_of(words: Tensor, embedding_dim: int, bfloat16: bool) -> Tensor:
    """View the state behind the weights of whole rows, float32."""
    return words[:, (embedding_dim + 1) // 2 if bfloat16 else embedding_dim :]
