"""The hash index in Numba: find, find_or_insert and rebuild."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from numba import njit

from recis_lightning.ops import host_memory
from recis_lightning.ops.cpu import runtime
from recis_lightning.ops.cpu.hash_bulk import insert_many
from recis_lightning.ops.cpu.hash_insert import insert_misses, list_misses
from recis_lightning.ops.cpu.intrinsics import (
    atomic_add,
    compare_and_swap,
    equal_words,
    load_i64,
    load_u8,
    lowest_bit,
    prefetch,
    store_i64,
    store_u8,
)
from recis_lightning.ops.cpu.probe import (
    AHEAD,
    CHUNK,
    LINE_KEYS,
    SEGMENT_BYTES,
    find_row,
    launch,
    segment_at,
    segment_start,
    slot_of,
)
from recis_lightning.ops.cpu.runtime import address_of, as_array, num_chunks, workspace
from recis_lightning.ops.layout import (
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
    NUM_REFUSED,
    PADDING,
    SEGMENT_FLAGS,
    SEGMENT_HEADER,
    SEGMENT_IDS,
    SEGMENT_PADDING,
    SEGMENT_START,
    SHIFT,
    STEP,
    UNKNOWN,
)

# Unknown ids inserted before the share of duplicates among them is known; see find_or_insert.
_FIRST_ROUND = 1 << 16
_BULK = 1 << 18  # ids from which dealing them out by region pays
_WAITING = 8  # ids whose search goes on in a second line that wait for it together
READ, FIRST_LOOK, LATER_LOOK = range(3)  # only the first look of training counts the refused
_COUNTS = [NUM_IDS, NEXT_ROW, NUM_FREE]  # header fields that an insertion changes


@njit
def _note(position, row, rows, unknown, last_seen, step):
    """Write what was found for an id; return 1 if it was nothing."""
    if row == NO_ROW:
        store_i64(rows + 8 * position, unknown)
        return 1
    store_i64(rows + 8 * position, row)
    if last_seen:
        store_i64(last_seen + 8 * row, step)
    return 0


@runtime.kernel
def _find_kernel(args):
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)
    rows = load_i64(args + 32)
    segments, num_segments = load_i64(args + 40), load_i64(args + 48)
    miss_counts, training = load_i64(args + 56), load_i64(args + 64)
    all_noted = load_i64(args + 72)
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        i = chunk * chunk_size
        high = min(i + chunk_size, n)
        segment = segment_at(segments, num_segments, i)
        misses, lines = 0, all_noted + 8 * (AHEAD + _WAITING) * chunk
        waiting = lines + 8 * AHEAD
        while i < high:
            info = segments + segment * SEGMENT_BYTES
            segment += 1
            end = min(segment_start(segments, segment, num_segments, n), high)
            header, ids = load_i64(info + 8 * SEGMENT_HEADER), load_i64(info + 8 * SEGMENT_IDS)
            flags = load_i64(info + 8 * SEGMENT_FLAGS)
            has_padding, unknown, num_unknown = flags & HAS_PADDING, UNKNOWN, np.int64(0)
            if training and flags & INSERT:
                unknown = MISSING
            padding = load_i64(info + 8 * SEGMENT_PADDING)
            special = padding if has_padding else np.int64(EMPTY)
            entries = load_i64(header + 8 * ENTRIES)
            shift = load_i64(header + 8 * SHIFT)
            capacity = load_i64(header + 8 * CAPACITY)
            step = load_i64(header + 8 * STEP)
            last_seen = load_i64(header + 8 * LAST_SEEN) if training else 0
            num_waiting = 0
            for j in range(i, min(i + AHEAD, end)):
                line = entries + 16 * slot_of(load_i64(ids + 8 * j), shift)
                prefetch(line)
                store_i64(lines + 8 * (j & (AHEAD - 1)), line)
            for j in range(i, end):
                line = load_i64(lines + 8 * (j & (AHEAD - 1)))
                if j + AHEAD < end:
                    later = entries + 16 * slot_of(load_i64(ids + 8 * (j + AHEAD)), shift)
                    prefetch(later)
                    store_i64(lines + 8 * (j & (AHEAD - 1)), later)
                key = load_i64(ids + 8 * j)
                hits = equal_words(line, key) & LINE_KEYS
                if hits and key != special:  # as nearly all: with the fewest instructions
                    row = load_i64(line + 8 * lowest_bit(hits) + 8)
                    if row != NO_ROW:
                        store_i64(rows + 8 * j, row)
                        if last_seen:
                            store_i64(last_seen + 8 * row, step)
                        continue
                if has_padding and key == padding:
                    store_i64(rows + 8 * j, PADDING)
                    continue
                row, place = np.int64(NO_ROW), j
                if key == EMPTY or not hits | (equal_words(line, EMPTY) & LINE_KEYS):
                    # It waits until some more do: by then the next line is there.
                    prefetch(line + 64)
                    waits = waiting + 8 * (num_waiting & (_WAITING - 1))
                    place = load_i64(waits)
                    store_i64(waits, j)
                    num_waiting += 1
                    if num_waiting <= _WAITING:
                        continue
                    row = find_row(load_i64(ids + 8 * place), entries, shift, capacity)
                num_unknown += _note(place, row, rows, unknown, last_seen, step)
            for number in range(max(num_waiting - _WAITING, 0), num_waiting):
                place = load_i64(waiting + 8 * (number & (_WAITING - 1)))
                row = find_row(load_i64(ids + 8 * place), entries, shift, capacity)
                num_unknown += _note(place, row, rows, unknown, last_seen, step)
            if unknown == MISSING:
                misses += num_unknown
            elif training == FIRST_LOOK and num_unknown:
                atomic_add(header + 8 * NUM_REFUSED, num_unknown)
            i = end
        store_i64(miss_counts + 8 * chunk, misses)


@runtime.kernel
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


@runtime.kernel
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
                slot = slot_of(key, shift)
                while True:
                    place = new + 16 * slot
                    if load_i64(place) == EMPTY and compare_and_swap(place, EMPTY, key) == EMPTY:
                        break
                    slot = (slot + 1) & (capacity - 1)
            store_i64(place + 8, row)
        atomic_add(removed, left_out)


@runtime.kernel
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


def allocate_entries(capacity, device):
    """Allocate and clear entries."""
    array = host_memory.empty(16 * (capacity + 1)).view(np.int64).reshape(-1, 2)
    launch(_clear_kernel, capacity + 1, 1 << 16, address_of(array))
    return torch.from_numpy(array)


def _find(segments, n, training):
    rows = torch.empty(n, dtype=torch.int64)
    chunks = num_chunks(n, CHUNK)
    counts = workspace.take("miss_counts", chunks, np.int64)[:chunks]
    noted = workspace.take("noted_ids", chunks * (AHEAD + _WAITING), np.int64)
    launch(
        _find_kernel,
        n,
        CHUNK,
        rows.data_ptr(),
        address_of(segments),
        len(segments),
        address_of(counts),
        training,
        address_of(noted),
    )
    return rows, counts


def find(segments, num_ids, device):
    """See the contract."""
    return _find(segments, num_ids, READ)[0]


def find_or_insert(segments, num_ids, tables, segment_tables, screen, device):
    """See the contract.

    Unknown ids are inserted in rounds, because a batch may hold an unknown id many times and room
    is needed for distinct ones only: the first round tells how many of them are distinct.
    """
    if len(segments) == 1 and num_ids >= _BULK and segments[0, SEGMENT_FLAGS] & INSERT:
        if screen is None:
            return _find_or_insert_many(segments, num_ids, tables[0])
    return _in_rounds(segments, num_ids, tables, segment_tables, screen)


def _find_or_insert_many(segments, num_ids, table):
    """Look up very many ids of one feature; how many are new is guessed from the first of them."""
    before = [table.header.fields[_COUNTS]]
    start, new = _in_rounds(segments, _FIRST_ROUND, [table], [0], None)
    if new is None or len(new) < _FIRST_ROUND // 2:
        rows, rest = _in_rounds(segments, num_ids, [table], [0], None)
    else:
        rows = host_memory.empty_int64(num_ids)
        rows[:_FIRST_ROUND] = start
        try:
            rest = insert_many(segments, table, _FIRST_ROUND, rows)
        except BaseException:
            _take_back([table], before)
            raise
        if isinstance(rest, slice) and len(new) == rest.start:
            if before[0][1] == 0:  # the table had no rows: a position is a row
                return rows, rows
            return rows, torch.arange(num_ids, out=host_memory.empty_int64(num_ids))
        rest = torch.arange(num_ids)[rest] if isinstance(rest, slice) else torch.from_numpy(rest)
    parts = [part for part in (new, rest) if part is not None]
    return rows, torch.cat(parts) if parts else None


def _in_rounds(segments, num_ids, tables, segment_tables, screen):
    rows, counts = _find(segments, num_ids, FIRST_LOOK)
    misses, refused = _list_misses(rows, counts), None
    if screen is not None and len(misses):
        asked, misses = misses, screen(torch.from_numpy(misses), rows).numpy()
        refused = np.setdiff1d(asked, misses, assume_unique=True)
    all_new, before = [], None
    distinct_share = 0.0
    while len(misses):
        cuts = np.searchsorted(misses, segments[:, SEGMENT_START])
        misses, complete = _round_of(misses, cuts, tables, segment_tables, distinct_share)
        if before is None and not complete:
            before = [table.header.fields[_COUNTS] for table in tables]
        try:
            new = insert_misses(segments, tables, segment_tables, misses, rows)
        except BaseException:
            _take_back(tables, before)
            raise
        all_new.append(new)
        if complete:
            break
        distinct_share = len(new) / len(misses)
        rows, counts = _find(segments, num_ids, LATER_LOOK)
        misses = _list_misses(rows, counts)
        if refused is not None:
            rows.numpy()[refused] = UNKNOWN
            misses = np.setdiff1d(misses, refused, assume_unique=True)
    if not all_new:
        return rows, None
    new = all_new[0] if len(all_new) == 1 else np.sort(np.concatenate(all_new))
    return rows, torch.from_numpy(new)


def _list_misses(rows, counts):
    num_misses = int(counts.sum())
    return list_misses(rows, counts, num_misses) if num_misses else np.empty(0, np.int64)


def _take_back(tables, before):
    """Make the ids of a failed insertion unknown again, those of its earlier rounds too.

    Their rows are the claims and what was handed out since ``before``, each table's counts then.
    """
    for number, table in enumerate(tables):
        header = table.header.fields
        counts = header[_COUNTS] if before is None else before[number]
        next_row, num_free = counts[1:]
        entries = as_array(header[ENTRIES], 2 * (int(header[CAPACITY]) + 1)).reshape(-1, 2)
        reused = as_array(header[FREE_ROWS], num_free)[header[NUM_FREE] :]
        entries[(entries[:, 1] >= next_row) | np.isin(entries[:, 1], reused), 1] = NO_ROW
        header[_COUNTS] = counts
        with contextlib.suppress(MemoryError):  # what the rebuild would drop is unknown already
            table.rebuild_index()


def _round_of(misses, cuts, tables, segment_tables, distinct_share):
    """Choose the misses to insert now: all, unless a table has many that may be duplicates."""
    bounds = np.append(cuts, len(misses))
    wanted = np.zeros(len(tables), np.int64)
    np.add.at(wanted, np.asarray(segment_tables), np.diff(bounds))
    limits = np.full(len(tables), _FIRST_ROUND)
    for table in np.flatnonzero(wanted > _FIRST_ROUND):
        known = int(tables[table].header.fields[NUM_IDS])
        limits[table] = wanted[table] if distinct_share > 0.5 else max(known, _FIRST_ROUND)
    if (wanted <= limits).all():
        return misses, True
    kept = []
    for segment, table in enumerate(segment_tables):
        taken = misses[bounds[segment] : bounds[segment + 1]][: limits[table]]
        limits[table] -= len(taken)
        kept.append(taken)
    return np.concatenate(kept), False


def rebuild(old, header, evicted):
    """See the contract; ``old`` is (address, capacity) of the entries to move."""
    address, capacity = old
    removed = np.zeros(1, np.int64)
    gone = None if evicted is None else torch.zeros_like(evicted)
    launch(
        _rebuild_kernel,
        capacity + 1,
        1 << 16,
        address,
        int(header.fields[ENTRIES]),
        int(header.fields[SHIFT]),
        int(header.fields[CAPACITY]),
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
    launch(
        _id_of_row_kernel,
        int(header.fields[CAPACITY]) + 1,
        1 << 16,
        int(header.fields[ENTRIES]),
        ids.data_ptr(),
        occupied.data_ptr(),
    )
    return ids, occupied
