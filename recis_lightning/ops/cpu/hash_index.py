"""The hash index in Numba: find, find_or_insert and rebuild."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from recis_lightning.ops import host_memory
from recis_lightning.ops.cpu.hash_bulk import bulk_insert
from recis_lightning.ops.cpu.hash_insert import insert_misses, list_misses
from recis_lightning.ops.cpu.intrinsics import (
    atomic_add,
    equal_words,
    inlined,
    load_i32,
    load_i64,
    load_u8,
    lowest_bit,
    prefetch,
    store_i32,
    store_i64,
    store_u8,
)
from recis_lightning.ops.cpu.probe import (
    AHEAD,
    CHUNK,
    LINE_KEYS,
    SEGMENT_BYTES,
    Index,
    claim_slot,
    find_row,
    index_of,
    segment_at,
    segment_start,
    slot_of,
)
from recis_lightning.ops.cpu.row_blocks import row_address, row_blocks_of
from recis_lightning.ops.cpu.runtime import kernel, num_chunks, workspace
from recis_lightning.ops.hash_index import Claim
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
    NUM_REJECTED,
    PADDING,
    SEGMENT_FLAGS,
    SEGMENT_HEADER,
    SEGMENT_IDS,
    SEGMENT_PADDING,
    SEGMENT_START,
    STEP,
    UNKNOWN,
)

# Unknown ids inserted before the share of duplicates among them is known; see find_or_insert.
_FIRST_ROUND = 1 << 16
_BULK = 1 << 18  # ids from which partitioning them by region pays
_DEFERRED = 8  # ids whose search goes on in a second line, deferred together
_ENTRIES_PER_CHUNK = 1 << 16
READ, FIRST_PASS, LATER_PASS = range(3)  # only the first pass of training counts rejected ids
_COUNTS = slice(NUM_IDS, NUM_FREE + 1)  # header fields that an insertion changes


@inlined
def _write_row(position, row, rows, unknown, last_seen, step):
    """Write the row that was found for an id; return 1 if it has none."""
    if row == NO_ROW:
        store_i64(rows + 8 * position, unknown)
        return 1
    store_i64(rows + 8 * position, row)
    if last_seen:
        store_i64(last_seen + 8 * row, step)
    return 0


@inlined
def _find_segment(start, end, segment, rows, unknown, training, lines):
    """Find the rows of the ids from ``start`` to ``end``; return how many have none.

    ``lines`` is scratch memory: the addresses where the next searches start, then the positions
    of deferred ids.
    """
    header, ids = load_i64(segment + 8 * SEGMENT_HEADER), load_i64(segment + 8 * SEGMENT_IDS)
    index = index_of(header)
    entries, capacity = index.entries, index.capacity
    has_padding = load_i64(segment + 8 * SEGMENT_FLAGS) & HAS_PADDING
    padding = load_i64(segment + 8 * SEGMENT_PADDING)
    special = padding if has_padding else np.int64(EMPTY)
    step = load_i64(header + 8 * STEP)
    last_seen = load_i64(header + 8 * LAST_SEEN) if training else 0
    deferred, num_deferred, num_unknown = lines + 8 * AHEAD, 0, np.int64(0)
    for i in range(start, min(start + AHEAD, end)):
        line = entries + 16 * slot_of(load_i64(ids + 8 * i), capacity)
        prefetch(line)
        store_i64(lines + 8 * (i & (AHEAD - 1)), line)
    for i in range(start, end):
        line = load_i64(lines + 8 * (i & (AHEAD - 1)))
        if i + AHEAD < end:
            later = entries + 16 * slot_of(load_i64(ids + 8 * (i + AHEAD)), capacity)
            prefetch(later)
            store_i64(lines + 8 * (i & (AHEAD - 1)), later)
        key = load_i64(ids + 8 * i)
        hits = equal_words(line, key) & LINE_KEYS
        if hits and key != special:  # as nearly all: with the fewest instructions
            row = load_i64(line + 8 * lowest_bit(hits) + 8)
            if row != NO_ROW:
                store_i64(rows + 8 * i, row)
                if last_seen:
                    store_i64(last_seen + 8 * row, step)
                continue
        if has_padding and key == padding:
            store_i64(rows + 8 * i, PADDING)
            continue
        row, position = np.int64(NO_ROW), i
        if key == EMPTY or not hits | (equal_words(line, EMPTY) & LINE_KEYS):
            # Deferred until some more are: by then its next line is in the cache.
            prefetch(line + 64)
            oldest = deferred + 8 * (num_deferred & (_DEFERRED - 1))
            position = load_i64(oldest)
            store_i64(oldest, i)
            num_deferred += 1
            if num_deferred <= _DEFERRED:
                continue
            row = find_row(load_i64(ids + 8 * position), index)
        num_unknown += _write_row(position, row, rows, unknown, last_seen, step)
    for i in range(max(num_deferred - _DEFERRED, 0), num_deferred):
        position = load_i64(deferred + 8 * (i & (_DEFERRED - 1)))
        row = find_row(load_i64(ids + 8 * position), index)
        num_unknown += _write_row(position, row, rows, unknown, last_seen, step)
    return num_unknown


@kernel
def _find_kernel(
    low, high, num_items, chunk, rows, segments, num_segments, miss_counts, training, scratch
):
    misses, start = 0, low
    lines = scratch + 8 * (AHEAD + _DEFERRED) * chunk
    index = segment_at(segments, num_segments, start)
    while start < high:
        segment = segments + index * SEGMENT_BYTES
        index += 1
        end = min(segment_start(segments, index, num_segments, num_items), high)
        unknown = UNKNOWN
        if training and load_i64(segment + 8 * SEGMENT_FLAGS) & INSERT:
            unknown = MISSING
        num_unknown = _find_segment(start, end, segment, rows, unknown, training, lines)
        if unknown == MISSING:
            misses += num_unknown
        elif training == FIRST_PASS and num_unknown:
            atomic_add(load_i64(segment + 8 * SEGMENT_HEADER) + 8 * NUM_REJECTED, num_unknown)
        start = end
    store_i64(miss_counts + 8 * chunk, misses)


@kernel
def _clear_kernel(low, high, entries):
    for i in range(low, high):
        store_i64(entries + 16 * i, EMPTY)
        store_i64(entries + 16 * i + 8, NO_ROW)


@kernel
def _rebuild_kernel(low, high, old, new, capacity, evicted, found, num_removed):
    removed, index = np.int64(0), Index(new, capacity)
    for i in range(low, high):
        key, row = load_i64(old + 16 * i), load_i64(old + 16 * i + 8)
        if row >= CLAIMED:  # empty, or left by an insertion that found no room
            continue
        if evicted and load_u8(evicted + row):
            store_u8(found + row, np.uint8(1))
            removed += 1
            continue
        slot, _ = claim_slot(key, index)
        store_i64(new + 16 * slot + 8, row)
    atomic_add(num_removed, removed)


@kernel
def _number_free_rows_kernel(low, high, header):
    # A freed row notes its place in the stack: that tells it from a row in use, without a list.
    blocks, stack = row_blocks_of(header), load_i64(header + 8 * FREE_ROWS)
    for i in range(low, high):
        store_i32(row_address(load_i64(stack + 8 * i), blocks), np.int32(i))


@kernel
def _drop_rowless_kernel(low, high, entries, header, num_void):
    blocks, stack = row_blocks_of(header), load_i64(header + 8 * FREE_ROWS)
    next_row, num_free = load_i64(header + 8 * NEXT_ROW), load_i64(header + 8 * NUM_FREE)
    void = np.int64(0)
    for i in range(low, high):
        row = load_i64(entries + 16 * i + 8)
        if row < next_row:
            place = np.int64(0)
            if num_free:
                place = np.int64(load_i32(row_address(row, blocks)))
            if place < 0 or place >= num_free or load_i64(stack + 8 * place) != row:
                continue
        if row != NO_ROW:
            store_i64(entries + 16 * i + 8, NO_ROW)
        if load_i64(entries + 16 * i) != EMPTY:
            void += 1
    atomic_add(num_void, void)


@kernel
def _id_of_row_kernel(low, high, entries, ids, occupied):
    for i in range(low, high):
        row = load_i64(entries + 16 * i + 8)
        if row != NO_ROW:
            store_i64(ids + 8 * row, load_i64(entries + 16 * i))
            store_u8(occupied + row, np.uint8(1))


# What a first training step runs, in its order.
STEP_KERNELS = (_clear_kernel, _find_kernel, _rebuild_kernel)


def allocate_entries(capacity, device):
    array = host_memory.empty(16 * (capacity + 1)).view(np.int64).reshape(-1, 2)
    _clear_kernel.launch(capacity + 1, _ENTRIES_PER_CHUNK, entries=array)
    with torch.inference_mode(False):  # what is made in inference mode nothing outside may change
        return torch.from_numpy(array)


def _find(segments, num_ids, training):
    rows = torch.empty(num_ids, dtype=torch.int64, device="cpu")
    chunks = num_chunks(num_ids, CHUNK)
    miss_counts = workspace.take("miss_counts", chunks, np.int64)[:chunks]
    _find_kernel.launch(
        num_ids,
        CHUNK,
        rows=rows,
        segments=segments,
        num_segments=len(segments),
        miss_counts=miss_counts,
        training=training,
        scratch=workspace.take("find_scratch", chunks * (AHEAD + _DEFERRED), np.int64),
    )
    return rows, miss_counts


def find(segments, num_ids, device):
    return _find(segments, num_ids, READ)[0]


def find_or_insert(
    segments, num_ids, tables, segment_tables, screen, device, claims, plan, dim, kept
):
    """Insert unknown ids in rounds, or very many of one feature in bulk.

    A batch may hold an unknown id many times, and room is needed for distinct ones only: the first
    round shows how many of them are distinct.
    """
    if len(segments) == 1 and num_ids >= _BULK and segments[0, SEGMENT_FLAGS] & INSERT:
        if screen is None:
            return _find_or_bulk_insert(segments, num_ids, tables[0], claims)
    return _insert_in_rounds(segments, num_ids, tables, segment_tables, screen, claims)


def _find_or_bulk_insert(segments, num_ids, table, claims):
    """Look up very many ids of one feature; how many are new is guessed from the first of them."""
    had_no_rows = not table.header.fields.item(NEXT_ROW)
    start, new = _insert_in_rounds(segments, _FIRST_ROUND, [table], [0], None, claims)
    if new is None or len(new) < _FIRST_ROUND // 2:
        rows, rest = _insert_in_rounds(segments, num_ids, [table], [0], None, claims)
    else:
        rows = host_memory.empty_int64(num_ids)
        rows[:_FIRST_ROUND] = start
        rest = bulk_insert(segments, table, _FIRST_ROUND, rows)
        if isinstance(rest, slice) and len(new) == rest.start:
            if had_no_rows:  # a position is a row
                return rows, rows
            return rows, torch.arange(num_ids, out=host_memory.empty_int64(num_ids), device="cpu")
        rest = (
            torch.arange(num_ids, device="cpu")[rest]
            if isinstance(rest, slice)
            else torch.from_numpy(rest)
        )
    parts = [part for part in (new, rest) if part is not None]
    return rows, torch.cat(parts) if parts else None


def _insert_in_rounds(segments, num_ids, tables, segment_tables, screen, claims):
    rows, counts = _find(segments, num_ids, FIRST_PASS)
    misses, rejected = _list_misses(rows, counts), None
    if screen is not None and len(misses):
        misses = screen(torch.from_numpy(misses), rows).numpy()
    if len(misses):
        claims.append(Claim(tables, [table.header.fields[_COUNTS].tolist() for table in tables]))
    all_new, distinct_share = [], 0.0
    while len(misses):
        cuts = np.searchsorted(misses, segments[:, SEGMENT_START])
        misses, complete = _round_of(misses, cuts, tables, segment_tables, distinct_share)
        if rejected is None and not complete:
            rejected = np.flatnonzero(rows.numpy() == UNKNOWN)  # they stay so, whoever inserts them
        new = insert_misses(segments, tables, segment_tables, misses, rows)
        all_new.append(new)
        if complete:
            break
        distinct_share = len(new) / len(misses)
        rows, counts = _find(segments, num_ids, LATER_PASS)
        misses = _list_misses(rows, counts)
        if len(rejected):
            rows.numpy()[rejected] = UNKNOWN
            misses = np.setdiff1d(misses, rejected, assume_unique=True)
    if not all_new:
        return rows, None
    new = all_new[0] if len(all_new) == 1 else np.sort(np.concatenate(all_new))
    return rows, torch.from_numpy(new)


def _list_misses(rows, counts):
    num_misses = int(counts.sum())
    return list_misses(rows, counts, num_misses) if num_misses else np.empty(0, np.int64)


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


def rebuild(old, header, new, evicted):
    address, num_entries = old[0], old[1] + 1
    entries, _, capacity = new
    num_removed = ctypes.c_int64(0)
    found = None if evicted is None else torch.zeros_like(evicted)
    _rebuild_kernel.launch(
        num_entries,
        _ENTRIES_PER_CHUNK,
        old=address,
        new=entries,
        capacity=capacity,
        evicted=evicted,
        found=found,
        num_removed=num_removed,
    )
    if found is not None:
        evicted.copy_(found)
    return num_removed.value


def drop_rowless(header):
    fields, num_void = header.fields, ctypes.c_int64(0)
    where = {"header": header.address}
    _number_free_rows_kernel.launch(int(fields[NUM_FREE]), _ENTRIES_PER_CHUNK, **where)
    entries, num_entries = int(fields[ENTRIES]), int(fields[CAPACITY]) + 1
    _drop_rowless_kernel.launch(
        num_entries, _ENTRIES_PER_CHUNK, entries=entries, **where, num_void=num_void
    )
    return num_void.value


def id_of_row(header, num_rows):
    ids = torch.empty(num_rows, dtype=torch.int64, device="cpu")
    occupied = torch.zeros(num_rows, dtype=torch.bool, device="cpu")
    _id_of_row_kernel.launch(
        int(header.fields[CAPACITY]) + 1,
        _ENTRIES_PER_CHUNK,
        entries=int(header.fields[ENTRIES]),
        ids=ids,
        occupied=occupied,
    )
    return ids, occupied
