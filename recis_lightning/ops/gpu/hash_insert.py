"""Insertion into the hash index in Triton: parallel, and still deterministic.

Every unknown id claims its entry by compare-and-swap, all its occurrences vote for the first
position by an atomic minimum, and the winners get rows in order of position, by a prefix sum. The
host does not wait for any of it: it asks tables for room beforehand, by what it knows of them.
"""

import torch
import triton.language as tl

from recis_lightning.ops.gpu.duplicates import acting, of_acting
from recis_lightning.ops.gpu.layout import (
    CAPACITY,
    CLAIMED,
    ENTRIES,
    FREE_ROWS,
    LAST_SEEN,
    NEXT_ROW,
    NUM_FREE,
    NUM_IDS,
    SEGMENT_END_CHUNK,
    SEGMENT_FIRST_CHUNK,
    SEGMENT_HEADER,
    SEGMENT_IS_LAST,
    SEGMENT_STEP,
    SEGMENT_TABLE,
    SHIFT,
    STAGED_SEGMENT_BYTES,
    UNKNOWN,
)
from recis_lightning.ops.gpu.prefix_sum import add_up_
from recis_lightning.ops.gpu.probe import claim_slot, report_full
from recis_lightning.ops.gpu.runtime import (
    any_of,
    device_function,
    field,
    int64_at,
    kernel,
    sum_over,
    sums_up_to,
)
from recis_lightning.ops.gpu.segments import (
    LANES,
    SEARCH,
    SEARCH_VARIANT,
    SEARCH_WARPS,
    VARIANT,
    any_missing,
    ids_at,
    is_missing,
    own_ids,
)
from recis_lightning.ops.hash_index import Claim
from recis_lightning.ops.header import watch_counts

_SPARE = 4  # lookups for which there is room yet when the host asks for counts


@device_function
def claim(segment, header, slots, position, missing, LANES: tl.constexpr):
    """Give unknown ids an entry each, and let every occurrence vote for the first position.

    Of an id that a program has many times the first lane, which has the first position, acts alone.
    """
    entries, shift, capacity = field(header, ENTRIES), field(header, SHIFT), field(header, CAPACITY)
    slot = slots + 8 * position
    key = ids_at(segment, position, missing)
    acts = acting(key, missing, LANES)
    entry, _ = claim_slot(entries, shift, capacity, key, acts, slot)
    placed = report_full(header, entry, acts)
    tl.atomic_min(int64_at(entry + 8), position | CLAIMED, placed, sem="relaxed")
    tl.store(int64_at(slot), of_acting(key, entry, missing, LANES), missing)


@kernel(SEARCH_VARIANT, num_warps=SEARCH_WARPS)
def _claim_kernel(
    segments: tl.int64,
    num_segments: tl.int64,
    rows: tl.int64,
    slots: tl.int64,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
):
    if any_missing(segments, num_segments):
        _, segment, position, inside = own_ids(segments, num_segments, LANES, PARTS)
        missing = is_missing(rows, position, inside)
        if any_of(missing):
            claim(segment, field(segment, SEGMENT_HEADER), slots, position, missing, LANES)


@device_function
def _first_occurrences(rows, slots, position, inside):
    """Return which positions are the first ones of new ids, and the entries of all new ids."""
    missing = is_missing(rows, position, inside)
    entry = tl.load(int64_at(slots + 8 * position), missing, 0)
    row = tl.load(int64_at(entry + 8), entry != 0, 0)
    return row == (position | CLAIMED), entry


@kernel(VARIANT)
def _count_first_kernel(
    segments: tl.int64,
    num_segments: tl.int64,
    rows: tl.int64,
    slots: tl.int64,
    counts: tl.int64,
    new: tl.int64,
    LANES: tl.constexpr,
):
    chunk, _, position, inside = own_ids(segments, num_segments, LANES)
    if any_missing(segments, num_segments):
        first, _entry = _first_occurrences(rows, slots, position, inside)
        tl.store(int64_at(counts + 8 * chunk), sum_over(first.to(tl.int64), 0))
    tl.store(int64_at(new + 8 * position), position * 0 - 1, inside)


@device_function
def _new_before(segments, num_segments, before, table, LANES: tl.constexpr):
    """Return how many new ids a table has in the first ``num_segments`` segments."""
    count = num_segments * 0
    first = num_segments * 0
    while first < num_segments:
        other = first + tl.arange(0, LANES)
        at = segments + other * STAGED_SEGMENT_BYTES
        same = other < num_segments
        same = same & (tl.load(int64_at(at + 8 * SEGMENT_TABLE), same, -1) == table)
        low = tl.load(int64_at(at + 8 * SEGMENT_FIRST_CHUNK), same, 0)
        high = tl.load(int64_at(at + 8 * SEGMENT_END_CHUNK), same, 0)
        low = tl.load(int64_at(before + 8 * low), same, 0)
        high = tl.load(int64_at(before + 8 * high), same, 0)
        count += sum_over(high - low, 0)
        first += LANES
    return count


@kernel(VARIANT)
def _assign_kernel(
    segments: tl.int64,
    num_segments: tl.int64,
    rows: tl.int64,
    slots: tl.int64,
    before: tl.int64,
    new: tl.int64,
    LANES: tl.constexpr,
):
    if any_missing(segments, num_segments):
        chunk, segment, position, inside = own_ids(segments, num_segments, LANES)
        low, high = field(before, chunk), field(before, chunk + 1)
        if high > low:
            first, entry = _first_occurrences(rows, slots, position, inside)
            header = field(segment, SEGMENT_HEADER)
            num_free, next_row = field(header, NUM_FREE), field(header, NEXT_ROW)
            index = (segment - segments) // STAGED_SEGMENT_BYTES
            rank = _new_before(segments, index, before, field(segment, SEGMENT_TABLE), LANES)
            rank += low - field(before, field(segment, SEGMENT_FIRST_CHUNK))
            rank_here = sums_up_to(first.to(tl.int64)) - 1
            rank = rank + rank_here
            is_reused = rank < num_free
            top = field(header, FREE_ROWS) + 8 * (num_free - 1 - rank)
            row = tl.load(int64_at(top), first & is_reused, 0)
            row = tl.where(is_reused, row, next_row + rank - num_free)
            tl.store(int64_at(entry + 8), row, first)
            tl.store(int64_at(new + 8 * (low + rank_here)), position, first)


@kernel(VARIANT)
def _fill_rows_kernel(
    segments: tl.int64,
    num_segments: tl.int64,
    rows: tl.int64,
    slots: tl.int64,
    before: tl.int64,
    LANES: tl.constexpr,
):
    if any_missing(segments, num_segments):
        chunk, segment, position, inside = own_ids(segments, num_segments, LANES)
        missing = is_missing(rows, position, inside)
        entry = tl.load(int64_at(slots + 8 * position), missing, 0)
        row = tl.load(int64_at(entry + 8), entry != 0, UNKNOWN)
        tl.store(int64_at(rows + 8 * position), row, missing)
        header = field(segment, SEGMENT_HEADER)
        last_seen = field(header, LAST_SEEN)
        if last_seen != 0:
            step = position * 0 + field(segment, SEGMENT_STEP)
            tl.store(int64_at(last_seen + 8 * row), step, entry != 0)
        if (field(segment, SEGMENT_IS_LAST) != 0) & (chunk == field(segment, SEGMENT_FIRST_CHUNK)):
            index = (segment - segments) // STAGED_SEGMENT_BYTES
            count = _new_before(segments, index + 1, before, field(segment, SEGMENT_TABLE), LANES)
            num_free, next_row = field(header, NUM_FREE), field(header, NEXT_ROW)
            num_reused = tl.minimum(num_free, count)
            tl.store(int64_at(header + 8 * NUM_FREE), num_free - num_reused)
            tl.store(int64_at(header + 8 * NEXT_ROW), next_row + count - num_reused)
            tl.store(int64_at(header + 8 * NUM_IDS), field(header, NUM_IDS) + count)


@kernel(VARIANT)
def _copy_missing_kernel(
    segments: tl.int64,
    num_segments: tl.int64,
    rows: tl.int64,
    keys: tl.int64,
    owners: tl.int64,
    LANES: tl.constexpr,
):
    _, segment, position, inside = own_ids(segments, num_segments, LANES)
    missing = is_missing(rows, position, inside)
    key = ids_at(segment, position, missing)
    owner = tl.where(missing, position * 0 + field(segment, SEGMENT_TABLE), -1)
    tl.store(int64_at(keys + 8 * position), key, inside)
    tl.store(int64_at(owners + 8 * position), owner, inside)


def _count_distinct(staged, rows, num_tables):
    """Return how many distinct ids each table lacks; the host waits for the device."""
    keys, owners = torch.empty_like(rows), torch.empty_like(rows)
    where = (*staged.where, rows.data_ptr(), keys.data_ptr(), owners.data_ptr())
    _copy_missing_kernel.launch(rows.device, staged.num_programs, *where, LANES=LANES)
    missing = owners >= 0
    # Two radix sorts: torch.unique of pairs would compare them.
    keys, order = keys[missing].sort()
    owners, order = owners[missing][order].sort(stable=True)
    keys = keys[order]
    is_first = torch.ones_like(keys, dtype=torch.bool)
    is_first[1:] = (keys[1:] != keys[:-1]) | (owners[1:] != owners[:-1])
    return torch.bincount(owners[is_first], minlength=num_tables).tolist()


def tables_without_room(staged, tables):
    """Return how many ids are sure to fit in each table, and which tables may lack room."""
    free = [table.guaranteed_free() for table in tables]
    wanted = zip(staged.split.ids_to_insert, free, strict=True)
    return free, [i for i, (num_ids, num_free) in enumerate(wanted) if num_ids > num_free]


def make_room(staged, rows, tables, short):
    """Count the new ids of some tables and make room for them, before any is inserted.

    The host waits for the device. A failure here has changed nothing.

    Args:
        staged: The lookup's segments.
        rows: int64 [n], MISSING where an id is to be inserted.
        tables: The group's.
        short: Indices of the tables that may lack room.

    Returns:
        Index of each of these tables -> number of its new ids.
    """
    counts = _count_distinct(staged, rows, len(tables))
    for i in short:
        tables[i].reserve_ids(counts[i])
    for i in short:
        tables[i].reserve_rows(counts[i])
    for i in short:
        tables[i].reserve_headroom(counts[i], staged.split.ids_to_insert[i])
    return {i: counts[i] for i in short}


class Workspace:
    """Memory of an insertion, allocated before anything is claimed.

    Args:
        rows: int64 [n], the rows of the insertion.
        num_programs: Programs that the ids are split into.

    Attributes:
        new: int64 [n], for the positions of the new ids' first occurrences.
        slots: Address of int64 [n + LANES], for each position the address of its id's entry.
        counts: Address of int64 [num_programs + 1].
    """

    def __init__(self, rows, num_programs):
        num_ids, new_empty = rows.numel(), rows.new_empty
        # Not one allocation: to take a part of it would take torch as long as another one.
        self.new, self._rest = new_empty(num_ids), new_empty(num_ids + LANES + num_programs + 1)
        self.slots = self._rest.data_ptr()
        self.counts = self.slots + 8 * (num_ids + LANES)


def insert_misses(staged, rows, workspace, are_claimed, claims):
    """Insert the ids of ``rows`` that are MISSING and enter their rows; there is room for them.

    Args:
        staged: The lookup's segments.
        rows: int64 [n].
        workspace: Of the insertion.
        are_claimed: Whether its slots are filled already; else the ids are claimed here.
        claims: Gets what an interruption must know.

    Returns:
        int64 [n]: positions of the new ids' first occurrences, ascending, then -1.
    """
    device, programs, counts = rows.device, staged.num_programs, workspace.counts
    where = (*staged.where, rows.data_ptr(), workspace.slots)
    if not are_claimed:
        _claim_kernel.launch(device, programs * SEARCH["PARTS"], *where, **SEARCH)
    outputs = (*where, counts, workspace.new.data_ptr())
    _count_first_kernel.launch(device, programs, *outputs, LANES=LANES)
    add_up_(device, counts, programs, staged.flag)
    _assign_kernel.launch(device, programs, *outputs, LANES=LANES)
    claims.append(Claim((), None, workspace.new))
    _fill_rows_kernel.launch(device, programs, *where, counts, LANES=LANES)
    return workspace.new


def note_insertions(staged, tables, free, counted):
    """Keep the host's bounds of what may have been inserted; note lookups ahead if there is room.

    Args:
        staged: The lookup's segments.
        tables: The group's.
        free: For each table, how many ids were sure to fit before.
        counted: Index of a table -> number of its new ids, for the tables where that is known.
    """
    nearly_full, ahead = [], staged.split.allowance.most_ahead()
    for i, (table, num_ids) in enumerate(zip(tables, staged.split.ids_to_insert, strict=True)):
        if num_ids:
            inserted = counted.get(i, num_ids)
            table.header.note_insertion(inserted)
            num_free = table.guaranteed_free() if i in counted else free[i] - inserted
            if _SPARE * num_ids > num_free:  # soon the host would have to wait
                nearly_full.append(table.header)
            ahead = min(ahead, num_free // num_ids - _SPARE) if table.header.is_mirrored else 0
    watch_counts(nearly_full)
    if ahead > 0 and not nearly_full:
        for table, num_ids in zip(tables, staged.split.ids_to_insert, strict=True):
            table.header.note_insertion(ahead * num_ids)
    staged.split.allowance.grant(ahead)


__all__ = [
    "Workspace",
    "claim",
    "insert_misses",
    "make_room",
    "note_insertions",
    "tables_without_room",
]
