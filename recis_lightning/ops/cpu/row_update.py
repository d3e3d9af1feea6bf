"""Reduce and update in Numba.

The update walks the sorted words of ``gradient_sort``: a row's gradients are added up in vector
registers and the row's weights and state are read and written once.
"""

from __future__ import annotations

import numpy as np
import torch

from recis_lightning.ops.cpu.gradient_sort import sort_gradients
from recis_lightning.ops.cpu.intrinsics import (
    add,
    at_least,
    at_most,
    fma,
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
    store_weights,
    vector_width,
)
from recis_lightning.ops.cpu.runtime import kernel_template, num_chunks
from recis_lightning.ops.cpu.update_rules import ROW_RULES, RULES, Hyper
from recis_lightning.ops.layout import (
    COUPLED_DECAY,
    HYPER_CLIP,
    HYPER_DECAY,
    HYPER_EPS,
    HYPER_LR,
    HYPER_SCALE,
    HYPER_WEIGHT_DECAY,
    SGD,
)

_NORM = -1  # a rule that updates nothing
_POSITIONS_PER_CHUNK = 1024
_AHEAD = 12  # positions between prefetch and use
_F = np.float32


@kernel_template
def _update_kernel(rule, width, bfloat16):
    item = 2 if bfloat16 else 4
    is_decayed = rule >= COUPLED_DECAY
    kind = SGD if rule == _NORM else rule % COUPLED_DECAY
    is_rowwise = kind in ROW_RULES
    apply_rule, update_row = RULES[kind], ROW_RULES.get(kind, RULES[kind])

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
        zero = splat(width, _F(0))
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
            lr = splat(width, -load_f32(hyper + 4 * HYPER_LR))
            eps = splat(width, load_f32(hyper + 4 * HYPER_EPS))
            decay = splat(width, load_f32(hyper + 4 * HYPER_DECAY))
            scale = splat(width, load_f32(hyper + 4 * HYPER_SCALE))
            clip = splat(width, load_f32(hyper + 4 * HYPER_CLIP))
            no_clip = splat(width, -load_f32(hyper + 4 * HYPER_CLIP))
            weight_decay = splat(width, load_f32(hyper + 4 * HYPER_WEIGHT_DECAY))
            values = Hyper(lr, eps, decay, hyper, state, dim_bytes)
            # A row-wise rule needs the whole gradient's mean square before the first weight.
            sweeps = 2 if is_rowwise else 1
            squares = np.float64(0)
            for sweep in range(sweeps):
                if is_rowwise and sweep == 1:
                    update_row(state, dim_bytes, hyper, _F(squares / embedding_dim))
                for d in range(0, embedding_dim, width):
                    g = zero
                    for i in range(start, end):
                        position = load_i64(keys + 8 * i) & position_mask
                        gradient = load_i64(addresses + 8 * position) + 4 * d
                        value = load_vector(width, gradient)
                        if scales:
                            weight = splat(width, load_f32(scales + 4 * position))
                            g = fma(value, weight, g)
                        else:
                            g = add(g, value)
                    if rule == _NORM:
                        norm += lane_sum(mul(g, g))
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
            start = end
        if rule == _NORM:
            store_f64(norms + 8 * chunk, norm)

    return update


def _launch(gradients, rule):
    layout = gradients.layout
    keys, addresses, scales, n, position_bits = gradients.work
    chunks = num_chunks(n, _POSITIONS_PER_CHUNK)
    norms = np.zeros(chunks if rule == _NORM else 0, np.float64)
    bfloat16 = int(layout.dtype is torch.bfloat16)
    _update_kernel(rule, vector_width(layout.embedding_dim), bfloat16).launch(
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
        applied=gradients.applied,
    )
    return norms


def squared_norm(gradients):
    return _launch(gradients, _NORM).sum()


def update_rows_(gradients, rule):
    _launch(gradients, rule)


__all__ = ["sort_gradients", "squared_norm", "update_rows_"]
