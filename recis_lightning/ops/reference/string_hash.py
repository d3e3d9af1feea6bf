"""Hashes of strings in plain Python: integers without bounds, masked to 64 bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops.string_hash import FARMHASH64, MURMUR3, MURMUR64A, XXH64

_MASK = (1 << 64) - 1
_X = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)
_F0, _F1, _F2 = 0xC3A5C85C97CB3127, 0xB492B66FBE98F273, 0x9AE16A3B2F90404F
_M1, _M2 = 0x87C37B91114253D5, 0x4CF5AD432745937F
_A = 0xC6A4A7935BD1E995


def _left(value: int, bits: int) -> int:
    value &= _MASK
    return (value << bits | value >> (64 - bits)) & _MASK


def _right(value: int, bits: int) -> int:
    return _left(value, 64 - bits)


def _fold(value: int, bits: int) -> int:
    value &= _MASK
    return value ^ value >> bits


def _word(data: bytes, at: int, size: int = 8) -> int:
    return int.from_bytes(data[at : at + size], "little")


def _xxh64(data: bytes, seed: int) -> int:
    def round_of(state: int, word: int) -> int:
        return _left(state + word * _X[1], 31) * _X[0] & _MASK

    at, size = 0, len(data)
    value = seed + _X[4]
    if size >= 32:
        states = [seed + _X[0] + _X[1], seed + _X[1], seed, seed - _X[0]]
        for at in range(0, size - 31, 32):
            states = [round_of(s, _word(data, at + 8 * i)) for i, s in enumerate(states)]
        at = size // 32 * 32
        value = sum(_left(s, bits) for s, bits in zip(states, (1, 7, 12, 18), strict=True))
        for state in states:
            value = (value ^ round_of(0, state)) * _X[0] + _X[3]
            value &= _MASK
    value = value + size & _MASK
    while size - at >= 8:
        value = _left(value ^ round_of(0, _word(data, at)), 27) * _X[0] + _X[3] & _MASK
        at += 8
    if size - at >= 4:
        value = _left(value ^ _word(data, at, 4) * _X[0] & _MASK, 23) * _X[1] + _X[2] & _MASK
        at += 4
    for byte in data[at:]:
        value = _left(value ^ byte * _X[4] & _MASK, 11) * _X[0] & _MASK
    return _fold(_fold(_fold(value, 33) * _X[1], 29) * _X[2], 32)


def _pair(u: int, v: int, factor: int) -> int:
    a = _fold((u ^ v) * factor, 47)
    return _fold((v & _MASK ^ a) * factor, 47) * factor & _MASK


def _fingerprint(data: bytes) -> int:
    size, factor = len(data), _F2 + 2 * len(data)
    if size == 0:
        return _F2
    if size < 4:
        y, z = data[0] + (data[size // 2] << 8), size + (data[-1] << 2)
        return _fold(y * _F2 ^ z * _F0, 47) * _F2 & _MASK
    if size < 8:
        return _pair(size + (_word(data, 0, 4) << 3), _word(data, size - 4, 4), factor)
    if size <= 16:
        a, b = _word(data, 0) + _F2, _word(data, size - 8)
        return _pair(
            _right(b, 37) * factor + a & _MASK, (_right(a, 25) + b) * factor & _MASK, factor
        )
    if size > 64:
        return _long_fingerprint(data)
    a, b = _word(data, 0) * (_F1 if size <= 32 else _F2), _word(data, 8)
    c, d = _word(data, size - 8) * factor, _word(data, size - 16) * _F2
    y = _right(a + b, 43) + _right(c, 30) + d & _MASK
    z = _pair(y, a + _right(b + _F2, 18) + c & _MASK, factor)
    if size <= 32:
        return z
    e, f = _word(data, 16) * factor, _word(data, 24)
    g = (y + _word(data, size - 32)) * factor
    h = (z + _word(data, size - 24)) * factor
    u, v = _right(e + f, 43) + _right(g, 30) + h, e + _right(f + a, 18) + g
    return _pair(u & _MASK, v & _MASK, factor)


def _weak(data: bytes, at: int, a: int, b: int) -> tuple[int, int]:
    a, last = a + _word(data, at), _word(data, at + 24)
    b = _right(b + a + last, 21)
    c = a + _word(data, at + 8) + _word(data, at + 16)
    return c + last & _MASK, b + _right(c, 44) + a & _MASK


def _long_fingerprint(data: bytes) -> int:
    size, y = len(data), 81 * _F1 + 113
    x, z = 81 * _F2 + _word(data, 0), _fold(y * _F2 + 113, 47) * _F2
    v = w = (0, 0)
    last = size - 64
    for at in [*range(0, (size - 1) // 64 * 64, 64), last]:
        factor, nine = _F1, 1
        if at == last:  # the end overlaps what was read before
            factor, nine = _F1 + 2 * (z & 255), 9
            first = w[0] + ((size - 1) & 63)
            v = (v[0] + first, v[1])
            w = (first + v[0], w[1])
        x = _right(x + y + v[0] + _word(data, at + 8), 37) * factor
        y = _right(y + v[1] + _word(data, at + 48), 42) * factor
        x = x & _MASK ^ w[1] * nine & _MASK
        y += v[0] * nine + _word(data, at + 40)
        z = _right(z + w[0], 33) * factor
        v = _weak(data, at, v[1] * factor, x + w[0])
        w = _weak(data, at + 32, z + w[1], y + _word(data, at + 16))
        x, z = z & _MASK, x
    first = _pair(v[0], w[0], factor) + _fold(y, 47) * _F0 + z
    return _pair(first & _MASK, _pair(v[1], w[1], factor) + x & _MASK, factor)


def _farmhash64(data: bytes, seed: int) -> int:
    value = _fingerprint(data)
    return _pair(value - _F2 & _MASK, seed, 0x9DDFEA08EB382D69) if seed else value


def _murmur3(data: bytes, seed: int) -> int:
    def mix(value: int) -> int:
        return _fold(_fold(_fold(value, 33) * 0xFF51AFD7ED558CCD, 33) * 0xC4CEB9FE1A85EC53, 33)

    a = b = seed
    whole = len(data) // 16 * 16
    for at in range(0, whole, 16):
        a ^= _left(_word(data, at) * _M1, 31) * _M2 & _MASK
        a = (_left(a, 27) + b) * 5 + 0x52DCE729 & _MASK
        b ^= _left(_word(data, at + 8) * _M2, 33) * _M1 & _MASK
        b = (_left(b, 31) + a) * 5 + 0x38495AB5 & _MASK
    a ^= _left(_word(data, whole) * _M1, 31) * _M2 & _MASK ^ len(data)
    b ^= _left(_word(data, whole + 8) * _M2, 33) * _M1 & _MASK ^ len(data)
    a = a + b & _MASK
    b = a + b & _MASK
    return mix(a) + mix(b) & _MASK


def _murmur64a(data: bytes, seed: int) -> int:
    value, whole = seed ^ len(data) * _A & _MASK, len(data) // 8 * 8
    for at in range(0, whole, 8):
        value = (value ^ _fold(_word(data, at) * _A, 47) * _A & _MASK) * _A & _MASK
    if len(data) > whole:
        value = (value ^ _word(data, whole)) * _A
    return _fold(_fold(value, 47) * _A, 47)


_FUNCTIONS: dict[int, Callable[[bytes, int], int]] = {
    XXH64: _xxh64,
    FARMHASH64: _farmhash64,
    MURMUR3: _murmur3,
    MURMUR64A: _murmur64a,
}


def hash_strings(
    data: npt.NDArray[np.uint8], offsets: npt.NDArray[Any], kind: int, seed: int, out: Tensor
) -> None:
    function, text, ends = _FUNCTIONS[kind], data.tobytes(), offsets.tolist()
    hashes = [function(text[a:b], seed) for a, b in itertools.pairwise(ends)]
    out.copy_(torch.from_numpy(np.array(hashes, np.uint64).view(np.int64)))


__all__ = ["hash_strings"]
