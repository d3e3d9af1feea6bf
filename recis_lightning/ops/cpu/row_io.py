"""Gather and scatter of row fields in Numba: one pass over the rows serves all fields."""

from __future__ import annotations

from recis_lightning.ops.cpu.intrinsics import (
    inlined,
    load_f32,
    load_i64,
    load_u8,
    load_vector,
    prefetch,
    store_f32,
    store_u8,
    store_vector,
)
from recis_lightning.ops.cpu.row_blocks import row_address, row_blocks_of
from recis_lightning.ops.cpu.runtime import kernel
from recis_lightning.ops.layout import (
    ROW_FIELD_DATA,
    ROW_FIELD_FIRST_BYTE,
    ROW_FIELD_NUM_BYTES,
    ROW_FIELD_SIZE,
    ROW_FIELD_STRIDE,
)

_ROWS_PER_CHUNK = 4096
_AHEAD = 12  # rows between prefetch and use


@inlined
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


@kernel
def _copy_fields_kernel(low, high, num_items, header, rows, fields, num_fields, writing):
    blocks = row_blocks_of(header)
    for i in range(low, high):
        if i + _AHEAD < num_items:
            later = load_i64(rows + 8 * (i + _AHEAD))
            address = row_address(later, blocks)
            for byte in range(0, blocks.row_bytes, 64):
                prefetch(address + byte)
        row = row_address(load_i64(rows + 8 * i), blocks)
        for index in range(num_fields):
            field = fields + index * 8 * ROW_FIELD_SIZE
            stride = load_i64(field + 8 * ROW_FIELD_STRIDE)
            data = load_i64(field + 8 * ROW_FIELD_DATA) + i * stride
            in_row = row + load_i64(field + 8 * ROW_FIELD_FIRST_BYTE)
            num_bytes = load_i64(field + 8 * ROW_FIELD_NUM_BYTES)
            if writing:
                _copy(data, in_row, num_bytes)
            else:
                _copy(in_row, data, num_bytes)


def _copy_fields(header, rows, fields, writing):
    _copy_fields_kernel.launch(
        rows.numel(),
        _ROWS_PER_CHUNK,
        header=header.address,
        rows=rows,
        fields=fields,
        num_fields=len(fields),
        writing=writing,
    )


def gather_fields(header, rows, plan):
    _copy_fields(header, rows, plan, 0)


def scatter_fields_(header, rows, plan):
    _copy_fields(header, rows, plan, 1)


__all__ = ["gather_fields", "scatter_fields_"]
