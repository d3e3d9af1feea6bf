"""Gather and pool in Numba: rows are prefetched, pooled in registers and written once."""

from __future__ import annotations

import functools

import numpy as np
from numba import njit

from recis_lightning.ops.cpu import runtime
from recis_lightning.ops.cpu.intrinsics import (
    add,
    atomic_add,
    div,
    fma,
    load_f32,
    load_i64,
    load_u8,
    load_weights,
    mul,
    prefetch,
    splat,
    store_i64,
    store_u8,
    store_weights,
    vector_width,
)
from recis_lightning.ops.cpu.probe import AHEAD, SEGMENT_BYTES, find_row, slot_of
from recis_lightning.ops.cpu.runtime import address_of, num_chunks
from recis_lightning.ops.layout import (
    BLOCK_SHIFT,
    BLOCKS,
    CAPACITY,
    ENTRIES,
    HAS_PADDING,
    INSERT,
    LAST_SEEN,
    MEAN,
    MISSING,
    NO_ROW,
    NONE,
    PADDING,
    PLAN_BAG_LENGTH,
    PLAN_BAGS_PER_CHUNK,
    PLAN_DATA,
    PLAN_DATA_STRIDE,
    PLAN_FIRST_CHUNK,
    PLAN_HEADER,
    PLAN_MODE,
    PLAN_NUM_BAGS,
    PLAN_NUM_IDS,
    PLAN_OFFSETS,
    PLAN_ROWS,
    PLAN_SIZE,
    PLAN_TILE_LEN,
    PLAN_WEIGHTS,
    ROW_BYTES,
    SEGMENT_FLAGS,
    SEGMENT_IDS,
    SEGMENT_PADDING,
    SEGMENT_START,
    SHIFT,
    STEP,
    SUM,
    TILE,
    UNKNOWN,
)

# Ids a ticket: fewer even out, more start a pipeline of prefetches less often.
_IDS_PER_CHUNK, _MANY_IDS_PER_CHUNK, _MANY_IDS = 1024, 4096, 1 << 16
_AHEAD = 10  # rows between prefetch and use
_BEHIND = 16  # ids between finding a row, which asks for it, and using it
_F = np.float32


@runtime.kernel
def _split_kernel(args):
    plan, num_features = load_i64(args + 16), load_i64(args + 24)
    num_ids = np.int64(0)
    for feature in range(num_features):
        num_ids += load_i64(plan + feature * 8 * PLAN_SIZE + 8 * PLAN_NUM_IDS)
    chunks = np.int64(0)
    for feature in range(num_features):
        line = plan + feature * 8 * PLAN_SIZE
        bags = load_i64(line + 8 * PLAN_NUM_BAGS)
        mean_length = max(load_i64(line + 8 * PLAN_NUM_IDS) // max(bags, 1), 1)
        ids = np.int64(_IDS_PER_CHUNK)
        if num_ids >= _MANY_IDS and load_i64(line + 8 * PLAN_MODE) == NONE:
            ids = np.int64(_MANY_IDS_PER_CHUNK)
        per_chunk = max(ids // mean_length, 1)
        store_i64(line + 8 * PLAN_BAGS_PER_CHUNK, per_chunk)
        store_i64(line + 8 * PLAN_FIRST_CHUNK, chunks)
        # One without bags too: its offsets are checked.
        chunks += max((bags + per_chunk - 1) // per_chunk, 1)
    store_i64(args + 32, chunks)


def split_plan(plan):
    """Fill the plan's chunk columns; return the number of chunks."""
    return _split_kernel.launch(1, address_of(plan), len(plan), 0)[4]


@njit
def feature_at(plan, num_features, chunk):
    """Return the last feature whose first chunk is at or before ``chunk``."""
    low, high = 0, num_features
    while high - low > 1:
        middle = (low + high) >> 1
        if load_i64(plan + middle * 8 * PLAN_SIZE + 8 * PLAN_FIRST_CHUNK) <= chunk:
            low = middle
        else:
            high = middle
    return low


@njit
def row_address(row, blocks, shift, mask, row_bytes):
    """Return where a row lies."""
    return load_i64(blocks + 8 * (row >> shift)) + (row & mask) * row_bytes


@njit
def bag_start(line, bag):
    """Return a bag's first id, kept inside the feature whatever its offsets say."""
    length = load_i64(line + 8 * PLAN_BAG_LENGTH)
    if length >= 0:
        return bag * length
    start = load_i64(load_i64(line + 8 * PLAN_OFFSETS) + 8 * bag)
    return min(max(start, 0), load_i64(line + 8 * PLAN_NUM_IDS))


@njit
def bag_divisor(mode, rows, weights, start, end):
    """Return what a bag's sum is divided by: 1, its ids, or the sum of its weights."""
    if mode != MEAN:
        return _F(1)
    divisor = _F(0)
    for i in range(start, end):
        if load_i64(rows + 8 * i) != PADDING:
            divisor += load_f32(weights + 4 * i) if weights else _F(1)
    return divisor


@njit
def _find(ids, i, end, entries, shift, capacity, padding, unknown):
    """Return the row of the i-th id as a lookup names it, and ask for the entry of a later id.

    ``padding`` is the address of the padding id, or 0.
    """
    if i + AHEAD < end:
        prefetch(entries + 16 * slot_of(load_i64(ids + 8 * (i + AHEAD)), shift))
    key = load_i64(ids + 8 * i)
    if padding and key == load_i64(padding):
        return np.int64(PADDING)
    row = find_row(key, entries, shift, capacity)
    return unknown if row == NO_ROW else row


@functools.cache
def _gather_kernel(width, bfloat16, finding):
    """Compile the gather; where ``finding``, rows are not read but found first, chunk by chunk."""
    item = 2 if bfloat16 else 4

    def gather(args):
        plan, num_features = load_i64(args + 16), load_i64(args + 24)
        embedding_dim, bad = load_i64(args + 32), args + 40
        segments, training, all_misses = load_i64(args + 48), load_i64(args + 56), args + 64
        chunks = load_i64(args + 8)
        num_bytes = embedding_dim * item
        zero = splat(width, _F(0))
        while True:
            chunk = atomic_add(args, 1)
            if chunk >= chunks:
                break
            feature = feature_at(plan, num_features, chunk)
            line = plan + feature * 8 * PLAN_SIZE
            header, mode = load_i64(line + 8 * PLAN_HEADER), load_i64(line + 8 * PLAN_MODE)
            blocks, shift = load_i64(header + 8 * BLOCKS), load_i64(header + 8 * BLOCK_SHIFT)
            mask, row_bytes = (np.int64(1) << shift) - 1, load_i64(header + 8 * ROW_BYTES)
            rows, num_ids = load_i64(line + 8 * PLAN_ROWS), load_i64(line + 8 * PLAN_NUM_IDS)
            weights = load_i64(line + 8 * PLAN_WEIGHTS)
            data, stride = load_i64(line + 8 * PLAN_DATA), load_i64(line + 8 * PLAN_DATA_STRIDE)
            # Weighted rows that are not pooled are tiles of one row.
            tile_len = load_i64(line + 8 * PLAN_TILE_LEN) if mode == TILE else np.int64(1)
            per_chunk = load_i64(line + 8 * PLAN_BAGS_PER_CHUNK)
            low = (chunk - load_i64(line + 8 * PLAN_FIRST_CHUNK)) * per_chunk
            high = min(low + per_chunk, load_i64(line + 8 * PLAN_NUM_BAGS))
            if load_i64(line + 8 * PLAN_BAG_LENGTH) < 0:
                offsets = load_i64(line + 8 * PLAN_OFFSETS)
                if (
                    load_i64(offsets) != 0
                    or load_i64(offsets + 8 * load_i64(line + 8 * PLAN_NUM_BAGS)) != num_ids
                ):
                    store_i64(bad, feature)
                for bag in range(low, high):
                    if load_i64(offsets + 8 * bag) > load_i64(offsets + 8 * bag + 8):
                        store_i64(bad, feature)
                        high = low  # such bags may hold ids that no chunk has found
                        break
            first, last = bag_start(line, low), bag_start(line, high)
            ids, entries, slots, capacity = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
            padding, unknown, misses = np.int64(0), np.int64(UNKNOWN), np.int64(0)
            last_seen, step = np.int64(0), np.int64(0)
            if finding:
                info = segments + feature * SEGMENT_BYTES
                ids = load_i64(info + 8 * SEGMENT_IDS) + 8 * load_i64(info + 8 * SEGMENT_START)
                entries, slots = load_i64(header + 8 * ENTRIES), load_i64(header + 8 * SHIFT)
                capacity = load_i64(header + 8 * CAPACITY)
                flags = load_i64(info + 8 * SEGMENT_FLAGS)
                if flags & HAS_PADDING:
                    padding = info + 8 * SEGMENT_PADDING
                if training:
                    last_seen, step = load_i64(header + 8 * LAST_SEEN), load_i64(header + 8 * STEP)
                    if flags & INSERT:
                        unknown = np.int64(MISSING)
                for i in range(first, min(first + AHEAD, last)):
                    prefetch(entries + 16 * slot_of(load_i64(ids + 8 * i), slots))
            if mode == NONE and not weights:
                # What most features are, in one loop: a row is copied some ids after it was found
                # and asked for.
                for i in range(first, last + _BEHIND):
                    if i < last:
                        row = load_i64(rows + 8 * i)
                        if finding:
                            row = _find(ids, i, last, entries, slots, capacity, padding, unknown)
                            store_i64(rows + 8 * i, row)
                            misses += row == MISSING
                        if row >= 0:
                            address = row_address(row, blocks, shift, mask, row_bytes)
                            for byte in range(0, num_bytes, 64):
                                prefetch(address + byte)
                            if last_seen:
                                store_i64(last_seen + 8 * row, step)
                    if i < first + _BEHIND:
                        continue
                    row, out = load_i64(rows + 8 * (i - _BEHIND)), data + (i - _BEHIND) * stride
                    if row >= 0:
                        address = row_address(row, blocks, shift, mask, row_bytes)
                        for d in range(0, embedding_dim, width):
                            value = load_weights(width, bfloat16, address + item * d)
                            store_weights(bfloat16, out + item * d, value)
                    else:
                        for d in range(0, embedding_dim, width):
                            store_weights(bfloat16, out + item * d, zero)
                if misses:
                    atomic_add(all_misses, misses)
                continue
            # The other modes find the rows of a whole chunk, and ask for them, before using any.
            for i in range(first, last):
                row = load_i64(rows + 8 * i)
                if finding:
                    row = _find(ids, i, last, entries, slots, capacity, padding, unknown)
                    store_i64(rows + 8 * i, row)
                    misses += row == MISSING
                if row >= 0:
                    address = row_address(row, blocks, shift, mask, row_bytes)
                    for byte in range(0, num_bytes, 64):
                        prefetch(address + byte)
                    if last_seen:
                        store_i64(last_seen + 8 * row, step)
            if misses:
                atomic_add(all_misses, misses)
            for bag in range(low, high):
                start = bag_start(line, bag)
                end = max(bag_start(line, bag + 1), start)
                out = data + bag * stride
                if mode in (SUM, MEAN):
                    divisor = bag_divisor(mode, rows, weights, start, end)
                    for d in range(0, embedding_dim, width):
                        total = zero
                        for i in range(start, end):
                            row = load_i64(rows + 8 * i)
                            if row < 0:
                                continue
                            address = row_address(row, blocks, shift, mask, row_bytes)
                            value = load_weights(width, bfloat16, address + item * d)
                            if weights:
                                total = fma(value, splat(width, load_f32(weights + 4 * i)), total)
                            else:
                                total = add(total, value)
                        if mode == MEAN:
                            if divisor == _F(0):
                                total = zero
                            else:
                                total = div(total, splat(width, divisor))
                        store_weights(bfloat16, out + item * d, total)
                    continue
                end = min(end, start + tile_len)
                for i in range(start, end):
                    row = load_i64(rows + 8 * i)
                    if row < 0:
                        for d in range(0, embedding_dim, width):
                            store_weights(bfloat16, out + item * d, zero)
                    else:
                        address = row_address(row, blocks, shift, mask, row_bytes)
                        for d in range(0, embedding_dim, width):
                            value = load_weights(width, bfloat16, address + item * d)
                            if weights:
                                value = mul(value, splat(width, load_f32(weights + 4 * i)))
                            store_weights(bfloat16, out + item * d, value)
                    out += item * embedding_dim
                for _ in range(end, start + tile_len):
                    for d in range(0, embedding_dim, width):
                        store_weights(bfloat16, out + item * d, zero)
                    out += item * embedding_dim

    return runtime.kernel(gather)


def gather(plan, embedding_dim, bfloat16, device):
    """See the contract; returns a feature with malformed offsets, or -1."""
    kernel = _gather_kernel(vector_width(embedding_dim), int(bfloat16), 0)
    chunks = split_plan(plan)
    return kernel.launch(chunks, address_of(plan), len(plan), embedding_dim, -1, 0, 0, 0)[5]


def find_and_gather(plan, segments, training, embedding_dim, bfloat16, device):
    """See the contract; returns a feature with malformed offsets, or -1, and the misses."""
    kernel = _gather_kernel(vector_width(embedding_dim), int(bfloat16), 1)
    chunks = split_plan(plan)
    where = (address_of(plan), len(plan), embedding_dim, -1)
    done = kernel.launch(chunks, *where, address_of(segments), int(training), 0)
    return done[5], done[8]


@runtime.kernel
def _write_kernel(args):
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)
    header, rows, values = load_i64(args + 32), load_i64(args + 40), load_i64(args + 48)
    num_bytes = load_i64(args + 56)
    blocks, shift = load_i64(header + 8 * BLOCKS), load_i64(header + 8 * BLOCK_SHIFT)
    mask, row_bytes = (np.int64(1) << shift) - 1, load_i64(header + 8 * ROW_BYTES)
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        for i in range(chunk * chunk_size, min((chunk + 1) * chunk_size, n)):
            target = row_address(load_i64(rows + 8 * i), blocks, shift, mask, row_bytes)
            for byte in range(num_bytes):
                store_u8(target + byte, load_u8(values + i * num_bytes + byte))


def write_rows_(header, rows, values):
    """See the contract."""
    n = rows.numel()
    num_bytes = values.shape[1] * values.element_size()
    where = (header.address, rows.data_ptr(), values.data_ptr())
    _write_kernel.launch(num_chunks(n, _IDS_PER_CHUNK), _IDS_PER_CHUNK, n, *where, num_bytes)


__all__ = [
    "NONE",
    "bag_divisor",
    "bag_start",
    "feature_at",
    "find_and_gather",
    "gather",
    "row_address",
    "split_plan",
]
