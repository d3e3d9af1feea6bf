"""Initial rows in Triton: a hash, a uniform number and an inverse normal for each column."""

import math

import triton.language as tl

from recis_lightning.ops.gpu.layout import (
    BLOCK_SHIFT,
    BLOCKS,
    INIT_ARGS,
    INIT_CONSTANT,
    INIT_KEY,
    INIT_KIND,
    INIT_TRUNCATED_NORMAL,
    INIT_UNIFORM,
    NUM_STATE,
    ROW_BYTES,
    SEGMENT_HEADER,
    SEGMENT_IDS,
    SEGMENT_START,
    STAGED_SEGMENT_BYTES,
    STATE_FILL,
)
from recis_lightning.ops.gpu.runtime import (
    any_of,
    device_function,
    float_at,
    int64_at,
    kernel,
    lanes,
    largest,
    num_programs_at_once,
    power_of_two,
    row_address,
    to_bfloat16,
)
from recis_lightning.ops.gpu.segments import any_missing, staged_segments

_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)
_COLUMN = tl.constexpr(0x9E3779B97F4A7C15)
_ROOT_HALF = tl.constexpr(math.sqrt(0.5))
_ROOT_2 = tl.constexpr(math.sqrt(2))
_LN_2 = tl.constexpr(math.log(2))
_INFINITY = tl.constexpr(math.inf)
_LOWEST = tl.constexpr(2.0**-23 - 1)
_HIGHEST = tl.constexpr(1 - 2.0**-23)
_STEP = tl.constexpr(2.0**-24)

_ROWS = lanes(16, 256)
_COLUMNS = 64  # at a time


@device_function
def mix(value):
    """Hash uint64: the finaliser of SplitMix64 (Steele, Lea, Flood, 2014)."""
    value = (value ^ (value >> 30)) * _MIX_1
    value = (value ^ (value >> 27)) * _MIX_2
    return value ^ (value >> 31)


@device_function
def _log(x):
    # log of a positive normal float32: exponent * ln 2 + 2 atanh((m - 1) / (m + 1)).
    bits = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    exponent = (bits >> 23).to(tl.float32)
    mantissa = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    s = (mantissa - 1) / (mantissa + 1)
    z = s * s
    tail = z * (2 / 3 + z * (2 / 5 + z * (2 / 7 + z * (2 / 9))))
    return exponent * _LN_2 + (2 * s + s * tail)


@device_function
def _erfinv(x):
    # Giles, "Approximating the erfinv function", GPU Computing Gems, 2010: single precision.
    w = -_log((1 - x) * (1 + x))
    a = w - 2.5
    near = a * 2.81022636e-08 + 3.43273939e-07
    near = near * a - 3.5233877e-06
    near = near * a - 4.39150654e-06
    near = near * a + 0.00021858087
    near = near * a - 0.00125372503
    near = near * a - 0.00417768164
    near = near * a + 0.246640727
    near = near * a + 1.50140941
    b = tl.sqrt(w) - 3
    far = b * -0.000200214257 + 0.000100950558
    far = far * b + 0.00134934322
    far = far * b - 0.00367342844
    far = far * b + 0.00573950773
    far = far * b - 0.0076224613
    far = far * b + 0.00943887047
    far = far * b + 1.00167406
    far = far * b + 2.83297682
    return tl.where(w < 5, near, far) * x


@device_function
def _argument(header, number: tl.constexpr, known):
    at = (header + 8 * (INIT_ARGS + number)).to(tl.pointer_type(tl.float64))
    return tl.load(at, known, 0).to(tl.float32)


@kernel(
    {"DIM": 128, "BFLOAT16": False, "ROWS": 16, "COLUMNS": 64},
    {"DIM": 33, "BFLOAT16": True, "ROWS": 16, "COLUMNS": 64},
)
def _init_kernel(
    rows: tl.int64,
    new: tl.int64,
    num_new: tl.int64,
    segments: tl.int64,
    num_segments: tl.int64,
    DIM: tl.constexpr,
    BFLOAT16: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    stride = tl.num_programs(0).to(tl.int64) * ROWS
    if any_missing(segments, num_segments) == 0:
        first = num_new
    # New positions ascend, then -1 follows: a program that finds none has no more to do.
    while first < num_new:
        index = first + tl.arange(0, ROWS)
        position = tl.load(int64_at(new + 8 * index), index < num_new, -1)
        known = position >= 0
        found = any_of(known)
        first = tl.where(found, first + stride, num_new)
        if found:
            # The last segment that starts at or before a position: empty ones start there too.
            low = position * 0
            size = num_segments
            while size > 1:
                half = size // 2
                start = segments + (low + half) * STAGED_SEGMENT_BYTES + 8 * SEGMENT_START
                low = tl.where(tl.load(int64_at(start), known, 0) <= position, low + half, low)
                size -= half
            line = segments + low * STAGED_SEGMENT_BYTES
            header = tl.load(int64_at(line + 8 * SEGMENT_HEADER), known, 0)
            key = tl.load(int64_at(line + 8 * SEGMENT_IDS), known, 0) + 8 * position
            key = tl.load(int64_at(key), known, 0)
            row = tl.load(int64_at(rows + 8 * position), known, 0)
            blocks = tl.load(int64_at(header + 8 * BLOCKS), known, 0)
            shift = tl.load(int64_at(header + 8 * BLOCK_SHIFT), known, 0)
            row_bytes = tl.load(int64_at(header + 8 * ROW_BYTES), known, 0)
            target = row_address(blocks, shift, row_bytes, row, known)
            kind = tl.load(int64_at(header + 8 * INIT_KIND), known, 0)
            one, two = _argument(header, 0, known), _argument(header, 1, known)
            low_bound, high_bound = _argument(header, 2, known), _argument(header, 3, known)
            truncated = kind == INIT_TRUNCATED_NORMAL
            begin = tl.where(truncated, tl.erf(low_bound * _ROOT_HALF), -1.0)
            span = tl.where(truncated, tl.erf(high_bound * _ROOT_HALF) - begin, 2.0)
            low_bound = tl.where(truncated, low_bound, -_INFINITY)
            high_bound = tl.where(truncated, high_bound, _INFINITY)
            table_key = tl.load(int64_at(header + 8 * INIT_KEY), known, 0)
            base = mix(key.to(tl.uint64, bitcast=True))
            base = mix(table_key.to(tl.uint64, bitcast=True) ^ base)
            for start in tl.static_range(0, DIM, COLUMNS):
                column = start + tl.arange(0, COLUMNS)
                bits = base[:, None] + column.to(tl.uint64)[None, :] * _COLUMN
                bits = (mix(bits) >> 41).to(tl.int32)
                # 23 bits and a half: exact in float32, never 0 or 1.
                uniform = (bits.to(tl.float32) * 2 + 1) * _STEP
                x = begin[:, None] + span[:, None] * uniform
                x = tl.minimum(tl.maximum(x, _LOWEST), _HIGHEST)
                normal = _erfinv(x) * _ROOT_2
                normal = tl.minimum(tl.maximum(normal, low_bound[:, None]), high_bound[:, None])
                scaled = one[:, None] + two[:, None] * normal
                spread = one[:, None] + (two - one)[:, None] * uniform
                value = tl.where((kind == INIT_UNIFORM)[:, None], spread, scaled)
                value = tl.where((kind == INIT_CONSTANT)[:, None], one[:, None], value)
                inside = known[:, None] & (column < DIM)[None, :]
                if BFLOAT16:
                    at = target.to(tl.pointer_type(tl.bfloat16))[:, None] + column[None, :]
                    tl.store(at, to_bfloat16(value), inside)
                else:
                    tl.store(float_at(target)[:, None] + column[None, :], value, inside)
            state = target + 4 * DIM
            if BFLOAT16:
                state = target + 4 * ((DIM + 1) // 2)
            num_state = tl.load(int64_at(header + 8 * NUM_STATE), known, 0)
            at = (header + 8 * STATE_FILL).to(tl.pointer_type(tl.float64))
            fill = tl.load(at, known, 0).to(tl.float32)
            word = num_segments * 0
            most = largest(num_state)
            while word < most:
                words = word + tl.arange(0, COLUMNS)
                has = known[:, None] & (words[None, :] < num_state[:, None])
                values = tl.broadcast_to(fill[:, None], (ROWS, COLUMNS))
                tl.store(float_at(state)[:, None] + words[None, :], values, has)
                word += COLUMNS


def init_rows_(rows, new, segments, embedding_dim, bfloat16):
    device, num_new = rows.device, new.numel()
    staged = staged_segments(segments, rows.numel(), device)
    programs = min(-(-num_new // _ROWS), num_programs_at_once(device))
    _init_kernel.launch(
        device,
        programs,
        rows.data_ptr(),
        new.data_ptr(),
        num_new,
        *staged.where,
        DIM=embedding_dim,
        BFLOAT16=bfloat16,
        ROWS=_ROWS,
        COLUMNS=min(power_of_two(embedding_dim), _COLUMNS),
    )


__all__ = ["init_rows_"]
