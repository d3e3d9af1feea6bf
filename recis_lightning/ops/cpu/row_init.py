"""Initial rows in Numba: one hash, one uniform and one inverse normal a column, all vectorised."""

from __future__ import annotations

import math

import numpy as np

from recis_lightning.ops.cpu.intrinsics import (
    bits_of_float,
    float_of_bits,
    inlined,
    load_f32,
    load_f64,
    load_i64,
    splat,
    store_f32,
    store_weights,
)
from recis_lightning.ops.cpu.probe import SEGMENT_BYTES, next_segment, segment_at
from recis_lightning.ops.cpu.row_blocks import row_address, row_blocks_of
from recis_lightning.ops.cpu.runtime import kernel_template, num_chunks
from recis_lightning.ops.layout import (
    INIT_ARGS,
    INIT_CONSTANT,
    INIT_KEY,
    INIT_KIND,
    INIT_TRUNCATED_NORMAL,
    INIT_UNIFORM,
    NUM_STATE,
    SEGMENT_HEADER,
    SEGMENT_IDS,
    STATE_FILL,
)

_CHUNK = 256
_F = np.float32
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_COLUMN = np.uint64(0x9E3779B97F4A7C15)
_S27, _S30, _S31, _S41 = (np.uint64(n) for n in (27, 30, 31, 41))


@inlined
def mix(value):
    """Hash uint64: the finaliser of SplitMix64 (Steele, Lea, Flood, 2014)."""
    value = (value ^ (value >> _S30)) * _MIX_1
    value = (value ^ (value >> _S27)) * _MIX_2
    return value ^ (value >> _S31)


@inlined
def _log(x):
    # log of a positive normal float32: exponent * ln 2 + 2 atanh((m - 1) / (m + 1)).
    bits = bits_of_float(x) - np.int32(0x3F3504F3)
    exponent = _F(bits >> np.int32(23))
    mantissa = float_of_bits((bits & np.int32(0x7FFFFF)) + np.int32(0x3F3504F3))
    s = (mantissa - _F(1)) / (mantissa + _F(1))
    z = s * s
    tail = z * (_F(2 / 3) + z * (_F(2 / 5) + z * (_F(2 / 7) + z * _F(2 / 9))))
    return exponent * _F(0.6931471805599453) + (_F(2) * s + s * tail)


@inlined
def _erfinv(x):
    # Giles, "Approximating the erfinv function", GPU Computing Gems, 2010: single precision.
    w = -_log((_F(1) - x) * (_F(1) + x))
    a = w - _F(2.5)
    near = _F(2.81022636e-08)
    near = _F(3.43273939e-07) + near * a
    near = _F(-3.5233877e-06) + near * a
    near = _F(-4.39150654e-06) + near * a
    near = _F(0.00021858087) + near * a
    near = _F(-0.00125372503) + near * a
    near = _F(-0.00417768164) + near * a
    near = _F(0.246640727) + near * a
    near = _F(1.50140941) + near * a
    b = _F(math.sqrt(w)) - _F(3)
    far = _F(-0.000200214257)
    far = _F(0.000100950558) + far * b
    far = _F(0.00134934322) + far * b
    far = _F(-0.00367342844) + far * b
    far = _F(0.00573950773) + far * b
    far = _F(-0.0076224613) + far * b
    far = _F(0.00943887047) + far * b
    far = _F(1.00167406) + far * b
    far = _F(2.83297682) + far * b
    return (near if w < _F(5) else far) * x


@inlined
def _uniform(base, column):
    # 23 bits and a half: exact in float32, never 0 or 1.
    bits = mix(base + np.uint64(column) * _COLUMN) >> _S41
    return (_F(2) * _F(np.int32(bits)) + _F(1)) * _F(2.0**-24)


@inlined
def _fill(kind, args, base, target, embedding_dim):
    first, second = _F(load_f64(args)), _F(load_f64(args + 8))
    if kind == INIT_CONSTANT:
        for column in range(embedding_dim):
            store_f32(target + 4 * column, first)
    elif kind == INIT_UNIFORM:
        for column in range(embedding_dim):
            store_f32(target + 4 * column, first + (second - first) * _uniform(base, column))
    elif kind == INIT_TRUNCATED_NORMAL:
        low, high = _F(load_f64(args + 16)), _F(load_f64(args + 24))
        start = _F(math.erf(low * _F(math.sqrt(0.5))))
        span = _F(math.erf(high * _F(math.sqrt(0.5)))) - start
        for column in range(embedding_dim):
            x = start + span * _uniform(base, column)
            x = min(max(x, _F(2.0**-23 - 1)), _F(1 - 2.0**-23))
            normal = _F(math.sqrt(2)) * _erfinv(x)
            store_f32(target + 4 * column, first + second * min(max(normal, low), high))
    else:
        for column in range(embedding_dim):
            normal = _F(math.sqrt(2)) * _erfinv(_F(2) * _uniform(base, column) - _F(1))
            store_f32(target + 4 * column, first + second * normal)


@kernel_template
def _init_kernel(bfloat16):
    def init(
        low,
        high,
        chunk,
        rows,
        new,
        segments,
        num_segments,
        num_ids,
        embedding_dim,
        all_scratch,
    ):
        weight_bytes = 4 * embedding_dim
        if bfloat16:
            weight_bytes = 4 * ((embedding_dim + 1) >> 1)
        segment, end = segment_at(segments, num_segments, load_i64(new + 8 * low)), np.int64(-1)
        header, ids = np.int64(0), np.int64(0)
        for i in range(low, high):
            position = load_i64(new + 8 * i)
            if position >= end:
                segment, end = next_segment(position, segment, segments, num_segments, num_ids)
                line = segments + segment * SEGMENT_BYTES
                header, ids = load_i64(line + 8 * SEGMENT_HEADER), load_i64(line + 8 * SEGMENT_IDS)
            target = row_address(load_i64(rows + 8 * position), row_blocks_of(header))
            key = np.uint64(load_i64(header + 8 * INIT_KEY))
            base = mix(key ^ mix(np.uint64(load_i64(ids + 8 * position))))
            weights = target
            if bfloat16:
                weights = all_scratch + chunk * 4 * embedding_dim
            kind, args = load_i64(header + 8 * INIT_KIND), header + 8 * INIT_ARGS
            _fill(kind, args, base, weights, embedding_dim)
            if bfloat16:
                for column in range(embedding_dim):
                    value = splat(1, load_f32(weights + 4 * column))
                    store_weights(1, target + 2 * column, value)
            fill = _F(load_f64(header + 8 * STATE_FILL))
            for word in range(load_i64(header + 8 * NUM_STATE)):
                store_f32(target + weight_bytes + 4 * word, fill)

    return init


def kernel_of(bfloat16):
    """Return the kernel for weights in float32 (0) or bfloat16 (1)."""
    return _init_kernel(bfloat16)


def init_rows_(rows, new, segments, embedding_dim, bfloat16):
    num_scratch = num_chunks(new.numel(), _CHUNK) * embedding_dim if bfloat16 else 0
    kernel_of(int(bfloat16)).launch(
        new.numel(),
        _CHUNK,
        rows=rows,
        new=new,
        segments=segments,
        num_segments=len(segments),
        num_ids=rows.numel(),
        embedding_dim=embedding_dim,
        all_scratch=np.empty(num_scratch, np.float32),
    )
