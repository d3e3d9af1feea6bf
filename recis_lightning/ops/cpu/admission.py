"""Admission in Numba: count all misses, then admit or reject each of them."""

from __future__ import annotations

import numpy as np

from recis_lightning.ops.cpu.intrinsics import (
    atomic_add,
    compare_and_swap,
    compare_and_swap_u8,
    inlined,
    load_i64,
    load_u8,
    store_i64,
)
from recis_lightning.ops.cpu.probe import (
    AHEAD,
    CHUNK,
    SEGMENT_BYTES,
    Index,
    claim_slot,
    find_slot,
    index_of,
    next_segment,
    prefetch_key,
    segment_at,
)
from recis_lightning.ops.cpu.row_init import mix
from recis_lightning.ops.cpu.runtime import kernel
from recis_lightning.ops.layout import (
    ADMISSION_ADDED,
    ADMISSION_COUNTER,
    ADMISSION_COUNTERS,
    ADMISSION_FORGET_AFTER,
    ADMISSION_KIND,
    ADMISSION_NUM_BLOCKS,
    ADMISSION_NUM_HASHES,
    ADMISSION_NUM_LOOKUPS,
    ADMISSION_PER_BATCH,
    ADMISSION_THRESHOLD,
    ADMISSION_WIDTH,
    CHECK_ADMISSION,
    COUNT,
    COUNT_MASK,
    DRAW,
    INIT_KEY,
    MAX_COUNTER,
    NO_ROW,
    NUM_IDS,
    NUM_REJECTED,
    SEGMENT_FLAGS,
    SEGMENT_HEADER,
    SEGMENT_IDS,
    SKETCH,
    UNKNOWN,
)

_SECOND_HASH = np.uint64(0x9E3779B97F4A7C15)
_DRAW_KEY = np.uint64(0xD1B54A32D192ED03)
_SHARD_1, _SHARD_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_S11, _S32, _S33 = np.uint64(11), np.uint64(32), np.uint64(33)


@inlined
def _count(cell, weight, now, wanted, forget_after, per_batch):
    """Add to an entry's count, from 0 if the count has expired, up to ``wanted``."""
    before = load_i64(cell)
    while True:
        count = np.int64(0)
        if before != NO_ROW:
            last, count = before >> 32, before & COUNT_MASK
            if last == now:
                if per_batch:
                    return
            elif count >= wanted or now - last > forget_after:
                count = np.int64(0)
        after = (now << 32) | min(count + weight, wanted)
        if after == before:
            return
        stored = compare_and_swap(cell, before, after)
        if stored == before:
            return
        before = stored


@inlined
def _block_of(key, num_blocks):
    """Return an id's block of the sketch: ``ops.shard_hash`` modulo their number."""
    bits = np.uint64(key)
    bits = (bits ^ (bits >> _S33)) * _SHARD_1
    bits = (bits ^ (bits >> _S33)) * _SHARD_2
    return np.int64((bits >> _S33) % np.uint64(num_blocks))


@inlined
def _counter_of(counters, first, second, i, width):
    """Return the address of an id's counter for the i-th hash function."""
    high = (first + np.uint64(i) * second) >> _S32
    return counters + i * width + np.int64((high * np.uint64(width)) >> _S32)


@inlined
def _add_to_counter(cell, weight):
    """Add to a byte of the sketch, up to ``MAX_COUNTER``."""
    before = load_u8(cell)
    while before < MAX_COUNTER:
        after = np.uint8(min(np.int64(before) + weight, MAX_COUNTER))
        stored = compare_and_swap_u8(cell, before, after)
        if stored == before:
            return
        before = stored


@kernel
def _count_misses_kernel(
    low, high, misses, entries_of_misses, weights, segments, num_segments, num_ids
):
    segment, end = segment_at(segments, num_segments, load_i64(misses + 8 * low)), np.int64(-1)
    ids, counter, kind, now = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    wanted, forget_after, per_batch = np.int64(0), np.int64(0), np.int64(0)
    index = Index(np.int64(0), np.int64(0))
    cells, width, num_hashes = np.int64(0), np.int64(0), np.int64(0)
    num_blocks, added = np.int64(1), np.int64(0)
    for i in range(low, high):
        position = load_i64(misses + 8 * i)
        if position >= end:
            segment, end = next_segment(position, segment, segments, num_segments, num_ids)
            line = segments + segment * SEGMENT_BYTES
            kind = np.int64(0)
            if load_i64(line + 8 * SEGMENT_FLAGS) & CHECK_ADMISSION:
                ids = load_i64(line + 8 * SEGMENT_IDS)
                counter = load_i64(load_i64(line + 8 * SEGMENT_HEADER) + 8 * ADMISSION_COUNTER)
                kind = load_i64(counter + 8 * ADMISSION_KIND)
                now = load_i64(counter + 8 * ADMISSION_NUM_LOOKUPS)
                wanted = load_i64(counter + 8 * ADMISSION_THRESHOLD)
                forget_after = load_i64(counter + 8 * ADMISSION_FORGET_AFTER)
                per_batch = load_i64(counter + 8 * ADMISSION_PER_BATCH)
                index = index_of(counter)
                cells = load_i64(counter + 8 * ADMISSION_COUNTERS)
                width = load_i64(counter + 8 * ADMISSION_WIDTH)
                num_hashes = load_i64(counter + 8 * ADMISSION_NUM_HASHES)
                num_blocks = load_i64(counter + 8 * ADMISSION_NUM_BLOCKS)
                added = load_i64(counter + 8 * ADMISSION_ADDED)
        weight = np.int64(1)
        if weights:
            weight = load_i64(weights + 8 * position)
        if kind == COUNT:
            if i + AHEAD < high:
                later = load_i64(misses + 8 * (i + AHEAD))
                if later < end:
                    prefetch_key(load_i64(ids + 8 * later), index)
            slot, is_new = claim_slot(load_i64(ids + 8 * position), index)
            if is_new:
                atomic_add(counter + 8 * NUM_IDS, 1)
            if per_batch:
                weight = np.int64(1)
            entry = index.entries + 16 * slot
            _count(entry + 8, weight, now, wanted, forget_after, per_batch)
            store_i64(entries_of_misses + 8 * i, entry)
        elif kind == SKETCH:
            key = load_i64(ids + 8 * position)
            first = mix(np.uint64(key))
            second = mix(first ^ _SECOND_HASH)
            block = _block_of(key, num_blocks)
            in_block = cells + block * num_hashes * width
            for j in range(num_hashes):
                _add_to_counter(_counter_of(in_block, first, second, j, width), weight)
            atomic_add(added + 8 * block, weight)


@kernel
def _admit_kernel(
    low, high, misses, entries_of_misses, weights, segments, num_segments, num_ids, rows
):
    segment, end = segment_at(segments, num_segments, load_i64(misses + 8 * low)), np.int64(-1)
    ids, header, rejected = np.int64(0), np.int64(0), np.int64(0)
    kind, now, wanted = np.int64(0), np.int64(0), np.int64(0)
    cells, width, num_hashes = np.int64(0), np.int64(0), np.int64(0)
    num_blocks, draw_key = np.int64(1), np.uint64(0)
    for i in range(low, high):
        position = load_i64(misses + 8 * i)
        if position >= end:
            if rejected:
                atomic_add(header + 8 * NUM_REJECTED, rejected)
            segment, end = next_segment(position, segment, segments, num_segments, num_ids)
            line = segments + segment * SEGMENT_BYTES
            kind, rejected = np.int64(0), np.int64(0)
            if load_i64(line + 8 * SEGMENT_FLAGS) & CHECK_ADMISSION:
                ids, header = load_i64(line + 8 * SEGMENT_IDS), load_i64(line + 8 * SEGMENT_HEADER)
                counter = load_i64(header + 8 * ADMISSION_COUNTER)
                kind = load_i64(counter + 8 * ADMISSION_KIND)
                now = load_i64(counter + 8 * ADMISSION_NUM_LOOKUPS)
                wanted = load_i64(counter + 8 * ADMISSION_THRESHOLD)
                cells = load_i64(counter + 8 * ADMISSION_COUNTERS)
                width = load_i64(counter + 8 * ADMISSION_WIDTH)
                num_hashes = load_i64(counter + 8 * ADMISSION_NUM_HASHES)
                num_blocks = load_i64(counter + 8 * ADMISSION_NUM_BLOCKS)
                draw_key = mix(np.uint64(load_i64(header + 8 * INIT_KEY)) ^ _DRAW_KEY)
        is_admitted = True
        if kind == COUNT:
            entry = load_i64(entries_of_misses + 8 * i)
            is_admitted = load_i64(entry + 8) & COUNT_MASK >= wanted
        elif kind == SKETCH:
            key = load_i64(ids + 8 * position)
            first = mix(np.uint64(key))
            second = mix(first ^ _SECOND_HASH)
            in_block = cells + _block_of(key, num_blocks) * num_hashes * width
            for j in range(num_hashes):
                cell = _counter_of(in_block, first, second, j, width)
                is_admitted = is_admitted and np.int64(load_u8(cell)) >= wanted
        elif kind == DRAW:
            bits = mix(mix(np.uint64(load_i64(ids + 8 * position)) ^ draw_key) ^ np.uint64(now))
            is_admitted = np.int64(bits >> _S11) < wanted
        if not is_admitted:
            store_i64(rows + 8 * position, UNKNOWN)
            rejected += load_i64(weights + 8 * position) if weights else np.int64(1)
    if rejected:
        atomic_add(header + 8 * NUM_REJECTED, rejected)


@kernel
def _forget_kernel(low, high, ids, counter):
    index = index_of(counter)
    for i in range(low, high):
        key = load_i64(ids + 8 * i)
        entry = index.entries + 16 * find_slot(key, index)
        if load_i64(entry) == key:
            store_i64(entry + 8, NO_ROW)


def check_(segments, num_ids, misses, rows, weights):
    """Count all misses, then admit or reject each."""
    num_misses = misses.numel()
    shared = {
        "misses": misses,
        "entries_of_misses": np.empty(num_misses, np.int64),
        "weights": weights,
        "segments": segments,
        "num_segments": len(segments),
        "num_ids": num_ids,
    }
    _count_misses_kernel.launch(num_misses, CHUNK, **shared)
    _admit_kernel.launch(num_misses, CHUNK, **shared, rows=rows)


def forget_(memory, ids):
    _forget_kernel.launch(ids.numel(), CHUNK, ids=ids, counter=memory.address)
