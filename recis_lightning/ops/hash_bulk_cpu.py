"""Insertion of very many ids at once in Numba: every probe hits the cache.

Ids are dealt out by the region of the index in which they belong, in order of position; then each
region, small enough for a core's own cache, is filled by one thread, so nothing is locked or voted
on: of an id's sights the one of the lowest position comes first. If all ids are new and distinct, a
position is a row; otherwise a second pass over the index closes the gaps.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from recis_lightning.ops import parallel_cpu
from recis_lightning.ops.hash_slot_cpu import AHEAD, LINE_KEYS, launch, slot_of
from recis_lightning.ops.intrinsics_cpu import (
    atomic_add,
    equal_words,
    load_i64,
    load_u8,
    lowest_bit,
    prefetch,
    store_i64,
    store_u8,
)
from recis_lightning.ops.parallel_cpu import address_of, as_array, num_chunks
from recis_lightning.ops.table_header import (
    CAPACITY,
    EMPTY,
    ENTRIES,
    FREE_ROWS,
    HAS_PADDING,
    LAST_SEEN,
    LINE_ENTRIES,
    NEXT_ROW,
    NO_ROW,
    NUM_FREE,
    NUM_IDS,
    PADDING,
    SEGMENT_FLAGS,
    SEGMENT_IDS,
    SEGMENT_PADDING,
    SHIFT,
    STEP,
)

_REGION_SHIFT = 14  # log2(entries of a region): a quarter of a megabyte
_MAX_REGIONS = 1 << 10  # as many streams as the deal can write to at once
_PARTS = 32  # of the ids, each dealt out by one thread
_CHUNK = 1 << 14


@parallel_cpu.kernel
def _deal_kernel(args):
    # Two passes share it: with no dealt yet it counts each part's ids by region, then it deals.
    first, n = load_i64(args + 16), load_i64(args + 24)
    segment, header = load_i64(args + 32), load_i64(args + 40)
    region_shift, num_regions = load_i64(args + 48), load_i64(args + 56)
    counts, dealt, rows = load_i64(args + 64), load_i64(args + 72), load_i64(args + 80)
    parts = load_i64(args + 8)
    ids, shift = load_i64(segment + 8 * SEGMENT_IDS), load_i64(header + 8 * SHIFT)
    has_padding = load_i64(segment + 8 * SEGMENT_FLAGS) & HAS_PADDING
    padding = load_i64(segment + 8 * SEGMENT_PADDING)
    while True:
        part = atomic_add(args, 1)
        if part >= parts:
            break
        mine = counts + 8 * part * num_regions
        for i in range(first + n * part // parts, first + n * (part + 1) // parts):
            key = load_i64(ids + 8 * i)
            if has_padding and key == padding:
                store_i64(rows + 8 * i, PADDING)
                continue
            place = mine + 8 * (slot_of(key, shift) >> region_shift)
            count = load_i64(place)
            store_i64(place, count + 1)
            if dealt:
                store_i64(dealt + 16 * count, key)
                store_i64(dealt + 16 * count + 8, i)


@njit
def _insert(key, position, place, base, first, rows, last_seen, step):
    """Give the entry at ``place``, which is the id's, its row; return whether the id is new.

    Of an id's sights the one of the lowest position comes first, and takes ``base + position``:
    the id's row, if every id of the call is new and distinct. The rows of new ids are not written
    to ``rows`` here, where they would be far apart.
    """
    row = load_i64(place + 8)
    if row == NO_ROW:
        store_i64(place + 8, base + position - first)
        return True
    store_i64(rows + 8 * position, row)
    if last_seen and row < base:
        store_i64(last_seen + 8 * row, step)
    return False


@parallel_cpu.kernel
def _claim_kernel(args):
    # A region's own thread fills it. Ids that find it full to its end are left over, at the front
    # of the region's ids, for a pass that walks on into the next region.
    header, dealt, bounds = load_i64(args + 16), load_i64(args + 24), load_i64(args + 32)
    base, first, rows = load_i64(args + 40), load_i64(args + 48), load_i64(args + 56)
    left_over, region_shift, all_new = load_i64(args + 64), load_i64(args + 72), args + 80
    entries, shift = load_i64(header + 8 * ENTRIES), load_i64(header + 8 * SHIFT)
    last_seen, step = load_i64(header + 8 * LAST_SEEN), load_i64(header + 8 * STEP)
    regions = load_i64(args + 8)
    while True:
        region = atomic_add(args, 1)
        if region >= regions:
            break
        start, end = load_i64(bounds + 8 * region), load_i64(bounds + 8 * region + 8)
        limit = (region + 1) << region_shift
        left, num_new = start, np.int64(0)
        for i in range(start, end):
            if i + AHEAD < end:
                prefetch(entries + 16 * slot_of(load_i64(dealt + 16 * (i + AHEAD)), shift))
            key, position = load_i64(dealt + 16 * i), load_i64(dealt + 16 * i + 8)
            # The id's entry, or the first empty one: a line at a time, without guessing where.
            slot = slot_of(key, shift)
            if key == EMPTY:
                slot = limit
            while slot < limit:
                line = entries + 16 * slot
                hits = equal_words(line, key) & LINE_KEYS
                if not hits:
                    hits = equal_words(line, EMPTY) & LINE_KEYS
                if hits:
                    slot += lowest_bit(hits) >> 1
                    store_i64(entries + 16 * slot, key)
                    break
                slot += LINE_ENTRIES
            if slot == limit:
                store_i64(dealt + 16 * left, key)
                store_i64(dealt + 16 * left + 8, position)
                left += 1
                continue
            place = entries + 16 * slot
            num_new += _insert(key, position, place, base, first, rows, last_seen, step)
        store_i64(left_over + 8 * region, left)
        atomic_add(all_new, num_new)


@parallel_cpu.kernel
def _left_over_kernel(args):
    # One chunk, one thread: there are few such ids.
    header, dealt, bounds = load_i64(args + 16), load_i64(args + 24), load_i64(args + 32)
    base, first, rows = load_i64(args + 40), load_i64(args + 48), load_i64(args + 56)
    left_over, regions, all_new = load_i64(args + 64), load_i64(args + 72), args + 80
    entries, shift = load_i64(header + 8 * ENTRIES), load_i64(header + 8 * SHIFT)
    capacity = load_i64(header + 8 * CAPACITY)
    last_seen, step = load_i64(header + 8 * LAST_SEEN), load_i64(header + 8 * STEP)
    if atomic_add(args, 1) == 0:
        num_new = np.int64(0)
        for region in range(regions):
            for i in range(load_i64(bounds + 8 * region), load_i64(left_over + 8 * region)):
                key, position = load_i64(dealt + 16 * i), load_i64(dealt + 16 * i + 8)
                place = entries + 16 * capacity
                if key != EMPTY:
                    slot = slot_of(key, shift)
                    while True:
                        place = entries + 16 * slot
                        there = load_i64(place)
                        if there == EMPTY:
                            store_i64(place, key)
                            break
                        if there == key:
                            break
                        slot = (slot + 1) & (capacity - 1)
                num_new += _insert(key, position, place, base, first, rows, last_seen, step)
        atomic_add(all_new, num_new)


@parallel_cpu.kernel
def _flag_kernel(args):
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)
    entries, base, is_new = load_i64(args + 32), load_i64(args + 40), load_i64(args + 48)
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        for i in range(chunk * chunk_size, min((chunk + 1) * chunk_size, n)):
            row = load_i64(entries + 16 * i + 8)
            if row >= base and row != NO_ROW:
                store_u8(is_new + row - base, np.uint8(1))


@parallel_cpu.kernel
def _count_kernel(args):
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)
    is_new, counts = load_i64(args + 32), load_i64(args + 40)
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        count = np.int64(0)
        for i in range(chunk * chunk_size, min((chunk + 1) * chunk_size, n)):
            count += np.int64(load_u8(is_new + i))
        store_i64(counts + 8 * chunk, count)


@parallel_cpu.kernel
def _number_kernel(args):
    # Turns flags into final rows, a row for each flag.
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)
    is_new, starts, final = load_i64(args + 32), load_i64(args + 40), load_i64(args + 48)
    header, first, new = load_i64(args + 56), load_i64(args + 64), load_i64(args + 72)
    num_free, free_rows = load_i64(header + 8 * NUM_FREE), load_i64(header + 8 * FREE_ROWS)
    next_row = load_i64(header + 8 * NEXT_ROW)
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        rank = load_i64(starts + 8 * chunk)
        for i in range(chunk * chunk_size, min((chunk + 1) * chunk_size, n)):
            if not load_u8(is_new + i):
                continue
            if rank < num_free:
                row = load_i64(free_rows + 8 * (num_free - 1 - rank))
            else:
                row = next_row + rank - num_free
            store_i64(final + 8 * i, row)
            store_i64(new + 8 * rank, first + i)
            rank += 1


@parallel_cpu.kernel
def _final_entries_kernel(args):
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)
    entries, base, final = load_i64(args + 32), load_i64(args + 40), load_i64(args + 48)
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        high = min((chunk + 1) * chunk_size, n)
        for i in range(chunk * chunk_size, high):
            row = load_i64(entries + 16 * min(i + AHEAD, high - 1) + 8)
            if row >= base and row != NO_ROW:
                prefetch(final + 8 * (row - base))
            row = load_i64(entries + 16 * i + 8)
            if row >= base and row != NO_ROW:
                store_i64(entries + 16 * i + 8, load_i64(final + 8 * (row - base)))


@parallel_cpu.kernel
def _final_rows_kernel(args):
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)
    rows, is_new = load_i64(args + 32), load_i64(args + 40)
    base, final = load_i64(args + 48), load_i64(args + 56)
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        for i in range(chunk * chunk_size, min((chunk + 1) * chunk_size, n)):
            if load_u8(is_new + i):
                store_i64(rows + 8 * i, load_i64(final + 8 * i))
                continue
            row = load_i64(rows + 8 * i)
            if row >= base:  # a later sight of a new id
                store_i64(rows + 8 * i, load_i64(final + 8 * (row - base)))


def insert_many(segments, table, first, rows):
    """Look up the ids of the only segment from position ``first`` on, and insert the unknown.

    Args:
        segments: int64 [1, SEGMENT_SIZE], whose ids may be inserted.
        table: Its table.
        first: Where to begin.
        rows: int64 [n], filled from ``first`` on.

    Returns:
        int64 [m], ascending: the position of each new id's first occurrence; a slice for all.
    """
    header, count = table.header, rows.numel() - first
    table.reserve_ids(count)
    fields = header.numpy()
    base = int(fields[NEXT_ROW])
    num_new = _claim(segments, header, base, first, rows)
    table.reserve_rows(num_new)
    if num_new == count and not fields[NUM_FREE]:
        new = slice(first, rows.numel())
        torch.arange(base, base + count, out=rows[first:])
    else:
        new = _number(fields, base, first, rows, num_new)
    if fields[LAST_SEEN]:
        stamps = as_array(fields[LAST_SEEN], base + num_new)
        stamps[rows.numpy()[new]] = fields[STEP]
    reused = min(int(fields[NUM_FREE]), num_new)
    fields[NUM_FREE] -= reused
    fields[NEXT_ROW] += num_new - reused
    fields[NUM_IDS] += num_new
    return new


def _claim(segments, header, base, first, rows):
    """Enter the ids, new ones with the row ``base + position``; return how many are new."""
    dealt, bounds, region_shift = _deal(segments, header, first, rows)
    regions = len(bounds) - 1
    left_over = np.empty(regions, np.int64)
    where = (header.data_ptr(), address_of(dealt), address_of(bounds), base, first, rows.data_ptr())
    where = (*where, address_of(left_over))
    num_new = _claim_kernel.launch(regions, *where, region_shift, 0)[10]
    return num_new + _left_over_kernel.launch(1, *where, regions, 0)[10]


def _number(fields, base, first, rows, num_new):
    """Give new ids rows without gaps, freed ones first; return their positions."""
    count = rows.numel() - first
    is_new, entries = np.zeros(count, np.uint8), int(fields[ENTRIES])
    num_entries = int(fields[CAPACITY]) + 1
    launch(_flag_kernel, num_entries, _CHUNK, entries, base, address_of(is_new))
    counts = np.empty(num_chunks(count, _CHUNK), np.int64)
    launch(_count_kernel, count, _CHUNK, address_of(is_new), address_of(counts))
    starts, new, final = (
        np.cumsum(counts) - counts,
        np.empty(num_new, np.int64),
        np.empty(count, np.int64),
    )
    where = (address_of(is_new), address_of(starts), address_of(final), fields.ctypes.data, first)
    launch(_number_kernel, count, _CHUNK, *where, address_of(new))
    launch(_final_entries_kernel, num_entries, _CHUNK, entries, base, address_of(final))
    where = (rows.data_ptr() + 8 * first, address_of(is_new), base, address_of(final))
    launch(_final_rows_kernel, count, _CHUNK, *where)
    return new


def _deal(segments, header, first, rows):
    """Return ids and their positions by region, int64 [n, 2], where each starts, its log2 size."""
    capacity, count = int(header[CAPACITY]), rows.numel() - first
    shift = max(_REGION_SHIFT, capacity.bit_length() - _MAX_REGIONS.bit_length())
    regions = max(capacity >> shift, 1)
    counts = np.zeros((_PARTS, regions), np.int64)
    where = (first, count, address_of(segments), header.data_ptr(), shift, regions)
    _deal_kernel.launch(_PARTS, *where, address_of(counts), 0, rows.data_ptr())
    ends = np.cumsum(counts.T).reshape(regions, _PARTS)
    bounds = np.concatenate([[0], ends[:, -1]])
    starts = np.ascontiguousarray((ends - counts.T).T)
    dealt = np.empty((int(bounds[-1]), 2), np.int64)
    addresses = (address_of(starts), address_of(dealt), rows.data_ptr())
    _deal_kernel.launch(_PARTS, *where, *addresses)
    return dealt, bounds, shift
