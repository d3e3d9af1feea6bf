"""Insertion into the hash index in Numba: parallel, and still deterministic.

Every unknown id claims its entry by compare-and-swap, all its occurrences vote for the first
position by an atomic minimum, and the winners get rows in order of position.
"""

from __future__ import annotations

import numpy as np

from recis_lightning.ops.cpu import runtime
from recis_lightning.ops.cpu.intrinsics import (
    atomic_add,
    atomic_min,
    compare_and_swap,
    load_i64,
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
from recis_lightning.ops.cpu.runtime import address_of, num_chunks
from recis_lightning.ops.layout import (
    CAPACITY,
    CLAIMED,
    EMPTY,
    ENTRIES,
    FREE_ROWS,
    LAST_SEEN,
    MISSING,
    NEXT_ROW,
    NUM_FREE,
    NUM_IDS,
    SEGMENT_HEADER,
    SEGMENT_IDS,
    SEGMENT_START,
    SHIFT,
    STEP,
)


@runtime.kernel
def _list_misses_kernel(args):
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)
    rows, offsets, misses = load_i64(args + 32), load_i64(args + 40), load_i64(args + 48)
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        out = load_i64(offsets + 8 * chunk)
        for i in range(chunk * chunk_size, min((chunk + 1) * chunk_size, n)):
            if load_i64(rows + 8 * i) == MISSING:
                store_i64(misses + 8 * out, i)
                out += 1


@runtime.kernel
def _claim_kernel(args):
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)  # n: number of misses
    misses, places = load_i64(args + 32), load_i64(args + 40)
    segments, num_segments, num_ids = (
        load_i64(args + 48),
        load_i64(args + 56),
        load_i64(args + 64),
    )
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        low = chunk * chunk_size
        high = min(low + chunk_size, n)
        segment = segment_at(segments, num_segments, load_i64(misses + 8 * low)) - 1
        end = np.int64(-1)
        ids, entries, shift, capacity = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
        for i in range(low, high):
            position = load_i64(misses + 8 * i)
            while position >= end:
                segment += 1
                end = segment_start(segments, segment + 1, num_segments, num_ids)
                info = segments + segment * SEGMENT_BYTES
                header, ids = load_i64(info + 8 * SEGMENT_HEADER), load_i64(info + 8 * SEGMENT_IDS)
                entries = load_i64(header + 8 * ENTRIES)
                shift = load_i64(header + 8 * SHIFT)
                capacity = load_i64(header + 8 * CAPACITY)
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
                            break
                    if there == key:
                        break
                    slot = (slot + 1) & (capacity - 1)
            atomic_min(place + 8, CLAIMED | position)
            store_i64(places + 8 * i, place)


@runtime.kernel
def _list_new_kernel(args):
    # Two passes share it: with no list yet it counts the winners of a chunk, then it lists them.
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)
    misses, places = load_i64(args + 32), load_i64(args + 40)
    counts, new, new_places = load_i64(args + 48), load_i64(args + 56), load_i64(args + 64)
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        out = np.int64(0)
        if new:
            out = load_i64(counts + 8 * chunk)
        for i in range(chunk * chunk_size, min((chunk + 1) * chunk_size, n)):
            if i + AHEAD < n:
                prefetch(load_i64(places + 8 * (i + AHEAD)))
            position = load_i64(misses + 8 * i)
            place = load_i64(places + 8 * i)
            if load_i64(place + 8) == CLAIMED | position:
                if new:
                    store_i64(new + 8 * out, position)
                    store_i64(new_places + 8 * out, place)
                out += 1
        if not new:
            store_i64(counts + 8 * chunk, out)


@runtime.kernel
def _assign_kernel(args):
    # One run of new ids after the other: (table header, first new id, first rank in its table).
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)
    new_places, runs, num_runs = load_i64(args + 32), load_i64(args + 40), load_i64(args + 48)
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        low = chunk * chunk_size
        high = min(low + chunk_size, n)
        run = np.int64(0)
        while run + 1 < num_runs and load_i64(runs + 24 * (run + 1) + 8) <= low:
            run += 1
        i = low
        while i < high:
            header, first = load_i64(runs + 24 * run), load_i64(runs + 24 * run + 8)
            rank = load_i64(runs + 24 * run + 16)
            run += 1
            end = high
            if run < num_runs:
                end = min(high, load_i64(runs + 24 * run + 8))
            num_free = load_i64(header + 8 * NUM_FREE)
            free_rows = load_i64(header + 8 * FREE_ROWS)
            next_row = load_i64(header + 8 * NEXT_ROW)
            for j in range(i, end):
                number = j - first + rank
                if number < num_free:
                    row = load_i64(free_rows + 8 * (num_free - 1 - number))
                else:
                    row = next_row + number - num_free
                store_i64(load_i64(new_places + 8 * j) + 8, row)
            i = end


@runtime.kernel
def _fill_rows_kernel(args):
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)
    misses, places, rows = load_i64(args + 32), load_i64(args + 40), load_i64(args + 48)
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
        end = np.int64(-1)
        last_seen, step = np.int64(0), np.int64(0)
        for i in range(low, high):
            position = load_i64(misses + 8 * i)
            while position >= end:
                segment += 1
                end = segment_start(segments, segment + 1, num_segments, num_ids)
                header = load_i64(segments + segment * SEGMENT_BYTES + 8 * SEGMENT_HEADER)
                last_seen = load_i64(header + 8 * LAST_SEEN)
                step = load_i64(header + 8 * STEP)
            if i + AHEAD < high:
                prefetch(load_i64(places + 8 * (i + AHEAD)))
            row = load_i64(load_i64(places + 8 * i) + 8)
            store_i64(rows + 8 * position, row)
            if last_seen:
                store_i64(last_seen + 8 * row, step)


def list_misses(rows, counts, num_misses):
    """Return the positions of MISSING rows, ascending; ``counts`` has their number by chunk."""
    offsets = np.zeros(len(counts), np.int64)
    np.cumsum(counts[:-1], out=offsets[1:])
    misses = np.empty(num_misses, np.int64)
    where = (rows.data_ptr(), address_of(offsets), address_of(misses))
    launch(_list_misses_kernel, rows.numel(), CHUNK, *where)
    return misses


def insert_misses(segments, tables, segment_tables, misses, rows):
    """Insert the ids at ``misses`` and enter their rows into ``rows``.

    Returns:
        int64 [m], ascending: the position of each new id's first occurrence.
    """
    starts = segments[:, SEGMENT_START]
    for table, count in _per_table(misses, starts, segment_tables):
        tables[table].reserve_ids(int(count))

    places = np.empty(len(misses), np.int64)
    where = (address_of(segments), len(segments), rows.numel())
    addresses = (address_of(misses), address_of(places))
    launch(_claim_kernel, len(misses), CHUNK, *addresses, *where)

    counts = np.empty(num_chunks(len(misses), CHUNK), np.int64)
    launch(_list_new_kernel, len(misses), CHUNK, *addresses, address_of(counts), 0, 0)
    num_new = int(counts.sum())
    counts[:] = np.concatenate(([0], np.cumsum(counts)[:-1]))
    new, new_places = np.empty(num_new, np.int64), np.empty(num_new, np.int64)
    launch(
        _list_new_kernel,
        len(misses),
        CHUNK,
        *addresses,
        address_of(counts),
        address_of(new),
        address_of(new_places),
    )
    _assign_rows(new, new_places, tables, starts, segment_tables)
    launch(_fill_rows_kernel, len(misses), CHUNK, *addresses, rows.data_ptr(), *where)
    return new


def _per_table(positions, starts, segment_tables):
    """Return ``[(table, number of positions in it), ...]`` without the empty ones."""
    per_segment = np.diff(np.append(np.searchsorted(positions, starts), len(positions)))
    totals = np.zeros(max(segment_tables) + 1, np.int64)
    np.add.at(totals, np.asarray(segment_tables), per_segment)
    return [(table, totals[table]) for table in np.flatnonzero(totals)]


def _assign_rows(new, new_places, tables, starts, segment_tables):
    """Give the new ids of each table its freed rows, then its unused ones."""
    totals = _per_table(new, starts, segment_tables)
    for table, count in totals:
        tables[table].reserve_rows(int(count))
    cuts = np.append(np.searchsorted(new, starts), len(new))
    runs, ranks = [], dict.fromkeys(segment_tables, 0)
    for segment in np.flatnonzero(np.diff(cuts)):
        table = segment_tables[segment]
        runs.append((tables[table].header.address, cuts[segment], ranks[table]))
        ranks[table] += cuts[segment + 1] - cuts[segment]
    runs = np.array(runs, np.int64)
    where = (address_of(new_places), address_of(runs), len(runs))
    launch(_assign_kernel, len(new), CHUNK, *where)
    for table, count in totals:
        header = tables[table].header.fields
        reused = min(int(header[NUM_FREE]), int(count))
        header[NUM_FREE] -= reused
        header[NEXT_ROW] += count - reused
        header[NUM_IDS] += count
