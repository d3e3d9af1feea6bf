"""Hashes of strings in Numba, over the bytes as they lie in memory."""

from __future__ import annotations

import numpy as np

from recis_lightning.ops.cpu.intrinsics import (
    inlined,
    load_bytes_u32,
    load_bytes_u64,
    load_i32,
    load_i64,
    load_u8,
    store_i64,
)
from recis_lightning.ops.cpu.runtime import kernel_template
from recis_lightning.ops.string_hash import FARMHASH64, MURMUR3, XXH64

_STRINGS_PER_CHUNK = 4096
# Kernels' sums of signed and unsigned words would be floats: all words and shifts are unsigned.
_X1 = np.uint64(0x9E3779B185EBCA87)
_X2 = np.uint64(0xC2B2AE3D27D4EB4F)
_X3 = np.uint64(0x165667B19E3779F9)
_X4 = np.uint64(0x85EBCA77C2B2AE63)
_X5 = np.uint64(0x27D4EB2F165667C5)
_F0 = np.uint64(0xC3A5C85C97CB3127)
_F1 = np.uint64(0xB492B66FBE98F273)
_F2 = np.uint64(0x9AE16A3B2F90404F)
_PAIR = np.uint64(0x9DDFEA08EB382D69)
_M1 = np.uint64(0x87C37B91114253D5)
_M2 = np.uint64(0x4CF5AD432745937F)
_MIX1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX2 = np.uint64(0xC4CEB9FE1A85EC53)
_M5, _ADD1, _ADD2 = np.uint64(5), np.uint64(0x52DCE729), np.uint64(0x38495AB5)
_A = np.uint64(0xC6A4A7935BD1E995)
_ZERO, _ONE, _TWO, _NINE, _113 = (np.uint64(n) for n in (0, 1, 2, 9, 113))
_BYTE = np.uint64(0xFF)
_SEED = np.uint64(81)


@inlined
def _left(value, bits):
    return (value << np.uint64(bits)) | (value >> np.uint64(64 - bits))


@inlined
def _right(value, bits):
    return (value >> np.uint64(bits)) | (value << np.uint64(64 - bits))


@inlined
def _fold(value, bits):
    return value ^ (value >> np.uint64(bits))


@inlined
def _last_bytes(address, count):
    """Return fewer than eight bytes as a word."""
    word = _ZERO
    for i in range(count):
        word |= np.uint64(load_u8(address + i)) << np.uint64(8 * i)
    return word


@inlined
def _x_round(state, word):
    return _left(state + word * _X2, 31) * _X1


@inlined
def _x_merge(value, state):
    return (value ^ _x_round(_ZERO, state)) * _X1 + _X4


@inlined
def _xxh64(at, length, seed):
    end = at + length
    if length >= 32:
        a, b, c, d = seed + _X1 + _X2, seed + _X2, seed, seed - _X1
        while at + 32 <= end:
            a = _x_round(a, load_bytes_u64(at))
            b = _x_round(b, load_bytes_u64(at + 8))
            c = _x_round(c, load_bytes_u64(at + 16))
            d = _x_round(d, load_bytes_u64(at + 24))
            at += 32
        value = _left(a, 1) + _left(b, 7) + _left(c, 12) + _left(d, 18)
        value = _x_merge(_x_merge(_x_merge(_x_merge(value, a), b), c), d)
    else:
        value = seed + _X5
    value += np.uint64(length)
    while at + 8 <= end:
        value = _left(value ^ _x_round(_ZERO, load_bytes_u64(at)), 27) * _X1 + _X4
        at += 8
    if at + 4 <= end:
        value = _left(value ^ (np.uint64(load_bytes_u32(at)) * _X1), 23) * _X2 + _X3
        at += 4
    while at < end:
        value = _left(value ^ (np.uint64(load_u8(at)) * _X5), 11) * _X1
        at += 1
    return _fold(_fold(_fold(value, 33) * _X2, 29) * _X3, 32)


@inlined
def _f_pair(u, v, factor):
    a = _fold((u ^ v) * factor, 47)
    return _fold((v ^ a) * factor, 47) * factor


@inlined
def _f_to_16(at, length):
    size = np.uint64(length)
    factor = _F2 + size * _TWO
    if length >= 8:
        a = load_bytes_u64(at) + _F2
        b = load_bytes_u64(at + length - 8)
        return _f_pair(_right(b, 37) * factor + a, (_right(a, 25) + b) * factor, factor)
    if length >= 4:
        a = np.uint64(load_bytes_u32(at))
        b = np.uint64(load_bytes_u32(at + length - 4))
        return _f_pair(size + (a << np.uint64(3)), b, factor)
    if length > 0:
        a, b = np.uint64(load_u8(at)), np.uint64(load_u8(at + (length >> 1)))
        c = np.uint64(load_u8(at + length - 1))
        y, z = a + (b << np.uint64(8)), size + (c << _TWO)
        return _fold((y * _F2) ^ (z * _F0), 47) * _F2
    return _F2


@inlined
def _f_to_32(at, length):
    factor = _F2 + np.uint64(length) * _TWO
    a, b = load_bytes_u64(at) * _F1, load_bytes_u64(at + 8)
    c, d = load_bytes_u64(at + length - 8) * factor, load_bytes_u64(at + length - 16) * _F2
    y = _right(a + b, 43) + _right(c, 30) + d
    return _f_pair(y, a + _right(b + _F2, 18) + c, factor)


@inlined
def _f_to_64(at, length):
    factor = _F2 + np.uint64(length) * _TWO
    a, b = load_bytes_u64(at) * _F2, load_bytes_u64(at + 8)
    c, d = load_bytes_u64(at + length - 8) * factor, load_bytes_u64(at + length - 16) * _F2
    y = _right(a + b, 43) + _right(c, 30) + d
    z = _f_pair(y, a + _right(b + _F2, 18) + c, factor)
    e, f = load_bytes_u64(at + 16) * factor, load_bytes_u64(at + 24)
    g = (y + load_bytes_u64(at + length - 32)) * factor
    h = (z + load_bytes_u64(at + length - 24)) * factor
    y = _right(e + f, 43) + _right(g, 30) + h
    return _f_pair(y, e + _right(f + a, 18) + g, factor)


@inlined
def _f_weak(at, a, b):
    """Mix 32 bytes into two words."""
    last = load_bytes_u64(at + 24)
    a += load_bytes_u64(at)
    b = _right(b + a + last, 21)
    c = a
    a += load_bytes_u64(at + 8) + load_bytes_u64(at + 16)
    return a + last, b + _right(a, 44) + c


@inlined
def _f_long(at, length):
    x, y = _SEED, _SEED * _F1 + _113
    z = _fold(y * _F2 + _113, 47) * _F2
    v0 = v1 = w0 = w1 = _ZERO
    x = x * _F2 + load_bytes_u64(at)
    rest = (length - 1) & 63
    last, end = at + length - 64, at + length - 1 - rest
    while at != end:
        x = _right(x + y + v0 + load_bytes_u64(at + 8), 37) * _F1
        y = _right(y + v1 + load_bytes_u64(at + 48), 42) * _F1
        x ^= w1
        y += v0 + load_bytes_u64(at + 40)
        z = _right(z + w0, 33) * _F1
        v0, v1 = _f_weak(at, v1 * _F1, x + w0)
        w0, w1 = _f_weak(at + 32, z + w1, y + load_bytes_u64(at + 16))
        z, x = x, z
        at += 64
    factor = _F1 + ((z & _BYTE) << _ONE)
    w0 += np.uint64(rest)
    v0 += w0
    w0 += v0
    x = _right(x + y + v0 + load_bytes_u64(last + 8), 37) * factor
    y = _right(y + v1 + load_bytes_u64(last + 48), 42) * factor
    x ^= w1 * _NINE
    y += v0 * _NINE + load_bytes_u64(last + 40)
    z = _right(z + w0, 33) * factor
    v0, v1 = _f_weak(last, v1 * factor, x + w0)
    w0, w1 = _f_weak(last + 32, z + w1, y + load_bytes_u64(last + 16))
    z, x = x, z
    first = _f_pair(v0, w0, factor) + _fold(y, 47) * _F0 + z
    return _f_pair(first, _f_pair(v1, w1, factor) + x, factor)


@inlined
def _farmhash64(at, length, seed):
    if length <= 16:
        value = _f_to_16(at, length)
    elif length <= 32:
        value = _f_to_32(at, length)
    elif length <= 64:
        value = _f_to_64(at, length)
    else:
        value = _f_long(at, length)
    if seed != _ZERO:
        value = _f_pair(value - _F2, seed, _PAIR)
    return value


@inlined
def _m_mix(value):
    return _fold(_fold(_fold(value, 33) * _MIX1, 33) * _MIX2, 33)


@inlined
def _murmur3(at, length, seed):
    a, b, end = seed, seed, at + length
    while at + 16 <= end:
        a ^= _left(load_bytes_u64(at) * _M1, 31) * _M2
        a = (_left(a, 27) + b) * _M5 + _ADD1
        b ^= _left(load_bytes_u64(at + 8) * _M2, 33) * _M1
        b = (_left(b, 31) + a) * _M5 + _ADD2
        at += 16
    if end - at > 8:
        b ^= _left(_last_bytes(at + 8, end - at - 8) * _M2, 33) * _M1
    if end - at >= 8:
        a ^= _left(load_bytes_u64(at) * _M1, 31) * _M2
    elif end > at:
        a ^= _left(_last_bytes(at, end - at) * _M1, 31) * _M2
    a ^= np.uint64(length)
    b ^= np.uint64(length)
    a += b
    b += a
    return _m_mix(a) + _m_mix(b)


@inlined
def _murmur64a(at, length, seed):
    value, end = seed ^ (np.uint64(length) * _A), at + length
    while at + 8 <= end:
        value = (value ^ (_fold(load_bytes_u64(at) * _A, 47) * _A)) * _A
        at += 8
    if at < end:
        value = (value ^ _last_bytes(at, end - at)) * _A
    return _fold(_fold(value, 47) * _A, 47)


@kernel_template
def _hash_kernel(kind, offset_bytes):
    def hash_kernel(low, high, data, offsets, seed, out):
        for i in range(low, high):
            if offset_bytes == 4:
                start = np.int64(load_i32(offsets + 4 * i))
                length = np.int64(load_i32(offsets + 4 * i + 4)) - start
            else:
                start = load_i64(offsets + 8 * i)
                length = load_i64(offsets + 8 * i + 8) - start
            if kind == XXH64:
                value = _xxh64(data + start, length, np.uint64(seed))
            elif kind == FARMHASH64:
                value = _farmhash64(data + start, length, np.uint64(seed))
            elif kind == MURMUR3:
                value = _murmur3(data + start, length, np.uint64(seed))
            else:
                value = _murmur64a(data + start, length, np.uint64(seed))
            store_i64(out + 8 * i, np.int64(value))

    return hash_kernel


def hash_strings(data, offsets, kind, seed, out):
    _hash_kernel(kind, offsets.itemsize).launch(
        out.numel(), _STRINGS_PER_CHUNK, data=data, offsets=offsets, seed=seed, out=out
    )


__all__ = ["hash_strings"]
