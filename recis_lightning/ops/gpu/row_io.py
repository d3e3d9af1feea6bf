"""Gathering and scattering of row fields in Triton: a lane a word, one launch a field."""

import math

import triton.language as tl

from recis_lightning.ops.gpu.layout import BLOCK_SHIFT, BLOCKS, ROW_BYTES
from recis_lightning.ops.gpu.runtime import field, int64_at, kernel, lanes, row_address

_LANES = lanes(256, 1 << 16)


@kernel(
    *(
        {"WRITES": writes, "WORD_BYTES": size, "LANES": 256}
        for writes in (True, False)
        for size in (1, 2, 4)
    )
)
def _copy_kernel(
    header: tl.int64,
    rows: tl.int64,
    num_rows: tl.int64,
    data: tl.int64,
    stride: tl.int64,
    first_byte: tl.int64,
    num_words: tl.int64,
    WRITES: tl.constexpr,
    WORD_BYTES: tl.constexpr,
    LANES: tl.constexpr,
):
    cell = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    i = cell // num_words
    inside = i < num_rows
    byte = (cell - i * num_words) * WORD_BYTES
    row = tl.load(int64_at(rows + 8 * i), inside, 0)
    blocks, shift = field(header, BLOCKS), field(header, BLOCK_SHIFT)
    in_table = row_address(blocks, shift, field(header, ROW_BYTES), row, inside) + first_byte + byte
    in_data = data + i * stride + byte
    source, target = in_data, in_table
    if not WRITES:
        source, target = in_table, in_data
    if WORD_BYTES == 4:
        value = tl.load(source.to(tl.pointer_type(tl.int32)), inside, 0)
        tl.store(target.to(tl.pointer_type(tl.int32)), value, inside)
    elif WORD_BYTES == 2:
        value = tl.load(source.to(tl.pointer_type(tl.int16)), inside, 0)
        tl.store(target.to(tl.pointer_type(tl.int16)), value, inside)
    else:
        value = tl.load(source.to(tl.pointer_type(tl.int8)), inside, 0)
        tl.store(target.to(tl.pointer_type(tl.int8)), value, inside)


def copy_field(header, rows, line, writes):
    """Copy one field of all rows, as a line of a plan of ``ops.row_io`` describes it."""
    data, stride, first_byte, num_bytes = map(int, line)
    size = math.gcd(data, stride, first_byte, num_bytes, 4)
    cells = rows.numel() * (num_bytes // size)
    where = (header.address, rows.data_ptr(), rows.numel(), data, stride, first_byte)
    constants = {"WRITES": writes, "WORD_BYTES": size, "LANES": _LANES}
    _copy_kernel.launch(rows.device, -(-cells // _LANES), *where, num_bytes // size, **constants)


def gather_fields(header, rows, plan):
    for line in plan:
        copy_field(header, rows, line, False)


def scatter_fields_(header, rows, plan):
    for line in plan:
        copy_field(header, rows, line, True)


__all__ = ["copy_field", "gather_fields", "scatter_fields_"]
