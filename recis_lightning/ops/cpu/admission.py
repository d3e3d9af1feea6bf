"""Admission in Numba: sight all misses, then judge each of them."""

from __future__ import annotations

import numpy as np
from numba import njit

from recis_lightning.ops.cpu import runtime
from recis_lightning.ops.cpu.intrinsics import (
    atomic_add,
    compare_and_swap,
    compare_and_swap_u8,
    load_i64,
    load_u8,
    prefetch,
    store_i64,
)
from recis_lightning.ops.cpu.probe import (
    AHEAD,
    CHUNK,
    SEGMENT_BYTES,
    launch,
    segment_at,
    segment_start,
    slot_of,
)
from recis_lightning.ops.cpu.row_init import mix
from recis_lightning.ops.cpu.runtime import address_of
from recis_lightning.ops.layout import (
    ADMISSION_COUNTERS,
    ADMISSION_FORGET_AFTER,
    ADMISSION_KIND,
    ADMISSION_NUM_COUNTED,
    ADMISSION_NUM_HASHES,
    ADMISSION_NUM_LOOKUPS,
    ADMISSION_PER_BATCH,
    ADMISSION_THRESHOLD,
    ADMISSION_WIDTH,
    CAPACITY,
    COUNT,
    COUNT_MASK,
    DRAW,
    EMPTY,
    ENTRIES,
    INIT_KEY,
    MAX_COUNTER,
    NO_ROW,
    NUM_IDS,
    NUM_REFUSED,
    SCREEN,
    SEGMENT_FLAGS,
    SEGMENT_HEADER,
    SEGMENT_IDS,
    SHIFT,
    SIGHTINGS,
    SKETCH,
    UNKNOWN,
)

_SECOND_HASH = np.uint64(0x9E3779B97F4A7C15)
_DRAW_KEY = np.uint64(0xD1B54A32D192ED03)
_S11, _S32 = np.uint64(11), np.uint64(32)


@njit
def _add_sightings(cell, weight, now, wanted, forget_after, per_batch):
    """Add to an entry's count, from 0 if what it says is void, up to ``wanted``."""
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
        there = compare_and_swap(cell, before, after)
        if there == before:
            return
        before = there


@njit
def _counter_of(counters, first, second, number, width):
    """Return the address of an id's counter for hash function ``number``."""
    high = (first + np.uint64(number) * second) >> _S32
    return counters + number * width + np.int64((high * np.uint64(width)) >> _S32)


@njit
def _add_to_counter(cell, weight):
    before = load_u8(cell)
    while before < MAX_COUNTER:
        after = np.uint8(min(np.int64(before) + weight, MAX_COUNTER))
        there = compare_and_swap_u8(cell, before, after)
        if there == before:
            return
        before = there


@runtime.kernel
def _sight_kernel(args):
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)  # n: number of misses
    misses, places, weights = load_i64(args + 32), load_i64(args + 40), load_i64(args + 48)
    segments, num_segments, num_ids = (
        load_i64(args + 56),
        load_i64(args + 64),
        load_i64(args + 72),
    )
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        low = chunk * chunk_size
        high = min(low + chunk_size, n)
        segment = segment_at(segments, num_segments, load_i64(misses + 8 * low)) - 1
        end, ids = np.int64(-1), np.int64(0)
        memory, kind, now, wanted = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
        forget_after, per_batch = np.int64(0), np.int64(0)
        entries, shift, capacity = np.int64(0), np.int64(0), np.int64(0)
        counters, width, num_hashes = np.int64(0), np.int64(0), np.int64(0)
        for i in range(low, high):
            position = load_i64(misses + 8 * i)
            while position >= end:
                segment += 1
                end = segment_start(segments, segment + 1, num_segments, num_ids)
                info = segments + segment * SEGMENT_BYTES
                memory, kind = np.int64(0), np.int64(0)
                if load_i64(info + 8 * SEGMENT_FLAGS) & SCREEN:
                    memory = load_i64(load_i64(info + 8 * SEGMENT_HEADER) + 8 * SIGHTINGS)
                    ids = load_i64(info + 8 * SEGMENT_IDS)
                    kind = load_i64(memory + 8 * ADMISSION_KIND)
                    now = load_i64(memory + 8 * ADMISSION_NUM_LOOKUPS)
                    wanted = load_i64(memory + 8 * ADMISSION_THRESHOLD)
                    forget_after = load_i64(memory + 8 * ADMISSION_FORGET_AFTER)
                    per_batch = load_i64(memory + 8 * ADMISSION_PER_BATCH)
                    entries = load_i64(memory + 8 * ENTRIES)
                    shift = load_i64(memory + 8 * SHIFT)
                    capacity = load_i64(memory + 8 * CAPACITY)
                    counters = load_i64(memory + 8 * ADMISSION_COUNTERS)
                    width = load_i64(memory + 8 * ADMISSION_WIDTH)
                    num_hashes = load_i64(memory + 8 * ADMISSION_NUM_HASHES)
            weight = np.int64(1)
            if weights:
                weight = load_i64(weights + 8 * position)
            if kind == COUNT:
                if i + AHEAD < high:
                    later = load_i64(misses + 8 * (i + AHEAD))
                    if later < end:
                        prefetch(entries + 16 * slot_of(load_i64(ids + 8 * later), shift))
                key = load_i64(ids + 8 * position)
                place = entries + 16 * capacity
                if key != EMPTY:
                    slot = slot_of(key, shift)
                    while True:
                        place = entries + 16 * slot
                        there = load_i64(place)
                        if there == EMPTY:
                            there = compare_and_swap(place, EMPTY, key)
                            if there == EMPTY:
                                atomic_add(memory + 8 * NUM_IDS, 1)
                                break
                        if there == key:
                            break
                        slot = (slot + 1) & (capacity - 1)
                if per_batch:
                    weight = np.int64(1)
                _add_sightings(place + 8, weight, now, wanted, forget_after, per_batch)
                store_i64(places + 8 * i, place)
            elif kind == SKETCH:
                first = mix(np.uint64(load_i64(ids + 8 * position)))
                second = mix(first ^ _SECOND_HASH)
                for number in range(num_hashes):
                    _add_to_counter(_counter_of(counters, first, second, number, width), weight)
                atomic_add(memory + 8 * ADMISSION_NUM_COUNTED, weight)


@runtime.kernel
def _judge_kernel(args):
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)  # n: number of misses
    misses, places, weights = load_i64(args + 32), load_i64(args + 40), load_i64(args + 48)
    segments, num_segments, num_ids = (
        load_i64(args + 56),
        load_i64(args + 64),
        load_i64(args + 72),
    )
    rows = load_i64(args + 80)
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        low = chunk * chunk_size
        high = min(low + chunk_size, n)
        segment = segment_at(segments, num_segments, load_i64(misses + 8 * low)) - 1
        end, ids, header = np.int64(-1), np.int64(0), np.int64(0)
        kind, now, wanted, refused = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
        counters, width, num_hashes = np.int64(0), np.int64(0), np.int64(0)
        key = np.uint64(0)
        for i in range(low, high):
            position = load_i64(misses + 8 * i)
            while position >= end:
                if refused:
                    atomic_add(header + 8 * NUM_REFUSED, refused)
                segment += 1
                end = segment_start(segments, segment + 1, num_segments, num_ids)
                info = segments + segment * SEGMENT_BYTES
                kind, refused = np.int64(0), np.int64(0)
                if load_i64(info + 8 * SEGMENT_FLAGS) & SCREEN:
                    header = load_i64(info + 8 * SEGMENT_HEADER)
                    memory = load_i64(header + 8 * SIGHTINGS)
                    ids = load_i64(info + 8 * SEGMENT_IDS)
                    kind = load_i64(memory + 8 * ADMISSION_KIND)
                    now = load_i64(memory + 8 * ADMISSION_NUM_LOOKUPS)
                    wanted = load_i64(memory + 8 * ADMISSION_THRESHOLD)
                    counters = load_i64(memory + 8 * ADMISSION_COUNTERS)
                    width = load_i64(memory + 8 * ADMISSION_WIDTH)
                    num_hashes = load_i64(memory + 8 * ADMISSION_NUM_HASHES)
                    key = mix(np.uint64(load_i64(header + 8 * INIT_KEY)) ^ _DRAW_KEY)
            admitted = True
            if kind == COUNT:
                place = load_i64(places + 8 * i)
                admitted = load_i64(place + 8) & COUNT_MASK >= wanted
            elif kind == SKETCH:
                first = mix(np.uint64(load_i64(ids + 8 * position)))
                second = mix(first ^ _SECOND_HASH)
                for number in range(num_hashes):
                    cell = _counter_of(counters, first, second, number, width)
                    admitted = admitted and np.int64(load_u8(cell)) >= wanted
            elif kind == DRAW:
                bits = mix(mix(np.uint64(load_i64(ids + 8 * position)) ^ key) ^ np.uint64(now))
                admitted = np.int64(bits >> _S11) < wanted
            if not admitted:
                store_i64(rows + 8 * position, UNKNOWN)
                weight = np.int64(1)
                if weights:
                    weight = load_i64(weights + 8 * position)
                refused += weight
        if refused:
            atomic_add(header + 8 * NUM_REFUSED, refused)


@runtime.kernel
def _forget_kernel(args):
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)
    ids, memory = load_i64(args + 32), load_i64(args + 40)
    entries, shift = load_i64(memory + 8 * ENTRIES), load_i64(memory + 8 * SHIFT)
    capacity = load_i64(memory + 8 * CAPACITY)
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        for i in range(chunk * chunk_size, min((chunk + 1) * chunk_size, n)):
            key = load_i64(ids + 8 * i)
            place = entries + 16 * capacity
            if key != EMPTY:
                slot = slot_of(key, shift)
                while True:
                    place = entries + 16 * slot
                    there = load_i64(place)
                    if there in (key, EMPTY):
                        break
                    slot = (slot + 1) & (capacity - 1)
            if load_i64(place) == key:
                store_i64(place + 8, NO_ROW)


def check_(segments, num_ids, misses, rows, weights):
    """See ``admission.screening``."""
    places = np.empty(misses.numel(), np.int64)
    where = (
        misses.data_ptr(),
        address_of(places),
        0 if weights is None else weights.data_ptr(),
        address_of(segments),
        len(segments),
        num_ids,
    )
    launch(_sight_kernel, misses.numel(), CHUNK, *where)
    launch(_judge_kernel, misses.numel(), CHUNK, *where, rows.data_ptr())


def forget_(memory, ids):
    """See the contract."""
    launch(_forget_kernel, ids.numel(), CHUNK, ids.data_ptr(), memory.address)
