"""Reduce and update in Numba.

The update walks the sorted words of ``gradient_sort``: a row's gradients are added up in vector
registers and the row's weights and state are read and written once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from recis_lightning.ops.cpu.gradient_sort import sort_gradients
from recis_lightning.ops.cpu.intrinsics import (
    MAX_WIDTH,
    add,
    at_least,
    at_most,
    fma,
    inlined,
    lane_sum,
    load_f32,
    load_i64,
    load_vector,
    load_weights,
    mul,
    prefetch,
    splat,
    store_f64,
    store_i64,
    store_u8,
    store_weights,
    vector_width,
)
from recis_lightning.ops.cpu.runtime import kernel_template, num_chunks
from recis_lightning.ops.cpu.update_rules import DECAYS, ROW_RULES, RULES, Hyper
from recis_lightning.ops.layout import (
    COUPLED_DECAY,
    COW_CLIP,
    HYPER_CLIP,
    HYPER_COW_LEAST,
    HYPER_COW_RATIO,
    HYPER_DECAY,
    HYPER_EPS,
    HYPER_LR,
    HYPER_MARKS,
    HYPER_SCALE,
    HYPER_WEIGHT_DECAY,
    SGD,
)

_NORM = -1  # a rule that updates nothing
_POSITIONS_PER_CHUNK = 1024
_AHEAD = 12  # positions between prefetch and use
_F = np.float32


class _Positions(NamedTuple):
    """Sorted positions of one row's gradients."""

    keys: int  # address
    start: int
    end: int
    mask: int  # of the position in a key
    addresses: int  # of the gradients' addresses
    scales: int  # address, or 0


class _Factors(NamedTuple):
    """Hyperparameters of a row's table that every rule has."""

    lr: float
    eps: float
    decay: float
    scale: float
    clip: float
    weight_decay: float


@inlined
def _multiplied(factors, decay, scale):
    """Return factors with another decay and scale."""
    return _Factors(factors.lr, factors.eps, decay, scale, factors.clip, factors.weight_decay)


def _column_function(rule, width, bfloat16):
    """Return a function that updates some of a row's columns, ``width`` at a time."""
    item = 2 if bfloat16 else 4
    is_decayed, kind = rule != _NORM and rule & COUPLED_DECAY, _kind(rule)
    is_rowwise, apply_rule = kind in ROW_RULES, RULES[kind]

    @inlined
    def update_columns(first, last, positions, factors, hyper, row, state, second, sweep, squares):
        """Return ``squares`` plus the squares of the gradients, where these are asked for."""
        scale, clip = splat(width, factors.scale), splat(width, factors.clip)
        no_clip, weight_decay = splat(width, -factors.clip), splat(width, factors.weight_decay)
        lr, eps = splat(width, -factors.lr), splat(width, factors.eps)
        values = Hyper(lr, eps, splat(width, factors.decay), hyper, state, second)
        for d in range(first, last, width):
            g = splat(width, _F(0))
            for i in range(positions.start, positions.end):
                position = load_i64(positions.keys + 8 * i) & positions.mask
                gradient = load_i64(positions.addresses + 8 * position) + 4 * d
                value = load_vector(width, gradient)
                if positions.scales:
                    weight = splat(width, load_f32(positions.scales + 4 * position))
                    g = fma(value, weight, g)
                else:
                    g = add(g, value)
            if rule == _NORM:
                squares += lane_sum(mul(g, g))
                continue
            g = at_least(at_most(mul(g, scale), clip), no_clip)
            if is_decayed:
                w = load_weights(width, bfloat16, row + item * d)
                g = fma(weight_decay, w, g)
            if is_rowwise and sweep == 0:
                squares += lane_sum(mul(g, g))
                continue
            w = load_weights(width, bfloat16, row + item * d)
            w = apply_rule(w, g, state + 4 * d, values)
            store_weights(bfloat16, row + item * d, w)
        return squares

    return update_columns


def _cow_function(width, bfloat16):
    """Return a function of the factor by which CowClip makes a row's gradient smaller."""
    item = 2 if bfloat16 else 4
    add_squares = _column_function(_NORM, width, bfloat16)

    @inlined
    def cow_factor(embedding_dim, positions, factors, hyper, row, state, second, is_counted):
        squares = add_squares(
            0, embedding_dim, positions, factors, hyper, row, state, second, 0, np.float64(0)
        )
        weight_squares = np.float64(0)
        for d in range(0, embedding_dim, width):
            w = load_weights(width, bfloat16, row + item * d)
            weight_squares += lane_sum(mul(w, w))
        num_ids = np.float64(positions.end - positions.start)
        if is_counted:
            num_ids = np.float64(0)
            for i in range(positions.start, positions.end):
                position = load_i64(positions.keys + 8 * i) & positions.mask
                gradient = load_i64(positions.addresses + 8 * position)
                num_ids += load_f32(gradient + 4 * embedding_dim)
        bound = load_f32(hyper + 4 * HYPER_COW_RATIO) * math.sqrt(weight_squares)
        bound = num_ids * max(bound, np.float64(load_f32(hyper + 4 * HYPER_COW_LEAST)))
        norm = math.sqrt(squares) * factors.scale
        if norm > bound:  # a comparison with NaN is false: NaN stays
            return _F(bound / norm)
        return _F(1)

    return cow_factor


def _kind(rule):
    return SGD if rule == _NORM else rule % COUPLED_DECAY


def _has_cow_clip(rule):
    return rule != _NORM and bool(rule & COW_CLIP)


def _widths(rule, embedding_dim):
    """Return how many columns are updated at a time, and how many of those that are left then.

    The second is 0 if the first divides ``embedding_dim``, as it does where squares are added up in
    the order of the columns.
    """
    width = vector_width(embedding_dim)
    in_order = rule == _NORM or _kind(rule) in ROW_RULES or _has_cow_clip(rule)
    if in_order or 2 * width > min(embedding_dim, MAX_WIDTH):
        return width, 0
    wide = 1 << (min(embedding_dim, MAX_WIDTH).bit_length() - 1)
    return wide, vector_width(embedding_dim % wide)


@kernel_template
def _update_kernel(rule, width, rest_width, bfloat16):
    kind = _kind(rule)
    is_rowwise, update_row = kind in ROW_RULES, ROW_RULES.get(kind, RULES[kind])
    has_decay, row_decay = kind in DECAYS, DECAYS.get(kind, RULES[kind])
    update_columns = _column_function(rule, width, bfloat16)
    update_rest = _column_function(rule, rest_width or 1, bfloat16)
    cow_factor, has_cow_clip = _cow_function(width, bfloat16), _has_cow_clip(rule)

    def update(
        low,
        high,
        num_items,
        chunk,
        keys,
        addresses,
        scales,
        blocks,
        num_rows,
        block_shift,
        row_bytes,
        embedding_dim,
        norms,
        position_bits,
        is_counted,
        applied,
    ):
        if rule != _NORM:
            store_i64(applied, 1)
        position_mask = (np.int64(1) << position_bits) - 1
        block_mask = (np.int64(1) << block_shift) - 1
        state_at = embedding_dim * 4
        if bfloat16:
            state_at = ((embedding_dim + 1) >> 1) << 2
        dim_bytes = 4 * embedding_dim
        rest = embedding_dim
        if rest_width:
            rest = embedding_dim - embedding_dim % width
        start = low
        norm = np.float64(0)
        if start > 0:  # a run that began before belongs to the chunk before
            before = load_i64(keys + 8 * start - 8) >> position_bits
            while start < high and load_i64(keys + 8 * start) >> position_bits == before:
                start += 1
        for i in range(start, min(start + _AHEAD, num_items)):
            key = load_i64(keys + 8 * i)
            gradient = load_i64(addresses + 8 * (key & position_mask))
            for byte in range(0, dim_bytes, 64):
                prefetch(gradient + byte)
        while start < high:
            flat = load_i64(keys + 8 * start) >> position_bits
            if flat >= num_rows:  # ids without a row
                start += 1
                continue
            end = start
            while end < num_items and load_i64(keys + 8 * end) >> position_bits == flat:
                if end + 2 * _AHEAD < num_items:
                    key = load_i64(keys + 8 * (end + 2 * _AHEAD))
                    prefetch(addresses + 8 * (key & position_mask))
                if end + _AHEAD < num_items:
                    key = load_i64(keys + 8 * (end + _AHEAD))
                    gradient = load_i64(addresses + 8 * (key & position_mask))
                    for byte in range(0, dim_bytes, 64):
                        prefetch(gradient + byte)
                    later = key >> position_bits
                    last = load_i64(keys + 8 * (end + _AHEAD - 1)) >> position_bits
                    if later != last and later < num_rows:
                        row = load_i64(blocks + 16 * (later >> block_shift))
                        row += (later & block_mask) * row_bytes
                        for byte in range(0, row_bytes, 64):
                            prefetch(row + byte)
                end += 1
            line = blocks + 16 * (flat >> block_shift)
            row = load_i64(line) + (flat & block_mask) * row_bytes
            hyper = load_i64(line + 8)
            state = row + state_at
            positions = _Positions(keys, start, end, position_mask, addresses, scales)
            factors = _Factors(
                load_f32(hyper + 4 * HYPER_LR),
                load_f32(hyper + 4 * HYPER_EPS),
                load_f32(hyper + 4 * HYPER_DECAY),
                load_f32(hyper + 4 * HYPER_SCALE),
                load_f32(hyper + 4 * HYPER_CLIP),
                load_f32(hyper + 4 * HYPER_WEIGHT_DECAY),
            )
            if has_cow_clip:
                cow = cow_factor(
                    embedding_dim, positions, factors, hyper, row, state, dim_bytes, is_counted
                )
                factors = _multiplied(factors, factors.decay, factors.scale * cow)
            if has_decay:
                decay = row_decay(state, dim_bytes, hyper)
                factors = _multiplied(factors, factors.decay * decay, factors.scale)
            of_row = (positions, factors, hyper, row, state, dim_bytes)
            if rule == _NORM:
                norm = update_columns(0, rest, *of_row, 0, norm)
            else:
                marks = load_i64(hyper + 4 * HYPER_MARKS)
                if marks != 0:
                    store_u8(marks + flat, np.uint8(0))
                if is_rowwise:  # its rule needs the whole gradient's mean square first
                    squares = update_columns(0, rest, *of_row, 0, np.float64(0))
                    update_row(state, dim_bytes, hyper, _F(squares / embedding_dim))
                update_columns(0, rest, *of_row, 1, np.float64(0))
                if rest_width:
                    update_rest(rest, embedding_dim, *of_row, 1, np.float64(0))
            start = end
        if rule == _NORM:
            store_f64(norms + 8 * chunk, norm)

    return update


def kernel_of(rule, embedding_dim, bfloat16):
    """Return the kernel of a rule for rows of a size, in float32 (0) or bfloat16 (1)."""
    return _update_kernel(rule, *_widths(rule, embedding_dim), bfloat16)


def _launch(gradients, rule):
    layout = gradients.layout
    keys, addresses, scales, n, position_bits = gradients.work
    chunks = num_chunks(n, _POSITIONS_PER_CHUNK)
    norms = np.zeros(chunks if rule == _NORM else 0, np.float64)
    bfloat16 = int(layout.dtype is torch.bfloat16)
    kernel_of(rule, layout.embedding_dim, bfloat16).launch(
        n,
        _POSITIONS_PER_CHUNK,
        keys=keys,
        addresses=addresses,
        scales=scales,
        blocks=gradients.blocks,
        num_rows=len(gradients.blocks) << layout.block_shift,
        block_shift=layout.block_shift,
        row_bytes=layout.row_bytes,
        embedding_dim=layout.embedding_dim,
        norms=norms,
        position_bits=position_bits,
        is_counted=int(_has_cow_clip(rule) and gradients.is_counted),
        applied=gradients.applied,
    )
    return norms


def squared_norm(gradients):
    return _launch(gradients, _NORM).sum()


def update_rows_(gradients, rule):
    _launch(gradients, rule)


def count_rows(gradients):
    keys, _, _, n, position_bits = gradients.work
    rows = keys[:n] >> position_bits
    rows = rows[rows < len(gradients.blocks) << gradients.layout.block_shift]
    return int(np.count_nonzero(np.diff(rows, prepend=-1)))


__all__ = ["count_rows", "sort_gradients", "squared_norm", "update_rows_"]
