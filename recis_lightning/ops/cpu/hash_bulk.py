"""Bulk insert of very many ids in Numba: every probe hits the cache.

Ids are partitioned by the region of the index they belong to (``hash_partition``); then each
region, small enough for a core's own cache, is filled by one thread, so nothing is locked or voted
on: of an id's occurrences the one of the lowest position comes first. If all ids are new and
distinct, a position is a row; otherwise a second pass over the index closes the gaps.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from recis_lightning.ops import host_memory
from recis_lightning.ops.cpu.hash_insert import count_new_rows, row_of_rank
from recis_lightning.ops.cpu.hash_partition import Target, all_items, partition
from recis_lightning.ops.cpu.intrinsics import (
    atomic_add,
    equal_words,
    inlined,
    load_i64,
    load_u8,
    load_vector,
    lowest_bit,
    prefetch,
    store_i64,
    store_u8,
    store_vector,
)
from recis_lightning.ops.cpu.probe import AHEAD, LINE_KEYS, Index, claim_slot, slot_at_shift
from recis_lightning.ops.cpu.runtime import as_array, kernel, num_chunks
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
    SHIFT,
    STEP,
)

# Ids of a region that may overflow it; one in hundreds of thousands of regions has more.
_MAX_OVERFLOW = 64
_CHUNK = 1 << 14


@inlined
def _enter(key, item, entry, base, first, rows, last_seen, step):
    """Write the row of the id whose entry this is; return whether the id is new.

    An old id brings its row. Of a new one's occurrences the one of the lowest position comes
    first, and gives it the row ``base + position``: its final row, if every id of the call is new
    and distinct. The rows of new ids are not written to ``rows`` here, where they would be far
    apart.
    """
    if item < 0:
        store_i64(entry + 8, ~item)
        return False
    row = load_i64(entry + 8)
    if row == NO_ROW:
        store_i64(entry + 8, base + item - first)
        return True
    store_i64(rows + 8 * item, row)
    if last_seen and row < base:
        store_i64(last_seen + 8 * row, step)
    return False


@inlined
def _copy_lines(source, target, num_lines):
    for i in range(num_lines):
        store_vector(target + 64 * i, load_vector(16, source + 64 * i))


@inlined
def _clear(region, num_entries):
    for i in range(LINE_ENTRIES):
        store_i64(region + 16 * i, EMPTY)
        store_i64(region + 16 * i + 8, NO_ROW)
    line = load_vector(16, region)
    for i in range(1, num_entries // LINE_ENTRIES):
        store_vector(region + 64 * i, line)


@kernel
def _fill_region_kernel(
    chunk,
    num_chunks,
    next_chunk,
    thread,
    entries,
    shift,
    region_shift,
    is_fresh,
    all_items,
    starts,
    ends,
    scratch,
    base,
    first,
    rows,
    last_seen,
    step,
    overflow,
    max_overflow,
    num_overflow,
    all_new,
):
    # A chunk is a region. Ids that find it full to its end overflow, for a pass that walks on into
    # the next region; of more than there is room for, only the number is kept.
    region_size = np.int64(1) << region_shift
    ahead = entries + 16 * (min(next_chunk, num_chunks - 1) << region_shift)
    low = chunk << region_shift
    limit = low + region_size
    start = load_i64(starts + 8 * chunk)
    count = load_i64(ends + 8 * chunk) - start
    items = all_items + 16 * start
    if scratch:
        copies = scratch + 16 * region_size * thread
        _copy_lines(items, copies, (count + LINE_ENTRIES - 1) // LINE_ENTRIES)
        items = copies
    if is_fresh:
        _clear(entries + 16 * low, region_size)
    left, num_new = np.int64(0), np.int64(0)
    for i in range(count):
        # The region that this thread will most likely fill next, while this one is computed.
        prefetch(ahead + (32 * i & (16 * region_size - 64)))
        key, item = load_i64(items + 16 * i), load_i64(items + 16 * i + 8)
        slot = slot_at_shift(key, shift) if key != EMPTY else limit
        while slot < limit:
            # The id's entry, or the first empty one: a line at a time, without guessing where.
            line = entries + 16 * slot
            hits = equal_words(line, key) & LINE_KEYS
            if hits:
                entry = line + 8 * lowest_bit(hits)
                num_new += _enter(key, item, entry, base, first, rows, last_seen, step)
                break
            hits = equal_words(line, EMPTY) & LINE_KEYS
            if hits:
                entry = line + 8 * lowest_bit(hits)
                store_i64(entry, key)
                store_i64(entry + 8, ~item if item < 0 else base + item - first)
                num_new += item >= 0
                break
            slot += LINE_ENTRIES
        if slot == limit:
            if left < max_overflow:
                target = overflow + 16 * (max_overflow * chunk + left)
                store_i64(target, key)
                store_i64(target + 8, item)
            left += 1
    store_i64(num_overflow + 8 * chunk, left)
    atomic_add(all_new, num_new)


@kernel
def _insert_overflow_kernel(
    low, high, entries, capacity, items, base, first, rows, last_seen, step, all_new
):
    # One chunk, one thread: there are few such ids.
    num_new, index = np.int64(0), Index(entries, capacity)
    for i in range(low, high):
        key, item = load_i64(items + 16 * i), load_i64(items + 16 * i + 8)
        slot, _ = claim_slot(key, index)
        num_new += _enter(key, item, entries + 16 * slot, base, first, rows, last_seen, step)
    atomic_add(all_new, num_new)


@kernel
def _flag_new_kernel(low, high, entries, base, is_new):
    for i in range(low, high):
        row = load_i64(entries + 16 * i + 8)
        if row >= base and row != NO_ROW:
            store_u8(is_new + row - base, np.uint8(1))


@kernel
def _count_new_kernel(low, high, chunk, is_new, counts):
    count = np.int64(0)
    for i in range(low, high):
        count += np.int64(load_u8(is_new + i))
    store_i64(counts + 8 * chunk, count)


@kernel
def _final_row_kernel(low, high, chunk, is_new, ranks, final, header, first, new):
    # Turns flags into final rows, a row for each flag.
    num_free, free_rows = load_i64(header + 8 * NUM_FREE), load_i64(header + 8 * FREE_ROWS)
    next_row = load_i64(header + 8 * NEXT_ROW)
    rank = load_i64(ranks + 8 * chunk)
    for i in range(low, high):
        if load_u8(is_new + i):
            store_i64(final + 8 * i, row_of_rank(rank, num_free, free_rows, next_row))
            store_i64(new + 8 * rank, first + i)
            rank += 1


@kernel
def _renumber_entries_kernel(low, high, entries, base, final):
    for i in range(low, high):
        row = load_i64(entries + 16 * min(i + AHEAD, high - 1) + 8)
        if row >= base and row != NO_ROW:
            prefetch(final + 8 * (row - base))
        row = load_i64(entries + 16 * i + 8)
        if row >= base and row != NO_ROW:
            store_i64(entries + 16 * i + 8, load_i64(final + 8 * (row - base)))


@kernel
def _renumber_rows_kernel(low, high, rows, is_new, base, final):
    for i in range(low, high):
        if load_u8(is_new + i):
            store_i64(rows + 8 * i, load_i64(final + 8 * i))
            continue
        row = load_i64(rows + 8 * i)
        if row >= base:  # a later occurrence of a new id
            store_i64(rows + 8 * i, load_i64(final + 8 * (row - base)))


def bulk_insert(segments, table, first, rows):
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
    num_new = _fill_index(segments, fields, larger, base, first, rows)
    if larger is not None:
        table.take_index(larger)
    table.reserve_rows(num_new)
    if num_new == count and not fields[NUM_FREE]:
        new = slice(first, rows.numel())
        torch.arange(base, base + count, out=rows[first:], device="cpu")
    else:
        new = _close_gaps(fields, base, first, rows, num_new)
    if fields[LAST_SEEN]:
        last_seen = as_array(fields[LAST_SEEN], base + num_new)
        last_seen[rows.numpy()[new]] = fields[STEP]
    count_new_rows(fields, num_new)
    return new


def _fill_index(segments, fields, larger, base, first, rows):
    """Enter the ids, new ones with the row ``base + position``; return how many are new."""
    index = Target(int(fields[ENTRIES]), int(fields[CAPACITY]), int(fields[SHIFT]), False)
    old = (index.entries, index.capacity)
    if larger is not None:
        capacity = len(larger) - 1
        index = Target(larger.data_ptr(), capacity, 65 - capacity.bit_length(), True)
        larger[capacity] = torch.from_numpy(_last_entry(*old))
    assert index.capacity & (index.capacity - 1) == 0  # a region is known by its leading bits
    partitions = partition(segments, old, index, first, rows)
    num_regions, scratch = len(partitions.starts), None
    if partitions.items is None:
        scratch = host_memory.empty(16 * torch.get_num_threads() << partitions.region_shift)
    overflow = np.empty((num_regions, _MAX_OVERFLOW, 2), np.int64)
    num_overflow, num_new = np.empty(num_regions, np.int64), ctypes.c_int64(0)
    shared = {
        "entries": index.entries,
        "base": base,
        "first": first,
        "rows": rows,
        "last_seen": int(fields[LAST_SEEN]),
        "step": int(fields[STEP]),
        "all_new": num_new,
    }
    _fill_region_kernel.launch(
        num_regions,
        1,
        **shared,
        shift=index.shift,
        region_shift=partitions.region_shift,
        is_fresh=int(index.is_fresh),
        all_items=index.entries if partitions.items is None else partitions.items,
        starts=partitions.starts,
        ends=partitions.ends,
        scratch=scratch,
        overflow=overflow,
        max_overflow=_MAX_OVERFLOW,
        num_overflow=num_overflow,
    )
    if num_overflow.max() > _MAX_OVERFLOW:  # then all are entered once more: it does no harm
        items = all_items(segments, old if index.is_fresh else None, first, rows)
    else:
        items = overflow[np.arange(_MAX_OVERFLOW) < num_overflow[:, None]]
    if len(items):
        _insert_overflow_kernel.launch(
            len(items), len(items), **shared, capacity=index.capacity, items=items
        )
    return num_new.value


def _last_entry(entries, capacity):
    """Return the entry of the id ``EMPTY``, int64 [2]."""
    return as_array(entries + 16 * capacity, 2)


def _close_gaps(fields, base, first, rows, num_new):
    """Give new ids rows without gaps, freed ones first; return their positions."""
    count = rows.numel() - first
    is_new, entries = np.zeros(count, np.uint8), int(fields[ENTRIES])
    num_entries = int(fields[CAPACITY]) + 1
    _flag_new_kernel.launch(num_entries, _CHUNK, entries=entries, base=base, is_new=is_new)
    counts = np.empty(num_chunks(count, _CHUNK), np.int64)
    _count_new_kernel.launch(count, _CHUNK, is_new=is_new, counts=counts)
    new, final = np.empty(num_new, np.int64), np.empty(count, np.int64)
    _final_row_kernel.launch(
        count,
        _CHUNK,
        is_new=is_new,
        ranks=np.cumsum(counts) - counts,
        final=final,
        header=fields,
        first=first,
        new=new,
    )
    _renumber_entries_kernel.launch(num_entries, _CHUNK, entries=entries, base=base, final=final)
    _renumber_rows_kernel.launch(
        count, _CHUNK, rows=rows[first:], is_new=is_new, base=base, final=final
    )
    return new
