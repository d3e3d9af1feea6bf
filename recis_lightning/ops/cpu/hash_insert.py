"""Insertion into the hash index in Numba: parallel, and still deterministic.

Every unknown id claims its entry by compare-and-swap, all its occurrences vote for the first
position by an atomic minimum, and the winners get rows in order of position.
"""

from __future__ import annotations

import numpy as np

from recis_lightning.ops.cpu.intrinsics import (
    atomic_min,
    inlined,
    load_i64,
    prefetch,
    store_i64,
)
from recis_lightning.ops.cpu.probe import (
    AHEAD,
    CHUNK,
    SEGMENT_BYTES,
    Index,
    claim_slot,
    index_of,
    next_segment,
    prefetch_key,
    segment_at,
)
from recis_lightning.ops.cpu.runtime import as_array, kernel, num_chunks
from recis_lightning.ops.layout import (
    CLAIMED,
    FREE_ROWS,
    LAST_SEEN,
    MISSING,
    NEXT_ROW,
    NUM_FREE,
    NUM_IDS,
    SEGMENT_HEADER,
    SEGMENT_IDS,
    SEGMENT_START,
    STEP,
)

_MAX_COUNTED = 4096  # misses that are counted before an index grows: 60 us


@inlined
def row_of_rank(rank, num_free, free_rows, next_row):
    """Return the row of a table's new id by its rank among them: freed rows first."""
    if rank < num_free:
        return load_i64(free_rows + 8 * (num_free - 1 - rank))
    return next_row + rank - num_free


@kernel
def _list_misses_kernel(low, high, chunk, rows, offsets, misses):
    out = load_i64(offsets + 8 * chunk)
    for i in range(low, high):
        if load_i64(rows + 8 * i) == MISSING:
            store_i64(misses + 8 * out, i)
            out += 1


@kernel
def _claim_kernel(low, high, misses, entries_of_misses, segments, num_segments, num_ids):
    segment, end = segment_at(segments, num_segments, load_i64(misses + 8 * low)), np.int64(-1)
    ids, index = np.int64(0), Index(np.int64(0), np.int64(0))
    for i in range(low, high):
        position = load_i64(misses + 8 * i)
        if position >= end:
            segment, end = next_segment(position, segment, segments, num_segments, num_ids)
            line = segments + segment * SEGMENT_BYTES
            ids = load_i64(line + 8 * SEGMENT_IDS)
            index = index_of(load_i64(line + 8 * SEGMENT_HEADER))
        if i + AHEAD < high:
            later = load_i64(misses + 8 * (i + AHEAD))
            if later < end:
                prefetch_key(load_i64(ids + 8 * later), index)
        slot, _ = claim_slot(load_i64(ids + 8 * position), index)
        entry = index.entries + 16 * slot
        atomic_min(entry + 8, CLAIMED | position)
        store_i64(entries_of_misses + 8 * i, entry)


@kernel
def _list_new_kernel(
    low, high, num_items, chunk, misses, entries_of_misses, counts, new, entries_of_new
):
    # Two passes share it: without a list it counts the winners of a chunk, with one it lists them.
    out = np.int64(0)
    if new:
        out = load_i64(counts + 8 * chunk)
    for i in range(low, high):
        if i + AHEAD < num_items:
            prefetch(load_i64(entries_of_misses + 8 * (i + AHEAD)))
        position = load_i64(misses + 8 * i)
        entry = load_i64(entries_of_misses + 8 * i)
        if load_i64(entry + 8) == CLAIMED | position:
            if new:
                store_i64(new + 8 * out, position)
                store_i64(entries_of_new + 8 * out, entry)
            out += 1
    if not new:
        store_i64(counts + 8 * chunk, out)


@kernel
def _assign_kernel(low, high, entries_of_new, runs, num_runs):
    # A run of new ids after the other: (table header, first new id, its rank in the table).
    run = np.int64(0)
    while run + 1 < num_runs and load_i64(runs + 24 * (run + 1) + 8) <= low:
        run += 1
    start = low
    while start < high:
        header, first = load_i64(runs + 24 * run), load_i64(runs + 24 * run + 8)
        first_rank = load_i64(runs + 24 * run + 16)
        num_free, next_row = load_i64(header + 8 * NUM_FREE), load_i64(header + 8 * NEXT_ROW)
        free_rows = load_i64(header + 8 * FREE_ROWS)
        run += 1
        end = high
        if run < num_runs:
            end = min(high, load_i64(runs + 24 * run + 8))
        for i in range(start, end):
            row = row_of_rank(i - first + first_rank, num_free, free_rows, next_row)
            store_i64(load_i64(entries_of_new + 8 * i) + 8, row)
        start = end


@kernel
def _fill_rows_kernel(low, high, misses, entries_of_misses, rows, segments, num_segments, num_ids):
    segment, end = segment_at(segments, num_segments, load_i64(misses + 8 * low)), np.int64(-1)
    last_seen, step = np.int64(0), np.int64(0)
    for i in range(low, high):
        position = load_i64(misses + 8 * i)
        if position >= end:
            segment, end = next_segment(position, segment, segments, num_segments, num_ids)
            header = load_i64(segments + segment * SEGMENT_BYTES + 8 * SEGMENT_HEADER)
            last_seen, step = load_i64(header + 8 * LAST_SEEN), load_i64(header + 8 * STEP)
        if i + AHEAD < high:
            prefetch(load_i64(entries_of_misses + 8 * (i + AHEAD)))
        row = load_i64(load_i64(entries_of_misses + 8 * i) + 8)
        store_i64(rows + 8 * position, row)
        if last_seen:
            store_i64(last_seen + 8 * row, step)


# What a first training step runs, in its order.
STEP_KERNELS = (
    _list_misses_kernel,
    _claim_kernel,
    _list_new_kernel,
    _assign_kernel,
    _fill_rows_kernel,
)


def list_misses(rows, counts, num_misses):
    """Return the positions of MISSING rows, ascending; ``counts`` has their number by chunk."""
    misses = np.empty(num_misses, np.int64)
    offsets = np.cumsum(counts) - counts
    _list_misses_kernel.launch(rows.numel(), CHUNK, rows=rows, offsets=offsets, misses=misses)
    return misses


def insert_misses(segments, tables, segment_tables, misses, rows):
    """Insert the ids at ``misses`` and write their rows to ``rows``.

    Returns:
        int64 [m], ascending: the position of each new id's first occurrence.
    """
    starts, num_misses = segments[:, SEGMENT_START], len(misses)
    growing = []
    for table, total in _per_table(misses, starts, segment_tables):
        memory, count = tables[table], int(total)
        if memory.outgrows_index(count):
            if 1 < count <= min(memory.header.fields.item(NUM_IDS), _MAX_COUNTED):
                count = _count_distinct(segments, segment_tables, table, misses)
            growing.append(memory)
            memory.reserve_ids(count)

    found = {"misses": misses, "entries_of_misses": np.empty(num_misses, np.int64)}
    of_segments = {
        "segments": segments,
        "num_segments": len(segments),
        "num_ids": rows.numel(),
    }
    _claim_kernel.launch(num_misses, CHUNK, **found, **of_segments)

    counts = np.empty(num_chunks(num_misses, CHUNK), np.int64)
    _list_new_kernel.launch(
        num_misses, CHUNK, **found, counts=counts, new=None, entries_of_new=None
    )
    num_new = int(counts.sum())
    new, entries_of_new = np.empty(num_new, np.int64), np.empty(num_new, np.int64)
    _list_new_kernel.launch(
        num_misses,
        CHUNK,
        **found,
        counts=np.cumsum(counts) - counts,
        new=new,
        entries_of_new=entries_of_new,
    )
    _assign_rows(new, entries_of_new, tables, starts, segment_tables)
    _fill_rows_kernel.launch(num_misses, CHUNK, **found, rows=rows, **of_segments)
    for memory in growing:  # of very many misses it was not known how many are distinct
        memory.fit_index()
    return new


def _count_distinct(segments, segment_tables, table, misses):
    """Return how many of a table's ids at ``misses`` are distinct."""
    cuts = np.append(np.searchsorted(misses, segments[:, SEGMENT_START]), len(misses))
    parts = []
    for segment in np.flatnonzero(np.asarray(segment_tables) == table):
        positions = misses[cuts[segment] : cuts[segment + 1]]
        if len(positions):
            first, last = positions[0], positions[-1]
            address = segments[segment, SEGMENT_IDS] + 8 * first
            parts.append(as_array(address, last - first + 1)[positions - first])
    return len(np.unique(np.concatenate(parts)))


def _per_table(positions, starts, segment_tables):
    """Return ``[(table, number of positions in it), ...]`` without the empty ones."""
    per_segment = np.diff(np.append(np.searchsorted(positions, starts), len(positions)))
    totals = np.zeros(max(segment_tables) + 1, np.int64)
    np.add.at(totals, np.asarray(segment_tables), per_segment)
    return [(table, totals[table]) for table in np.flatnonzero(totals)]


def _assign_rows(new, entries_of_new, tables, starts, segment_tables):
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
    _assign_kernel.launch(
        len(new),
        CHUNK,
        entries_of_new=entries_of_new,
        runs=np.array(runs, np.int64),
        num_runs=len(runs),
    )
    for table, count in totals:
        count_new_rows(tables[table].header.fields, int(count))


def count_new_rows(fields, count):
    """Enter ``count`` new rows, which ``row_of_rank`` named, into a table's header."""
    reused = min(int(fields[NUM_FREE]), count)
    fields[NUM_FREE] -= reused
    fields[NEXT_ROW] += count - reused
    fields[NUM_IDS] += count
