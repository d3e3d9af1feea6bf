"""Gather and pool in Triton: a program pools some bags of one feature and writes each once."""

import numpy as np
import torch
import triton.language as tl

from recis_lightning.ops import embedding_bag as bags
from recis_lightning.ops.launch_gpu import (
    BLOCK_SHIFT,
    BLOCKS,
    ROW_BYTES,
    any_of,
    device_function,
    field,
    float_at,
    int64_at,
    kernel,
    lanes,
    largest,
    line_of,
    power_of_two,
    row_address,
    stage,
    to_bfloat16,
)
from recis_lightning.ops.row_columns_gpu import copy_parts
from recis_lightning.ops.table_header import PADDING as PADDING_ROW

LINE_BYTES = tl.constexpr(8 * bags.PLAN_SIZE)
HEADER = tl.constexpr(bags.HEADER)
MODE = tl.constexpr(bags.MODE)
NUM_BAGS = tl.constexpr(bags.NUM_BAGS)
BAG_LENGTH = tl.constexpr(bags.BAG_LENGTH)
OFFSETS = tl.constexpr(bags.OFFSETS)
WEIGHTS = tl.constexpr(bags.WEIGHTS)
TILE_LEN = tl.constexpr(bags.TILE_LEN)
DATA = tl.constexpr(bags.DATA)
DATA_STRIDE = tl.constexpr(bags.DATA_STRIDE)
FIRST_CHUNK = tl.constexpr(bags.FIRST_CHUNK)
ROWS = tl.constexpr(bags.ROWS)
NUM_IDS = tl.constexpr(bags.NUM_IDS)
SUM = tl.constexpr(bags.SUM)
MEAN = tl.constexpr(bags.MEAN)
TILE = tl.constexpr(bags.TILE)
PADDING = tl.constexpr(PADDING_ROW)

_COLUMNS = 256  # at most at a time
_CELLS = lanes(1024, 1 << 16)  # bags times columns of a program


@device_function
def bag_ends(line, bag, inside):
    """Return where bags start and end, kept inside the feature whatever its offsets say."""
    length = field(line, BAG_LENGTH)
    num_ids = field(line, NUM_IDS)
    start = bag * length
    end = start + length
    if length < 0:
        offsets = field(line, OFFSETS)
        start = tl.load(int64_at(offsets + 8 * bag), inside, 0)
        end = tl.load(int64_at(offsets + 8 * bag + 8), inside, 0)
        start = tl.minimum(tl.maximum(start, 0), num_ids)
        end = tl.minimum(tl.maximum(end, start), num_ids)
    return start, tl.where(inside, end, start)


@device_function
def scale_of(weights, i, on):
    """Return the weights of ids, 1 where there are none."""
    scale = tl.where(on, 1.0, 0.0)
    if weights != 0:
        scale = tl.load(float_at(weights + 4 * i), on, 0)
    return scale


@device_function
def load_weights(address, column, mask, BFLOAT16: tl.constexpr):
    """Load some columns of rows as float32, zeros where masked."""
    if BFLOAT16:
        at = address.to(tl.pointer_type(tl.bfloat16))[:, None] + column[None, :]
        return tl.load(at, mask, 0).to(tl.float32)
    return tl.load(float_at(address)[:, None] + column[None, :], mask, 0)


@device_function
def store_weights(address, column, value, mask, BFLOAT16: tl.constexpr):
    """Store some columns of rows in the rows' dtype, rounded to nearest."""
    if BFLOAT16:
        at = address.to(tl.pointer_type(tl.bfloat16))[:, None] + column[None, :]
        tl.store(at, to_bfloat16(value), mask)
    else:
        tl.store(float_at(address)[:, None] + column[None, :], value, mask)


@kernel(
    {"DIM": 128, "BFLOAT16": False, "BAGS": 8, "COLUMNS": 128},
    {"DIM": 8, "BFLOAT16": False, "BAGS": 128, "COLUMNS": 8},
    {"DIM": 33, "BFLOAT16": True, "BAGS": 16, "COLUMNS": 64},
)
def _gather_kernel(
    plan: tl.int64,
    num_features: tl.int64,
    bad: tl.int64,
    DIM: tl.constexpr,
    BFLOAT16: tl.constexpr,
    BAGS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    line = line_of(plan, num_features, LINE_BYTES, FIRST_CHUNK, chunk)
    header, mode = field(line, HEADER), field(line, MODE)
    blocks, shift = field(header, BLOCKS), field(header, BLOCK_SHIFT)
    row_bytes, rows = field(header, ROW_BYTES), field(line, ROWS)
    weights, num_bags = field(line, WEIGHTS), field(line, NUM_BAGS)
    bag = (chunk - field(line, FIRST_CHUNK)) * BAGS + tl.arange(0, BAGS)
    inside = bag < num_bags
    if field(line, BAG_LENGTH) < 0:
        offsets = field(line, OFFSETS)
        begin = tl.load(int64_at(offsets + 8 * bag), inside, 0)
        wrong = begin > tl.load(int64_at(offsets + 8 * bag + 8), inside, 0)
        wrong = wrong & inside
        wrong = (
            wrong | (field(offsets, 0) != 0) | (field(offsets, num_bags) != field(line, NUM_IDS))
        )
        if any_of(wrong):
            tl.store(int64_at(bad), (line - plan) // LINE_BYTES)
    start, end = bag_ends(line, bag, inside)
    item = 4
    if BFLOAT16:
        item = 2
    out = field(line, DATA) + bag * field(line, DATA_STRIDE)
    if (mode == SUM) | (mode == MEAN):
        most = largest(end - start)
        for first_column in tl.static_range(0, DIM, COLUMNS):
            column = first_column + tl.arange(0, COLUMNS)
            total = tl.full((BAGS, COLUMNS), 0.0, tl.float32)
            divisor = tl.full((BAGS,), 0.0, tl.float32)
            done = most * 0
            while done < most:
                i = start + done
                on = i < end
                row = tl.load(int64_at(rows + 8 * i), on, PADDING)
                scale = scale_of(weights, i, on)
                known = row >= 0
                address = row_address(blocks, shift, row_bytes, row, known)
                mask = known[:, None] & (column < DIM)[None, :]
                total += load_weights(address, column, mask, BFLOAT16) * scale[:, None]
                divisor += tl.where(row != PADDING, scale, 0.0)
                done += 1
            if mode == MEAN:
                empty = divisor == 0
                divisor = tl.where(empty, 1.0, divisor)
                total = tl.where(empty[:, None], 0.0, total / divisor[:, None])
            mask = inside[:, None] & (column < DIM)[None, :]
            store_weights(out, column, total, mask, BFLOAT16)
    else:
        tiles = tl.where(mode == TILE, field(line, TILE_LEN), 1)
        tile = tiles * 0
        while tile < tiles:
            i = start + tile
            on = i < end
            row = tl.load(int64_at(rows + 8 * i), on, PADDING)
            scale = scale_of(weights, i, on)
            known = row >= 0
            address = row_address(blocks, shift, row_bytes, row, known)
            for first_column in tl.static_range(0, DIM, COLUMNS):
                column = first_column + tl.arange(0, COLUMNS)
                mask = known[:, None] & (column < DIM)[None, :]
                value = load_weights(address, column, mask, BFLOAT16) * scale[:, None]
                value = tl.where(known[:, None], value, 0.0)
                mask = inside[:, None] & (column < DIM)[None, :]
                store_weights(out + tile * (item * DIM), column, value, mask, BFLOAT16)
            tile += 1


def split_plan(plan, bags_in_program):
    """Return the plan with its programs numbered, and how many there are."""
    plan = plan.copy()
    # Without bags too: a feature's offsets are checked.
    chunks = np.maximum(-(-plan[:, bags.NUM_BAGS] // bags_in_program), 1)
    plan[:, bags.FIRST_CHUNK] = np.cumsum(chunks) - chunks
    return plan, int(chunks.sum())


class _MalformedOffsets:
    """Which feature of an earlier lookup had malformed offsets: known later, without waiting."""

    def __init__(self):
        self.coming = []

    def watch(self, bad, plan):
        values = torch.empty(1, dtype=torch.int64, pin_memory=True)
        values.copy_(bad, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(bad.device))
        self.coming.append((values, event, plan))

    def check(self):
        while self.coming and self.coming[0][1].query():
            values, _, plan = self.coming.pop(0)
            feature = int(values[0])
            if feature >= 0:
                self.coming.clear()
                raise ValueError(
                    f"offsets: in a lookup before this one, feature number {feature}'s did not "
                    "start at 0, ascend and end at its number of ids, "
                    f"{int(plan[feature, bags.NUM_IDS])}; on a GPU this is found out later"
                )


_malformed = _MalformedOffsets()


def gather(plan, embedding_dim, bfloat16, device):
    """See the contract; returns a feature with malformed offsets, or -1.

    Beside a GPU such a feature is reported by a later call.
    """
    columns = min(power_of_two(embedding_dim), _COLUMNS)
    bags_in_program = max(_CELLS // columns, 1)
    plan, num_programs = split_plan(plan, bags_in_program)
    staged = stage(plan, device)
    bad = torch.full((1,), -1, dtype=torch.int64, device=device)
    _gather_kernel.launch(
        device,
        num_programs,
        staged.data_ptr(),
        len(plan),
        bad.data_ptr(),
        DIM=embedding_dim,
        BFLOAT16=bfloat16,
        BAGS=bags_in_program,
        COLUMNS=columns,
    )
    return _feature_with_bad_offsets(plan, bad)


def _feature_with_bad_offsets(plan, bad):
    """Return the number of a feature whose offsets the kernel found malformed, if it is known."""
    if (plan[:, bags.BAG_LENGTH] >= 0).all():
        return -1
    if bad.device.type == "cpu":
        return int(bad)
    _malformed.check()
    _malformed.watch(bad, plan)
    return -1


def write_rows_(header, rows, values):
    """See the contract."""
    num_bytes = values.shape[1] * values.element_size()
    copy_parts(header, rows, (values.data_ptr(), num_bytes, 0, num_bytes), True)


__all__ = ["gather", "write_rows_"]
