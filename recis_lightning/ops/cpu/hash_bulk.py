"""Insertion of very many ids at once in Numba: every probe hits the cache.

Ids are dealt out by the region of the index in which they belong (``hash_deal_cpu``); then each
region, small enough for a core's own cache, is filled by one thread, so nothing is locked or voted
on: of an id's sights the one of the lowest position comes first. If all ids are new and distinct, a
position is a row; otherwise a second pass over the index closes the gaps.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from recis_lightning.ops import host_memory
from recis_lightning.ops.cpu import runtime
from recis_lightning.ops.cpu.hash_partition import Index, all_items, deal
from recis_lightning.ops.cpu.intrinsics import (
    atomic_add,
    equal_words,
    load_i64,
    load_u8,
    load_vector,
    lowest_bit,
    prefetch,
    store_i64,
    store_u8,
    store_vector,
)
from recis_lightning.ops.cpu.probe import AHEAD, LINE_KEYS, launch, slot_of
from recis_lightning.ops.cpu.runtime import address_of, as_array, num_chunks
from recis_lightning.ops.layout import (
    CAPACITY,
    EMPTY,
    ENTRIES,
    FREE_ROWS,
    LAST_SEEN,
    LINE_ENTRIES,
    NEXT_ROW,
    NO_ROW,
    NUM_FREE,
    NUM_IDS,
    SHIFT,
    STEP,
)

_LEFT_OVER = (
    64  # ids that a region may leave over; one in hundreds of thousands of regions does more
)
_CHUNK = 1 << 14


@njit
def _insert(key, item, place, base, first, rows, last_seen, step):
    """Give the entry at ``place``, which is the id's, its row; return whether the id is new.

    An old entry brings its row. Of an id's sights the one of the lowest position comes first, and
    takes ``base + position``: the id's row, if every id of the call is new and distinct. The rows
    of new ids are not written to ``rows`` here, where they would be far apart.
    """
    if item < 0:
        store_i64(place + 8, ~item)
        return False
    row = load_i64(place + 8)
    if row == NO_ROW:
        store_i64(place + 8, base + item - first)
        return True
    store_i64(rows + 8 * item, row)
    if last_seen and row < base:
        store_i64(last_seen + 8 * row, step)
    return False


@njit
def _take_up(region, num_lines, target):
    for i in range(num_lines):
        store_vector(target + 64 * i, load_vector(16, region + 64 * i))


@njit
def _clear(region, num_entries):
    for i in range(LINE_ENTRIES):
        store_i64(region + 16 * i, EMPTY)
        store_i64(region + 16 * i + 8, NO_ROW)
    line = load_vector(16, region)
    for i in range(1, num_entries // LINE_ENTRIES):
        store_vector(region + 64 * i, line)


@runtime.kernel
def _claim_kernel(args):
    # A region's own thread fills it. Ids that find it full to its end are left over, for a pass
    # that walks on into the next region; of more than there is room for, only the number is noted.
    entries, shift, region_shift = load_i64(args + 16), load_i64(args + 24), load_i64(args + 32)
    is_fresh, dealt, starts = load_i64(args + 40), load_i64(args + 48), load_i64(args + 56)
    ends, scratch = load_i64(args + 64), load_i64(args + 72)
    base, first, rows = load_i64(args + 80), load_i64(args + 88), load_i64(args + 96)
    last_seen, step = load_i64(args + 104), load_i64(args + 112)
    left_over, left_size, left_counts = (
        load_i64(args + 120),
        load_i64(args + 128),
        load_i64(args + 136),
    )
    next_scratch, all_new = args + 144, args + 152
    regions, region_size = load_i64(args + 8), np.int64(1) << region_shift
    if scratch:
        scratch += 16 * region_size * atomic_add(next_scratch, 1)
    region = atomic_add(args, 1)
    while region < regions:
        following = atomic_add(args, 1)
        ahead = entries + 16 * (min(following, regions - 1) << region_shift)
        low = region << region_shift
        limit = low + region_size
        start = load_i64(starts + 8 * region)
        count = load_i64(ends + 8 * region) - start
        items = dealt + 16 * start
        if scratch:
            _take_up(items, (count + LINE_ENTRIES - 1) // LINE_ENTRIES, scratch)
            items = scratch
        if is_fresh:
            _clear(entries + 16 * low, region_size)
        left, num_new = np.int64(0), np.int64(0)
        for i in range(count):
            # The region that this thread will most likely fill next, while this one is computed.
            prefetch(ahead + (32 * i & (16 * region_size - 64)))
            key, item = load_i64(items + 16 * i), load_i64(items + 16 * i + 8)
            slot = slot_of(key, shift) if key != EMPTY else limit
            while slot < limit:
                # The id's entry, or the first empty one: a line at a time, without guessing where.
                line = entries + 16 * slot
                hits = equal_words(line, key) & LINE_KEYS
                if hits:
                    place = line + 8 * lowest_bit(hits)
                    num_new += _insert(key, item, place, base, first, rows, last_seen, step)
                    break
                hits = equal_words(line, EMPTY) & LINE_KEYS
                if hits:
                    place = line + 8 * lowest_bit(hits)
                    store_i64(place, key)
                    store_i64(place + 8, ~item if item < 0 else base + item - first)
                    num_new += item >= 0
                    break
                slot += LINE_ENTRIES
            if slot == limit:
                if left < left_size:
                    place = left_over + 16 * (left_size * region + left)
                    store_i64(place, key)
                    store_i64(place + 8, item)
                left += 1
        store_i64(left_counts + 8 * region, left)
        atomic_add(all_new, num_new)
        region = following


@runtime.kernel
def _left_over_kernel(args):
    # One chunk, one thread: there are few such ids.
    entries, shift, capacity = load_i64(args + 16), load_i64(args + 24), load_i64(args + 32)
    items, count = load_i64(args + 40), load_i64(args + 48)
    base, first, rows = load_i64(args + 56), load_i64(args + 64), load_i64(args + 72)
    last_seen, step, all_new = load_i64(args + 80), load_i64(args + 88), args + 96
    if atomic_add(args, 1) == 0:
        num_new = np.int64(0)
        for i in range(count):
            key, item = load_i64(items + 16 * i), load_i64(items + 16 * i + 8)
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
            num_new += _insert(key, item, place, base, first, rows, last_seen, step)
        atomic_add(all_new, num_new)


@runtime.kernel
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


@runtime.kernel
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


@runtime.kernel
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


@runtime.kernel
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


@runtime.kernel
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
    fields, count = table.header.fields, rows.numel() - first
    base = int(fields[NEXT_ROW])
    larger = table.larger_index(count)
    num_new = _claim(segments, fields, larger, base, first, rows)
    if larger is not None:
        table.take_index(larger)
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


def _claim(segments, fields, larger, base, first, rows):
    """Enter the ids, new ones with the row ``base + position``; return how many are new."""
    index = Index(int(fields[ENTRIES]), int(fields[CAPACITY]), int(fields[SHIFT]), False)
    old = (index.entries, index.capacity)
    if larger is not None:
        capacity = len(larger) - 1
        index = Index(larger.data_ptr(), capacity, 65 - capacity.bit_length(), True)
        larger[capacity] = torch.from_numpy(_last_entry(*old))
    dealt = deal(segments, old, index, first, rows)
    regions, scratch = len(dealt.starts), 0
    if dealt.items is None:
        held = host_memory.empty(16 * torch.get_num_threads() << dealt.region_shift)
        scratch = address_of(held)
    left_over, left = np.empty((regions, _LEFT_OVER, 2), np.int64), np.empty(regions, np.int64)
    what = (base, first, rows.data_ptr(), int(fields[LAST_SEEN]), int(fields[STEP]))
    num_new = _claim_kernel.launch(
        regions,
        index.entries,
        index.shift,
        dealt.region_shift,
        index.is_fresh,
        index.entries if dealt.items is None else address_of(dealt.items),
        address_of(dealt.starts),
        address_of(dealt.ends),
        scratch,
        *what,
        address_of(left_over),
        _LEFT_OVER,
        address_of(left),
        0,
        0,
    )[19]
    if left.max() > _LEFT_OVER:  # then all are entered once more: it does no harm
        items = all_items(segments, old if index.is_fresh else None, first, rows)
    else:
        items = left_over[np.arange(_LEFT_OVER) < left[:, None]]
    where = (index.entries, index.shift, index.capacity, address_of(items), len(items))
    return num_new + _left_over_kernel.launch(1, *where, *what, 0)[12]


def _last_entry(entries, capacity):
    """Return the entry of the id ``EMPTY``, int64 [2]."""
    return as_array(entries + 16 * capacity, 2)


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
