"""Copy parts of rows in Numba: one pass over the rows serves all parts."""

from __future__ import annotations

from numba import njit

from recis_lightning.ops.cpu import runtime
from recis_lightning.ops.cpu.embedding_bag import row_address
from recis_lightning.ops.cpu.intrinsics import (
    atomic_add,
    load_f32,
    load_i64,
    load_u8,
    load_vector,
    prefetch,
    store_f32,
    store_u8,
    store_vector,
)
from recis_lightning.ops.cpu.runtime import address_of, num_chunks
from recis_lightning.ops.layout import (
    BLOCK_SHIFT,
    BLOCKS,
    ROW_BYTES,
    ROW_FIELD_DATA,
    ROW_FIELD_FIRST_BYTE,
    ROW_FIELD_NUM_BYTES,
    ROW_FIELD_SIZE,
    ROW_FIELD_STRIDE,
)

_ROWS_PER_CHUNK = 4096
_AHEAD = 12  # rows between prefetch and use


@njit
def _copy(source, target, num_bytes):
    """Copy bytes: 64 at once, then 4, then one."""
    byte = 0
    while byte + 64 <= num_bytes:
        store_vector(target + byte, load_vector(16, source + byte))
        byte += 64
    while byte + 4 <= num_bytes:
        store_f32(target + byte, load_f32(source + byte))
        byte += 4
    while byte < num_bytes:
        store_u8(target + byte, load_u8(source + byte))
        byte += 1


@runtime.kernel
def _columns_kernel(args):
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)
    header, rows = load_i64(args + 32), load_i64(args + 40)
    plan, num_columns = load_i64(args + 48), load_i64(args + 56)
    writing = load_i64(args + 64)
    blocks, shift = load_i64(header + 8 * BLOCKS), load_i64(header + 8 * BLOCK_SHIFT)
    mask, row_bytes = (1 << shift) - 1, load_i64(header + 8 * ROW_BYTES)
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        for i in range(chunk * chunk_size, min((chunk + 1) * chunk_size, n)):
            if i + _AHEAD < n:
                later = load_i64(rows + 8 * (i + _AHEAD))
                address = row_address(later, blocks, shift, mask, row_bytes)
                for byte in range(0, row_bytes, 64):
                    prefetch(address + byte)
            row = row_address(load_i64(rows + 8 * i), blocks, shift, mask, row_bytes)
            for column in range(num_columns):
                line = plan + column * 8 * ROW_FIELD_SIZE
                data = load_i64(line + 8 * ROW_FIELD_DATA) + i * load_i64(
                    line + 8 * ROW_FIELD_STRIDE
                )
                part = row + load_i64(line + 8 * ROW_FIELD_FIRST_BYTE)
                num_bytes = load_i64(line + 8 * ROW_FIELD_NUM_BYTES)
                if writing:
                    _copy(data, part, num_bytes)
                else:
                    _copy(part, data, num_bytes)


def _launch(header, rows, plan, writing):
    n = rows.numel()
    where = (header.address, rows.data_ptr(), address_of(plan), len(plan))
    _columns_kernel.launch(num_chunks(n, _ROWS_PER_CHUNK), _ROWS_PER_CHUNK, n, *where, writing)


def gather_fields(header, rows, plan):
    """See the contract."""
    _launch(header, rows, plan, 0)


def scatter_fields_(header, rows, plan):
    """See the contract."""
    _launch(header, rows, plan, 1)


__all__ = ["gather_fields", "scatter_fields_"]
