"""Gathering and pooling in Triton: a program pools some bags of one feature and writes each once.

An evaluation lookup finds the rows in the same launch.
"""

import functools

import numpy as np
import triton.language as tl

from recis_lightning.ops import layout as fields
from recis_lightning.ops.gpu.layout import (
    BLOCK_SHIFT,
    BLOCKS,
    HAS_PADDING,
    MEAN,
    MEAN_BY_COUNT,
    NO_ROW,
    PADDING,
    PLAN_AND_SEGMENT_BYTES,
    PLAN_BAG_LENGTH,
    PLAN_BYTES,
    PLAN_DATA,
    PLAN_DATA_STRIDE,
    PLAN_FIRST_CHUNK,
    PLAN_HEADER,
    PLAN_MODE,
    PLAN_NUM_BAGS,
    PLAN_NUM_IDS,
    PLAN_OFFSETS,
    PLAN_ROWS,
    PLAN_TILE_LEN,
    PLAN_WEIGHTS,
    ROW_BYTES,
    SEGMENT_FLAGS,
    SEGMENT_IDS,
    SEGMENT_PADDING,
    SEGMENT_START,
    SUM,
    TILE,
    UNKNOWN,
)
from recis_lightning.ops.gpu.offset_check import (
    any_offsets,
    are_malformed,
    malformed_feature,
    new_flag,
)
from recis_lightning.ops.gpu.probe import row_of
from recis_lightning.ops.gpu.row_io import copy_field
from recis_lightning.ops.gpu.runtime import (
    cells_at,
    device_function,
    field,
    float_at,
    int64_at,
    kernel,
    lanes,
    largest,
    line_of,
    num_programs_at_once,
    power_of_two,
    row_address,
    stage,
    to_bfloat16,
)
from recis_lightning.ops.gpu.segments import take_staged_plan

_SIXTEENS = bytes(range(0, 256, 16))
_COLUMNS = 256  # at most at a time
_CELLS = lanes(1024, 1 << 16)  # bags times columns of a program
_LANES = lanes(128, 4096)  # ids that a program looks up at a time
_UNROLLED = tl.constexpr(lanes(4, 2))  # rows of a bag that are on their way together


@device_function
def bag_ends(line, bag, inside):
    """Return where bags start and end, kept inside the feature whatever its offsets say."""
    length = field(line, PLAN_BAG_LENGTH)
    num_ids = field(line, PLAN_NUM_IDS)
    start = bag * length
    end = start + length
    if length < 0:
        offsets = field(line, PLAN_OFFSETS)
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
def share_of(mode, scale, on):
    """Return what ids of these weights add to the divisor of a mean."""
    return tl.where(mode == MEAN_BY_COUNT, tl.where(on, 1.0, 0.0), scale)


@device_function
def load_weights(address, column, mask, BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr):
    """Load some columns of rows as float32, zeros where masked."""
    if BFLOAT16:
        at = cells_at(address.to(tl.pointer_type(tl.bfloat16)), column, ALIGNED)
        return tl.load(at, mask, 0).to(tl.float32)
    return tl.load(cells_at(float_at(address), column, ALIGNED), mask, 0)


@device_function
def load_rows(address, column, known, DIM: tl.constexpr, BFLOAT16: tl.constexpr):
    """Load some columns of rows of a table as float32, 0 behind the last one.

    A row lies at a multiple of 16 bytes and takes up one (``RowStore.row_words``), so four words
    are loaded at once whatever its dim, those behind its weights too. These hold anything, also
    what is no number: they may not be reckoned with.
    """
    WORD: tl.constexpr = 8 if BFLOAT16 else 4
    mask = known[:, None] & (column < -(-DIM // WORD) * WORD)[None, :]
    value = load_weights(address, column, mask, BFLOAT16, True)
    if DIM % WORD != 0:
        value = tl.where((column < DIM)[None, :], value, 0.0)
    return value


@device_function
def store_weights(address, column, value, mask, BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr):
    """Store some columns of rows in the rows' dtype, rounded to nearest."""
    if BFLOAT16:
        at = cells_at(address.to(tl.pointer_type(tl.bfloat16)), column, ALIGNED)
        tl.store(at, to_bfloat16(value), mask)
    else:
        tl.store(cells_at(float_at(address), column, ALIGNED), value, mask)


@device_function
def _pool(
    line,
    bag,
    DIM: tl.constexpr,
    BFLOAT16: tl.constexpr,
    ALIGNED: tl.constexpr,
    BAGS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the outputs of BAGS bags, from the row numbers of their ids."""
    header, mode = field(line, PLAN_HEADER), field(line, PLAN_MODE)
    blocks, shift = field(header, BLOCKS), field(header, BLOCK_SHIFT)
    row_bytes, rows = field(header, ROW_BYTES), field(line, PLAN_ROWS)
    weights = field(line, PLAN_WEIGHTS)
    inside = bag < field(line, PLAN_NUM_BAGS)
    start, end = bag_ends(line, bag, inside)
    item = 4
    if BFLOAT16:
        item = 2
    out = field(line, PLAN_DATA) + bag * field(line, PLAN_DATA_STRIDE)
    is_mean = (mode == MEAN) | (mode == MEAN_BY_COUNT)
    if (mode == SUM) | is_mean:
        most = largest(end - start)
        for first_column in tl.static_range(0, DIM, COLUMNS):
            column = first_column + tl.arange(0, COLUMNS)
            total = tl.full((BAGS, COLUMNS), 0.0, tl.float32)
            divisor = tl.full((BAGS,), 0.0, tl.float32)
            step = most * 0
            while step < most:
                for ahead in tl.static_range(0, _UNROLLED):
                    i = start + step + ahead
                    on = i < end
                    row = tl.load(int64_at(rows + 8 * i), on, PADDING)
                    scale = scale_of(weights, i, on)
                    known = row >= 0
                    address = row_address(blocks, shift, row_bytes, row, known)
                    value = load_rows(address, column, known, DIM, BFLOAT16)
                    total += value * scale[:, None]
                    divisor += tl.where(row != PADDING, share_of(mode, scale, on), 0.0)
                step += _UNROLLED
            if is_mean:
                empty = divisor == 0
                divisor = tl.where(empty, 1.0, divisor)
                total = tl.where(empty[:, None], 0.0, total / divisor[:, None])
            mask = inside[:, None] & (column < DIM)[None, :]
            store_weights(out, column, total, mask, BFLOAT16, ALIGNED)
    else:
        tiles = tl.where(mode == TILE, field(line, PLAN_TILE_LEN), 1)
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
                value = load_rows(address, column, known, DIM, BFLOAT16) * scale[:, None]
                value = tl.where(known[:, None], value, 0.0)
                mask = inside[:, None] & (column < DIM)[None, :]
                store_weights(out + tile * (item * DIM), column, value, mask, BFLOAT16, ALIGNED)
            tile += 1


_VARIANTS = (
    {"DIM": 128, "BFLOAT16": False, "ALIGNED": True, "BAGS": 8, "COLUMNS": 128},
    {"DIM": 8, "BFLOAT16": False, "ALIGNED": True, "BAGS": 128, "COLUMNS": 8},
    {"DIM": 33, "BFLOAT16": True, "ALIGNED": False, "BAGS": 16, "COLUMNS": 64},
)


@kernel(*_VARIANTS)
def _gather_kernel(
    plan: tl.int64,
    num_features: tl.int64,
    malformed: tl.int64,
    DIM: tl.constexpr,
    BFLOAT16: tl.constexpr,
    ALIGNED: tl.constexpr,
    BAGS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    line = line_of(plan, num_features, PLAN_BYTES, PLAN_FIRST_CHUNK, chunk)
    bag = (chunk - field(line, PLAN_FIRST_CHUNK)) * BAGS + tl.arange(0, BAGS)
    if field(line, PLAN_BAG_LENGTH) < 0:
        if are_malformed(line, bag, bag < field(line, PLAN_NUM_BAGS)):
            tl.store(int64_at(malformed), (line - plan) // PLAN_BYTES)
    _pool(line, bag, DIM, BFLOAT16, ALIGNED, BAGS, COLUMNS)


@kernel(*({**variant, "LANES": 128} for variant in _VARIANTS))
def _find_and_gather_kernel(
    lines: tl.int64,
    num_features: tl.int64,
    malformed: tl.int64,
    tiles: tl.int64,
    DIM: tl.constexpr,
    BFLOAT16: tl.constexpr,
    ALIGNED: tl.constexpr,
    BAGS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    # First a lane an id: all ids of the program's bags are on their way at once. Then, with their
    # rows known, tiles of bags times columns.
    chunk = tl.program_id(0).to(tl.int64)
    line = line_of(lines, num_features, PLAN_AND_SEGMENT_BYTES, PLAN_FIRST_CHUNK, chunk)
    first_bag = (chunk - field(line, PLAN_FIRST_CHUNK)) * BAGS * tiles
    lane = tl.arange(0, LANES)
    bag = first_bag + lane
    inside = (lane < BAGS * tiles) & (bag < field(line, PLAN_NUM_BAGS))
    if field(line, PLAN_BAG_LENGTH) < 0:
        if are_malformed(line, bag, inside):
            tl.store(int64_at(malformed), (line - lines) // PLAN_AND_SEGMENT_BYTES)
    start, end = bag_ends(line, bag, inside)
    # Malformed offsets too: no row is read below that is not written here.
    end = largest(tl.where(inside, end, 0))
    first = -largest(tl.where(inside, -start, -end))
    segment = line + PLAN_BYTES
    header, rows = field(line, PLAN_HEADER), field(line, PLAN_ROWS)
    ids = field(segment, SEGMENT_IDS) + 8 * field(segment, SEGMENT_START)
    has_padding = (field(segment, SEGMENT_FLAGS) & HAS_PADDING) != 0
    while first < end:
        i = first + lane
        on = i < end
        key = tl.load(int64_at(ids + 8 * i), on, 0)
        is_padding = (key == field(segment, SEGMENT_PADDING)) & has_padding
        row = row_of(header, key, on & (is_padding == 0))
        row = tl.where(row == NO_ROW, UNKNOWN, row)
        tl.store(int64_at(rows + 8 * i), tl.where(is_padding, PADDING, row), on)
        first += LANES
    tl.debug_barrier()  # rows that one lane wrote are read by others
    tile = tiles * 0
    while tile < tiles:
        tile_bags = first_bag + tile * BAGS + tl.arange(0, BAGS)
        _pool(line, tile_bags, DIM, BFLOAT16, ALIGNED, BAGS, COLUMNS)
        tile += 1


# Of offsets and weights up to the stride of the output: what lookups of the same sizes differ in.
_ADDRESSES = slice(fields.PLAN_OFFSETS, fields.PLAN_DATA_STRIDE + 1)


@functools.lru_cache(64)
def _split(num_bags, bags_in_program):
    # A feature without bags has a program too, which checks its offsets.
    chunks = np.maximum(-(-np.frombuffer(num_bags, np.int64) // bags_in_program), 1)
    return np.cumsum(chunks) - chunks, int(chunks.sum())


def split_plan(plan, bags_in_program):
    """Number the programs that a plan's features take; return how many there are.

    Args:
        plan: int64 [num_features, PLAN_SIZE or more]; PLAN_FIRST_CHUNK is overwritten.
        bags_in_program: How many bags a program pools.
    """
    first_chunks, num_programs = _split(plan[:, fields.PLAN_NUM_BAGS].tobytes(), bags_in_program)
    plan[:, fields.PLAN_FIRST_CHUNK] = first_chunks
    return num_programs


def chunks_of(plan, embedding_dim):
    """Return the first program of each line of a plan of ``gather``, and how many there are."""
    return _split(plan[:, fields.PLAN_NUM_BAGS].tobytes(), _tile(embedding_dim)[1])


def gather(plan, embedding_dim, bfloat16, device):
    columns, bags_in_program = _tile(embedding_dim)
    lookup = take_staged_plan(plan)
    if lookup is None:
        num_programs, staged = split_plan(plan, bags_in_program), stage(plan, device)
        address, has_offsets = staged.data_ptr(), any_offsets(plan)
    else:
        num_programs, address = lookup.split.plan_programs, lookup.plan_address
        has_offsets = lookup.split.has_offsets
    malformed, flag = new_flag(has_offsets, device)
    _gather_kernel.launch(
        device,
        num_programs,
        address,
        len(plan),
        flag,
        DIM=embedding_dim,
        BFLOAT16=bfloat16,
        ALIGNED=is_aligned(plan, embedding_dim * (2 if bfloat16 else 4)),
        BAGS=bags_in_program,
        COLUMNS=columns,
    )
    return malformed_feature(plan, malformed)


def is_aligned(plan, row_bytes):
    """Tell whether all rows of outputs or gradients lie at multiples of 16 bytes.

    Args:
        plan: int64 [num_features, PLAN_SIZE].
        row_bytes: Bytes of one row that PLAN_DATA points to.
    """
    numbers = plan[:, fields.PLAN_DATA : fields.PLAN_DATA_STRIDE + 1]
    return row_bytes % 16 == 0 and are_sixteens(numbers)


def are_sixteens(numbers):
    """Tell whether all numbers, int64, are multiples of 16."""
    # Of each the lowest byte, which is the first on hosts of GPUs: the quickest for few and many.
    return not numbers.tobytes()[::8].translate(None, _SIXTEENS)


@functools.cache
def _tile(embedding_dim):
    """Return how many columns, and how many bags, a program handles at a time."""
    columns = min(power_of_two(embedding_dim), _COLUMNS)
    return columns, max(_CELLS // columns, 1)


def find_and_gather(plan, segments, training, embedding_dim, bfloat16, device, kept):
    assert not training  # the host would have to wait to learn what is missing
    split = None if kept is None else kept.get("evaluation split")
    if split is None:
        split = _EvaluationSplit(plan, segments, embedding_dim, device)
        if kept is not None:
            kept["evaluation split"] = split
    staged = stage(split.to_send(plan, segments), device)
    malformed, flag = new_flag(split.has_offsets, device)
    _find_and_gather_kernel.launch(
        device,
        split.num_programs,
        staged.data_ptr(),
        len(plan),
        flag,
        split.tiles,
        ALIGNED=is_aligned(plan, embedding_dim * (2 if bfloat16 else 4)),
        BFLOAT16=bfloat16,
        **split.constants,
    )
    return malformed_feature(plan, malformed), 0


class _EvaluationSplit:
    """Split into programs of lookups by ``find_and_gather`` that differ in addresses alone.

    Args:
        plan: int64 [num_features, PLAN_SIZE], of such a lookup.
        segments: int64 [num_features, SEGMENT_SIZE].
        embedding_dim: Weights in a row.
        device: Where kernels run.

    Attributes:
        num_programs: Programs in all.
        tiles: Tiles of bags that a program handles.
        constants: Of the compilation.
        has_offsets: Whether any feature has.
    """

    def __init__(self, plan, segments, embedding_dim, device):
        columns, tile = _tile(embedding_dim)
        lanes = max(_LANES, tile)
        # As many tiles as make a lane an id, but enough programs to keep the device busy.
        busy = sum(plan[:, fields.PLAN_NUM_BAGS].tolist()) // (tile * num_programs_at_once(device))
        self.tiles = max(1, min(lanes // tile, busy))
        lines = np.concatenate([plan, segments], 1)
        self.num_programs = split_plan(lines, tile * self.tiles)
        self._lines = lines
        self.has_offsets = any_offsets(plan)
        self.constants = {"DIM": embedding_dim, "BAGS": tile, "COLUMNS": columns, "LANES": lanes}

    def to_send(self, plan, segments):
        """Return what kernels read of a lookup, int64 [num_features, PLAN_SIZE + SEGMENT_SIZE]."""
        lines = self._lines.copy()
        lines[:, _ADDRESSES] = plan[:, _ADDRESSES]
        lines[:, fields.PLAN_ROWS] = plan[:, fields.PLAN_ROWS]
        lines[:, fields.PLAN_SIZE + fields.SEGMENT_IDS] = segments[:, fields.SEGMENT_IDS]
        return lines


def write_rows_(header, rows, values):
    num_bytes = values.shape[1] * values.element_size()
    copy_field(header, rows, (values.data_ptr(), num_bytes, 0, num_bytes), True)


__all__ = [
    "are_sixteens",
    "bag_ends",
    "chunks_of",
    "find_and_gather",
    "gather",
    "is_aligned",
    "load_weights",
    "scale_of",
    "share_of",
    "split_plan",
    "store_weights",
    "write_rows_",
]
