"""Addresses of rows in a table's blocks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from recis_lightning.ops.cpu.intrinsics import inlined, load_i64
from recis_lightning.ops.layout import BLOCK_SHIFT, BLOCKS, ROW_BYTES


class RowBlocks(NamedTuple):
    """Blocks of a table's rows."""

    addresses: int  # address of the blocks' addresses
    shift: int  # log2(rows in a block)
    mask: int
    row_bytes: int


@inlined
def row_blocks_of(header):
    """Return the blocks of a table's rows."""
    shift = load_i64(header + 8 * BLOCK_SHIFT)
    mask, row_bytes = (np.int64(1) << shift) - 1, load_i64(header + 8 * ROW_BYTES)
    return RowBlocks(load_i64(header + 8 * BLOCKS), shift, mask, row_bytes)


@inlined
def row_address(row, blocks):
    """Return the address of a row."""
    block = load_i64(blocks.addresses + 8 * (row >> blocks.shift))
    return block + (row & blocks.mask) * blocks.row_bytes
