"""Copy parts of rows in Triton: a lane a word, one launch a part."""

import math

import triton.language as tl

from recis_lightning.ops.gpu.runtime import (
    BLOCK_SHIFT,
    BLOCKS,
    ROW_BYTES,
    field,
    int64_at,
    kernel,
    lanes,
    row_address,
)

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
    number = cell // num_words
    inside = number < num_rows
    word = (cell - number * num_words) * WORD_BYTES
    row = tl.load(int64_at(rows + 8 * number), inside, 0)
    blocks, shift = field(header, BLOCKS), field(header, BLOCK_SHIFT)
    part = row_address(blocks, shift, field(header, ROW_BYTES), row, inside) + first_byte + word
    outside = data + number * stride + word
    source, target = outside, part
    if not WRITES:
        source, target = part, outside
    if WORD_BYTES == 4:
        value = tl.load(source.to(tl.pointer_type(tl.int32)), inside, 0)
        tl.store(target.to(tl.pointer_type(tl.int32)), value, inside)
    elif WORD_BYTES == 2:
        value = tl.load(source.to(tl.pointer_type(tl.int16)), inside, 0)
        tl.store(target.to(tl.pointer_type(tl.int16)), value, inside)
    else:
        value = tl.load(source.to(tl.pointer_type(tl.int8)), inside, 0)
        tl.store(target.to(tl.pointer_type(tl.int8)), value, inside)


def copy_parts(header, rows, part, writes):
    """Copy one part of all rows; ``part`` is a line of ``row_columns``' plan."""
    data, stride, first_byte, num_bytes = map(int, part)
    size = math.gcd(data, stride, first_byte, num_bytes, 4)
    cells = rows.numel() * (num_bytes // size)
    where = (header.address, rows.data_ptr(), rows.numel(), data, stride, first_byte)
    constants = {"WRITES": writes, "WORD_BYTES": size, "LANES": _LANES}
    _copy_kernel.launch(rows.device, -(-cells // _LANES), *where, num_bytes // size, **constants)


def read_columns(header, rows, plan):
    """See the contract."""
    for part in plan:
        copy_parts(header, rows, part, False)


def write_columns_(header, rows, plan):
    """See the contract."""
    for part in plan:
        copy_parts(header, rows, part, True)


__all__ = ["copy_parts", "read_columns", "write_columns_"]
