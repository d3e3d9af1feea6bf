"""The hash index in Numba.

Insertion is parallel and still deterministic: every unknown id claims its entry by compare-and-
swap, all its occurrences vote for the first position by an atomic minimum, and the winners get rows
in order of position.
"""

from __future__ import annotations

import contextlib
import ctypes

import numpy as np
import torch
from numba import njit

from recis_lightning.ops import parallel_cpu
from recis_lightning.ops.intrinsics_cpu import (
    atomic_add,
    atomic_min,
    compare_and_swap,
    load_i64,
    load_u8,
    prefetch,
    store_i64,
    store_u8,
)
from recis_lightning.ops.parallel_cpu import address_of, num_chunks, workspace
from recis_lightning.ops.table_header import (
    CAPACITY,
    CLAIMED,
    EMPTY,
    ENTRIES,
    FREE_ROWS,
    HAS_PADDING,
    INSERT,
    LAST_SEEN,
    MISSING,
    NEXT_ROW,
    NO_ROW,
    NUM_FREE,
    NUM_IDS,
    PADDING,
    SEGMENT_FLAGS,
    SEGMENT_HEADER,
    SEGMENT_PADDING,
    SEGMENT_SIZE,
    SEGMENT_START,
    SHIFT,
    STEP,
    UNKNOWN,
)

_CHUNK = 4096  # ids a ticket: long enough to hide the ticket, short enough to even out
_AHEAD = 24  # ids between prefetch and use
# Unknown ids inserted before the share of duplicates among them is known; see find_or_insert.
_FIRST_ROUND = 1 << 16
_MIX_1 = np.uint64(0x9E3779B97F4A7C15)
_MIX_2 = np.uint64(0xD6E8FEB86659FD93)
_U32 = np.uint64(32)
_SEGMENT_BYTES = 8 * SEGMENT_SIZE
_COUNTS = [NUM_IDS, NEXT_ROW, NUM_FREE]  # header fields that an insertion changes


@njit
def _slot(key, shift):
    mixed = np.uint64(key) * _MIX_1
    mixed ^= mixed >> _U32
    mixed *= _MIX_2
    return np.int64(mixed >> np.uint64(shift))


@njit
def segment_start(segments, segment, num_segments, num_ids):
    """Return where a segment's ids start; ``num_ids`` past the last one."""
    if segment >= num_segments:
        return num_ids
    return load_i64(segments + segment * _SEGMENT_BYTES + 8 * SEGMENT_START)


@njit
def segment_at(segments, num_segments, position):
    """Return the last segment that starts at or before ``position``."""
    low, high = 0, num_segments
    while high - low > 1:
        middle = (low + high) >> 1
        if load_i64(segments + middle * _SEGMENT_BYTES + 8 * SEGMENT_START) <= position:
            low = middle
        else:
            high = middle
    return low


@parallel_cpu.kernel
def _find_kernel(args):
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)
    ids, rows = load_i64(args + 32), load_i64(args + 40)
    segments, num_segments = load_i64(args + 48), load_i64(args + 56)
    miss_counts, training = load_i64(args + 64), load_i64(args + 72)
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        i = chunk * chunk_size
        high = min(i + chunk_size, n)
        segment = segment_at(segments, num_segments, i)
        misses = 0
        while i < high:
            info = segments + segment * _SEGMENT_BYTES
            segment += 1
            end = min(segment_start(segments, segment, num_segments, n), high)
            header = load_i64(info + 8 * SEGMENT_HEADER)
            flags = load_i64(info + 8 * SEGMENT_FLAGS)
            has_padding, unknown = flags & HAS_PADDING, UNKNOWN
            if training and flags & INSERT:
                unknown = MISSING
            padding = load_i64(info + 8 * SEGMENT_PADDING)
            entries = load_i64(header + 8 * ENTRIES)
            shift = load_i64(header + 8 * SHIFT)
            capacity = load_i64(header + 8 * CAPACITY)
            step = load_i64(header + 8 * STEP)
            last_seen = load_i64(header + 8 * LAST_SEEN) if training else 0
            for j in range(i, min(i + _AHEAD, end)):
                prefetch(entries + 16 * _slot(load_i64(ids + 8 * j), shift))
            for j in range(i, end):
                if j + _AHEAD < end:
                    prefetch(entries + 16 * _slot(load_i64(ids + 8 * (j + _AHEAD)), shift))
                key = load_i64(ids + 8 * j)
                if has_padding and key == padding:
                    store_i64(rows + 8 * j, PADDING)
                    continue
                row = NO_ROW
                if key == EMPTY:
                    row = load_i64(entries + 16 * capacity + 8)
                else:
                    slot = _slot(key, shift)
                    while True:
                        there = load_i64(entries + 16 * slot)
                        if there == key:
                            row = load_i64(entries + 16 * slot + 8)
                            break
                        if there == EMPTY:
                            break
                        slot = (slot + 1) & (capacity - 1)
                if row == NO_ROW:
                    store_i64(rows + 8 * j, unknown)
                    misses += unknown == MISSING
                else:
                    store_i64(rows + 8 * j, row)
                    if last_seen:
                        store_i64(last_seen + 8 * row, step)
            i = end
        store_i64(miss_counts + 8 * chunk, misses)


@parallel_cpu.kernel
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


@parallel_cpu.kernel
def _claim_kernel(args):
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)  # n: number of misses
    ids, misses, places = load_i64(args + 32), load_i64(args + 40), load_i64(args + 48)
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
        entries, shift, capacity = np.int64(0), np.int64(0), np.int64(0)
        for i in range(low, high):
            position = load_i64(misses + 8 * i)
            while position >= end:
                segment += 1
                end = segment_start(segments, segment + 1, num_segments, num_ids)
                header = load_i64(segments + segment * _SEGMENT_BYTES + 8 * SEGMENT_HEADER)
                entries = load_i64(header + 8 * ENTRIES)
                shift = load_i64(header + 8 * SHIFT)
                capacity = load_i64(header + 8 * CAPACITY)
            if i + _AHEAD < high:
                later = load_i64(misses + 8 * (i + _AHEAD))
                if later < end:
                    prefetch(entries + 16 * _slot(load_i64(ids + 8 * later), shift))
            key = load_i64(ids + 8 * position)
            place = entries + 16 * capacity
            if key != EMPTY:
                slot = _slot(key, shift)
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


@parallel_cpu.kernel
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
            if i + _AHEAD < n:
                prefetch(load_i64(places + 8 * (i + _AHEAD)))
            position = load_i64(misses + 8 * i)
            place = load_i64(places + 8 * i)
            if load_i64(place + 8) == CLAIMED | position:
                if new:
                    store_i64(new + 8 * out, position)
                    store_i64(new_places + 8 * out, place)
                out += 1
        if not new:
            store_i64(counts + 8 * chunk, out)


@parallel_cpu.kernel
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


@parallel_cpu.kernel
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
                header = load_i64(segments + segment * _SEGMENT_BYTES + 8 * SEGMENT_HEADER)
                last_seen = load_i64(header + 8 * LAST_SEEN)
                step = load_i64(header + 8 * STEP)
            if i + _AHEAD < high:
                prefetch(load_i64(places + 8 * (i + _AHEAD)))
            row = load_i64(load_i64(places + 8 * i) + 8)
            store_i64(rows + 8 * position, row)
            if last_seen:
                store_i64(last_seen + 8 * row, step)


@parallel_cpu.kernel
def _clear_kernel(args):
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)
    entries = load_i64(args + 32)
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        for i in range(chunk * chunk_size, min((chunk + 1) * chunk_size, n)):
            store_i64(entries + 16 * i, EMPTY)
            store_i64(entries + 16 * i + 8, NO_ROW)


@parallel_cpu.kernel
def _rebuild_kernel(args):
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)
    old, new = load_i64(args + 32), load_i64(args + 40)
    shift, capacity = load_i64(args + 48), load_i64(args + 56)
    evicted, gone, removed = load_i64(args + 64), load_i64(args + 72), load_i64(args + 80)
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        left_out = np.int64(0)
        for i in range(chunk * chunk_size, min((chunk + 1) * chunk_size, n)):
            key, row = load_i64(old + 16 * i), load_i64(old + 16 * i + 8)
            if row >= CLAIMED:  # empty, or left by an insertion that found no room
                continue
            if evicted and load_u8(evicted + row):
                store_u8(gone + row, np.uint8(1))
                left_out += 1
                continue
            place = new + 16 * capacity
            if key != EMPTY:
                slot = _slot(key, shift)
                while True:
                    place = new + 16 * slot
                    if load_i64(place) == EMPTY and compare_and_swap(place, EMPTY, key) == EMPTY:
                        break
                    slot = (slot + 1) & (capacity - 1)
            store_i64(place + 8, row)
        atomic_add(removed, left_out)


@parallel_cpu.kernel
def _id_of_row_kernel(args):
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)
    entries, ids, occupied = load_i64(args + 32), load_i64(args + 40), load_i64(args + 48)
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        for i in range(chunk * chunk_size, min((chunk + 1) * chunk_size, n)):
            row = load_i64(entries + 16 * i + 8)
            if row != NO_ROW:
                store_i64(ids + 8 * row, load_i64(entries + 16 * i))
                store_u8(occupied + row, np.uint8(1))


def _launch(kernel, n, chunk_size, *args):
    kernel.launch(num_chunks(n, chunk_size), chunk_size, n, *args)


def allocate_entries(capacity, device):
    """Allocate and clear entries; NumPy asks for huge pages, which probes in a large index need."""
    array = np.empty((capacity + 1, 2), np.int64)
    _launch(_clear_kernel, capacity + 1, 1 << 16, address_of(array))
    return torch.from_numpy(array)


def _find(ids, segments, training):
    n = ids.numel()
    rows = torch.empty(n, dtype=torch.int64)
    chunks = num_chunks(n, _CHUNK)
    counts = workspace.take("miss_counts", chunks, np.int64)[:chunks]
    _launch(
        _find_kernel,
        n,
        _CHUNK,
        ids.data_ptr(),
        rows.data_ptr(),
        segments.data_ptr(),
        segments.shape[0],
        address_of(counts),
        training,
    )
    return rows, counts


def find(ids, segments):
    """See the contract."""
    return _find(ids, segments, False)[0]


def find_or_insert(ids, segments, tables, segment_tables):
    """See the contract.

    Unknown ids are inserted in rounds, because a batch may hold an unknown id many times and room
    is needed for distinct ones only: the first round tells how many of them are distinct.
    """
    rows, counts = _find(ids, segments, True)
    all_new, before = [], None
    distinct_share = 0.0
    while num_misses := int(counts.sum()):
        misses = _list_misses(rows, counts, num_misses)
        cuts = np.searchsorted(misses, segments.numpy()[:, SEGMENT_START])
        misses, complete = _round_of(misses, cuts, tables, segment_tables, distinct_share)
        if before is None and not complete:
            before = [table.header.numpy()[_COUNTS] for table in tables]
        try:
            new = _insert(ids, segments, tables, segment_tables, misses, rows)
        except BaseException:
            _take_back(tables, before)
            raise
        all_new.append(new)
        if complete:
            break
        distinct_share = len(new) / len(misses)
        rows, counts = _find(ids, segments, True)
    if not all_new:
        return rows, None
    new = all_new[0] if len(all_new) == 1 else np.sort(np.concatenate(all_new))
    return rows, torch.from_numpy(new)


def _take_back(tables, before):
    """Make the ids of a failed insertion unknown again, those of its earlier rounds too.

    Their rows are the claims and what was handed out since ``before``, each table's counts then.
    """
    for number, table in enumerate(tables):
        header = table.header.numpy()
        counts = header[_COUNTS] if before is None else before[number]
        next_row, num_free = counts[1:]
        entries = _view(header[ENTRIES], 2 * (int(header[CAPACITY]) + 1)).reshape(-1, 2)
        reused = _view(header[FREE_ROWS], num_free)[header[NUM_FREE] :]
        entries[(entries[:, 1] >= next_row) | np.isin(entries[:, 1], reused), 1] = NO_ROW
        header[_COUNTS] = counts
        with contextlib.suppress(MemoryError):  # what the rebuild would drop is unknown already
            table.rebuild_index()


def _view(address, count):
    return np.ctypeslib.as_array((ctypes.c_int64 * int(count)).from_address(int(address)))


def _list_misses(rows, counts, num_misses):
    offsets = np.zeros(len(counts), np.int64)
    np.cumsum(counts[:-1], out=offsets[1:])
    misses = np.empty(num_misses, np.int64)
    where = (rows.data_ptr(), address_of(offsets), address_of(misses))
    _launch(_list_misses_kernel, rows.numel(), _CHUNK, *where)
    return misses


def _round_of(misses, cuts, tables, segment_tables, distinct_share):
    """Choose the misses to insert now: all, unless a table has many that may be duplicates."""
    bounds = np.append(cuts, len(misses))
    wanted = np.zeros(len(tables), np.int64)
    np.add.at(wanted, np.asarray(segment_tables), np.diff(bounds))
    limits = np.full(len(tables), _FIRST_ROUND)
    for table in np.flatnonzero(wanted > _FIRST_ROUND):
        known = int(tables[table].header[NUM_IDS])
        limits[table] = wanted[table] if distinct_share > 0.5 else max(known, _FIRST_ROUND)
    if (wanted <= limits).all():
        return misses, True
    kept = []
    for segment, table in enumerate(segment_tables):
        taken = misses[bounds[segment] : bounds[segment + 1]][: limits[table]]
        limits[table] -= len(taken)
        kept.append(taken)
    return np.concatenate(kept), False


def _insert(ids, segments, tables, segment_tables, misses, rows):
    starts = segments.numpy()[:, SEGMENT_START]
    for table, count in _per_table(misses, starts, segment_tables):
        tables[table].reserve_ids(int(count))

    places = np.empty(len(misses), np.int64)
    where = (segments.data_ptr(), segments.shape[0], ids.numel())
    addresses = (address_of(misses), address_of(places))
    _launch(_claim_kernel, len(misses), _CHUNK, ids.data_ptr(), *addresses, *where)

    counts = np.empty(num_chunks(len(misses), _CHUNK), np.int64)
    _launch(_list_new_kernel, len(misses), _CHUNK, *addresses, address_of(counts), 0, 0)
    num_new = int(counts.sum())
    counts[:] = np.concatenate(([0], np.cumsum(counts)[:-1]))
    new, new_places = np.empty(num_new, np.int64), np.empty(num_new, np.int64)
    _launch(
        _list_new_kernel,
        len(misses),
        _CHUNK,
        *addresses,
        address_of(counts),
        address_of(new),
        address_of(new_places),
    )
    _assign_rows(new, new_places, tables, starts, segment_tables)
    _launch(_fill_rows_kernel, len(misses), _CHUNK, *addresses, rows.data_ptr(), *where)
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
        runs.append((tables[table].header.data_ptr(), cuts[segment], ranks[table]))
        ranks[table] += cuts[segment + 1] - cuts[segment]
    runs = np.array(runs, np.int64)
    where = (address_of(new_places), address_of(runs), len(runs))
    _launch(_assign_kernel, len(new), _CHUNK, *where)
    for table, count in totals:
        header = tables[table].header.numpy()
        reused = min(int(header[NUM_FREE]), int(count))
        header[NUM_FREE] -= reused
        header[NEXT_ROW] += count - reused
        header[NUM_IDS] += count


def rebuild(old, header, evicted):
    """See the contract; ``old`` is (address, capacity) of the entries to move."""
    address, capacity = old
    removed = np.zeros(1, np.int64)
    gone = None if evicted is None else torch.zeros_like(evicted)
    _launch(
        _rebuild_kernel,
        capacity + 1,
        1 << 16,
        address,
        int(header[ENTRIES]),
        int(header[SHIFT]),
        int(header[CAPACITY]),
        0 if evicted is None else evicted.data_ptr(),
        0 if gone is None else gone.data_ptr(),
        address_of(removed),
    )
    if gone is not None:
        evicted.copy_(gone)
    return int(removed[0])


def id_of_row(header, num_rows):
    """See the contract."""
    ids = torch.empty(num_rows, dtype=torch.int64)
    occupied = torch.zeros(num_rows, dtype=torch.bool)
    _launch(
        _id_of_row_kernel,
        int(header[CAPACITY]) + 1,
        1 << 16,
        int(header[ENTRIES]),
        ids.data_ptr(),
        occupied.data_ptr(),
    )
    return ids, occupied
