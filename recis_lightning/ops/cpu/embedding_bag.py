"""Gather and pool in Numba: rows are prefetched, pooled in registers and written once."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np

from recis_lightning.ops.cpu.first_step import compile_step
from recis_lightning.ops.cpu.intrinsics import (
    MAX_WIDTH,
    add,
    atomic_add,
    div,
    expanded,
    fma,
    inlined,
    load_f32,
    load_i64,
    load_u8,
    load_vector,
    load_weights,
    mul,
    prefetch,
    splat,
    store_i64,
    store_u8,
    store_weights,
    stream_vector,
    vector_width,
)
from recis_lightning.ops.cpu.plan import (
    PLAN_BYTES,
    bag_divisor,
    bag_start,
    bags_of_chunk,
    feature_at,
    split_plan,
)
from recis_lightning.ops.cpu.probe import (
    AHEAD,
    SEGMENT_BYTES,
    Index,
    find_row,
    index_of,
    prefetch_key,
)
from recis_lightning.ops.cpu.row_blocks import row_address, row_blocks_of
from recis_lightning.ops.cpu.runtime import kernel, kernel_template
from recis_lightning.ops.layout import (
    HAS_PADDING,
    INSERT,
    LAST_SEEN,
    MEAN,
    MEAN_BY_COUNT,
    MISSING,
    NO_ROW,
    NONE,
    PADDING,
    PLAN_BAG_LENGTH,
    PLAN_DATA,
    PLAN_DATA_STRIDE,
    PLAN_HEADER,
    PLAN_MODE,
    PLAN_NUM_BAGS,
    PLAN_NUM_IDS,
    PLAN_OFFSETS,
    PLAN_ROWS,
    PLAN_TILE_LEN,
    PLAN_WEIGHTS,
    SEGMENT_FLAGS,
    SEGMENT_IDS,
    SEGMENT_PADDING,
    SEGMENT_START,
    STEP,
    SUM,
    TILE,
    UNKNOWN,
)

_ROWS_PER_CHUNK = 1024  # of a write
_LAG = 16  # ids between finding a row, which prefetches it, and using it
_STREAMED_BYTES = 1 << 24  # an output of as many leaves no room for rows in a cache
_LINE = 64
_F = np.float32


@inlined
def _check_offsets(line, low, high):
    """Return whether offsets are well formed, and the end of the bags that may be pooled."""
    if load_i64(line + 8 * PLAN_BAG_LENGTH) >= 0:
        return True, high
    offsets, num_bags = load_i64(line + 8 * PLAN_OFFSETS), load_i64(line + 8 * PLAN_NUM_BAGS)
    num_ids = load_i64(line + 8 * PLAN_NUM_IDS)
    is_valid = load_i64(offsets) == 0 and load_i64(offsets + 8 * num_bags) == num_ids
    for bag in range(low, high):
        if load_i64(offsets + 8 * bag) > load_i64(offsets + 8 * bag + 8):
            return False, low  # such bags may hold ids that no chunk has found
    return is_valid, high


class _Lookup(NamedTuple):
    """Lookup of a feature's ids; of a gather whose rows are known, zeros."""

    ids: int  # address
    index: Index
    padding: int  # address of the padding id, or 0
    unknown: int  # row of an id without one
    last_seen: int
    step: int


@inlined
def _lookup_of(header, segment, training):
    ids = load_i64(segment + 8 * SEGMENT_IDS) + 8 * load_i64(segment + 8 * SEGMENT_START)
    flags = load_i64(segment + 8 * SEGMENT_FLAGS)
    padding, unknown = np.int64(0), np.int64(UNKNOWN)
    last_seen, step = np.int64(0), np.int64(0)
    if flags & HAS_PADDING:
        padding = segment + 8 * SEGMENT_PADDING
    if training:
        last_seen, step = load_i64(header + 8 * LAST_SEEN), load_i64(header + 8 * STEP)
        if flags & INSERT:
            unknown = np.int64(MISSING)
    return _Lookup(ids, index_of(header), padding, unknown, last_seen, step)


@inlined
def _find(i, end, lookup):
    """Return the row of the i-th id, and prefetch the entry of a later one before ``end``."""
    if i + AHEAD < end:
        prefetch_key(load_i64(lookup.ids + 8 * (i + AHEAD)), lookup.index)
    key = load_i64(lookup.ids + 8 * i)
    if lookup.padding and key == load_i64(lookup.padding):
        return np.int64(PADDING)
    row = find_row(key, lookup.index)
    return lookup.unknown if row == NO_ROW else row


def _row_functions(width, bfloat16):
    """Return functions of rows of weights: copy one, fill one with zeros, pool a bag of them."""
    item_bytes = 2 if bfloat16 else 4

    @expanded
    def copy_row(source, target, embedding_dim, weights, i):
        d = 0
        while True:  # there is a first vector: rows of one are the shortest of all
            value = load_weights(width, bfloat16, source + item_bytes * d)
            if weights:
                value = mul(value, splat(width, load_f32(weights + 4 * i)))
            store_weights(bfloat16, target + item_bytes * d, value)
            d += width
            if d >= embedding_dim:
                break

    @expanded
    def stream_row(source, target, embedding_dim):
        for d in range(0, embedding_dim, width):
            stream_vector(target + 4 * d, load_vector(width, source + 4 * d))

    @expanded
    def zero_row(target, embedding_dim):
        for d in range(0, embedding_dim, width):
            store_weights(bfloat16, target + item_bytes * d, splat(width, _F(0)))

    @expanded
    def pool_bag(mode, start, end, rows, weights, blocks, target, embedding_dim):
        divisor = bag_divisor(mode, rows, weights, start, end)
        for d in range(0, embedding_dim, width):
            total = splat(width, _F(0))
            for i in range(start, end):
                row = load_i64(rows + 8 * i)
                if row < 0:
                    continue
                address = row_address(row, blocks) + item_bytes * d
                value = load_weights(width, bfloat16, address)
                if weights:
                    total = fma(value, splat(width, load_f32(weights + 4 * i)), total)
                else:
                    total = add(total, value)
            if mode in (MEAN, MEAN_BY_COUNT):
                if divisor == _F(0):
                    total = splat(width, _F(0))
                else:
                    total = div(total, splat(width, divisor))
            store_weights(bfloat16, target + item_bytes * d, total)

    return copy_row, stream_row, zero_row, pool_bag


@kernel_template
def _gather_kernel(width, bfloat16, finding):
    """Compile the gather; where ``finding``, rows are not read but found first, chunk by chunk."""
    item_bytes = 2 if bfloat16 else 4
    copy_row, stream_row, zero_row, pool_bag = _row_functions(width, bfloat16)
    can_stream = width == MAX_WIDTH and not bfloat16  # its vectors are cache lines

    @expanded
    def row_ahead(i, end, rows, lookup, blocks, embedding_dim):
        """Return the i-th id's row, found where it is not known, and prefetch its weights."""
        row = load_i64(rows + 8 * i)
        if finding:
            row = _find(i, end, lookup)
            store_i64(rows + 8 * i, row)
        if row >= 0:
            address = row_address(row, blocks)
            prefetch(address)
            for byte in range(64, item_bytes * embedding_dim, 64):
                prefetch(address + byte)
            if lookup.last_seen:
                store_i64(lookup.last_seen + 8 * row, lookup.step)
        return row

    @expanded
    def gather_rows(first, last, rows, lookup, blocks, data, stride, embedding_dim, streams):
        """Copy a row for each id, some ids after it was found; return the number of misses."""
        misses = np.int64(0)
        for i in range(first, last + _LAG):
            if i < last:
                row = row_ahead(i, last, rows, lookup, blocks, embedding_dim)
                if finding:
                    misses += row == MISSING
            if i < first + _LAG:
                continue
            row, target = load_i64(rows + 8 * (i - _LAG)), data + (i - _LAG) * stride
            if row < 0:
                zero_row(target, embedding_dim)
            elif can_stream and streams:
                stream_row(row_address(row, blocks), target, embedding_dim)
            else:
                copy_row(row_address(row, blocks), target, embedding_dim, 0, 0)
        return misses

    @expanded
    def tile_bag(start, end, tile_len, rows, weights, blocks, target, embedding_dim):
        """Write the bag's first rows side by side, then zeros."""
        end = min(end, start + tile_len)
        for i in range(start, start + tile_len):
            row = np.int64(UNKNOWN)
            if i < end:
                row = load_i64(rows + 8 * i)
            if row >= 0:
                copy_row(row_address(row, blocks), target, embedding_dim, weights, i)
            else:
                zero_row(target, embedding_dim)
            target += item_bytes * embedding_dim

    def gather(
        chunk,
        plan,
        num_features,
        embedding_dim,
        segments,
        training,
        bad_feature,
        num_misses,
        is_large,
    ):
        feature = feature_at(plan, num_features, chunk)
        line = plan + feature * PLAN_BYTES
        header, mode = load_i64(line + 8 * PLAN_HEADER), load_i64(line + 8 * PLAN_MODE)
        rows, weights = load_i64(line + 8 * PLAN_ROWS), load_i64(line + 8 * PLAN_WEIGHTS)
        data, stride = load_i64(line + 8 * PLAN_DATA), load_i64(line + 8 * PLAN_DATA_STRIDE)
        blocks = row_blocks_of(header)
        low, high = bags_of_chunk(line, chunk)
        is_valid, high = _check_offsets(line, low, high)
        if not is_valid:
            store_i64(bad_feature, feature)
        first, last = bag_start(line, low), bag_start(line, high)
        none = np.int64(0)
        lookup = _Lookup(none, Index(none, none), none, none, none, none)
        if finding:
            lookup = _lookup_of(header, segments + feature * SEGMENT_BYTES, training)
            for i in range(first, min(first + AHEAD, last)):
                prefetch_key(load_i64(lookup.ids + 8 * i), lookup.index)
        misses = np.int64(0)
        if mode == NONE and not weights:  # as most features are
            # Columns of a joined output: nobody reads them before all of it is written.
            is_joined = stride > item_bytes * embedding_dim
            streams = is_large and is_joined and (data | stride) & (_LINE - 1) == 0
            misses = gather_rows(
                first, last, rows, lookup, blocks, data, stride, embedding_dim, streams
            )
        else:
            # The other modes find the rows of a whole chunk, and prefetch them, before using any.
            for i in range(first, last):
                row = row_ahead(i, last, rows, lookup, blocks, embedding_dim)
                if finding:
                    misses += row == MISSING
            # Weighted rows that are not pooled are tiles of one row.
            tile_len = load_i64(line + 8 * PLAN_TILE_LEN) if mode == TILE else np.int64(1)
            for bag in range(low, high):
                start = bag_start(line, bag)
                end = max(bag_start(line, bag + 1), start)
                out = data + bag * stride
                if mode in (SUM, MEAN, MEAN_BY_COUNT):
                    pool_bag(mode, start, end, rows, weights, blocks, out, embedding_dim)
                else:
                    tile_bag(start, end, tile_len, rows, weights, blocks, out, embedding_dim)
        if misses:
            atomic_add(num_misses, misses)

    return gather


def _gather(plan, segments, training, embedding_dim, bfloat16, finding):
    chunks, bad_feature, num_misses = split_plan(plan), ctypes.c_int64(-1), ctypes.c_int64(0)
    _gather_kernel(vector_width(embedding_dim), int(bfloat16), finding).launch(
        chunks,
        1,
        plan=plan,
        num_features=len(plan),
        embedding_dim=embedding_dim,
        segments=segments,
        training=int(training),
        bad_feature=bad_feature,
        num_misses=num_misses,
        is_large=int(4 * embedding_dim * plan[:, PLAN_NUM_BAGS].sum() >= _STREAMED_BYTES),
    )
    return bad_feature.value, num_misses.value


def gather(plan, embedding_dim, bfloat16, device):
    """Return a feature with malformed offsets, or -1; else as the contract."""
    return _gather(plan, None, 0, embedding_dim, bfloat16, 0)[0]


def find_and_gather(plan, segments, training, embedding_dim, bfloat16, device, kept):
    """Return a feature with malformed offsets, or -1, and the number of misses; as the contract."""
    return _gather(plan, segments, training, embedding_dim, bfloat16, 1)


def prepare_training(embedding_dim, bfloat16):
    width = vector_width(embedding_dim)
    gathers = [_gather_kernel(width, int(bfloat16), finding) for finding in (0, 1)]
    compile_step(gathers, embedding_dim, int(bfloat16))


@kernel
def _write_kernel(low, high, header, rows, values, num_bytes):
    blocks = row_blocks_of(header)
    for i in range(low, high):
        target = row_address(load_i64(rows + 8 * i), blocks)
        for byte in range(num_bytes):
            store_u8(target + byte, load_u8(values + i * num_bytes + byte))


def write_rows_(header, rows, values):
    _write_kernel.launch(
        rows.numel(),
        _ROWS_PER_CHUNK,
        header=header.address,
        rows=rows,
        values=values,
        num_bytes=values.shape[1] * values.element_size(),
    )


__all__ = ["NONE", "find_and_gather", "gather", "prepare_training", "write_rows_"]
