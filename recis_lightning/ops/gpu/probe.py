"""Probing of the hash index in Triton, and how a lookup's segments are split into programs.

A program handles some ids of one segment, one a lane, so the table's header is read once a program
and lanes differ only in how far they probe.
"""

import functools
import threading
from typing import NamedTuple

import numpy as np
import triton.language as tl

from recis_lightning.ops import layout as fields
from recis_lightning.ops.gpu.layout import (
    CAPACITY,
    EMPTY,
    ENTRIES,
    LINE_ENTRIES,
    MISSING,
    NO_ROW,
    SEGMENT_END,
    SEGMENT_END_CHUNK,
    SEGMENT_FIRST_CHUNK,
    SEGMENT_IDS,
    SEGMENT_IS_LAST,
    SEGMENT_START,
    SEGMENT_STEP,
    SEGMENT_TABLE,
    SHIFT,
    STAGED_SEGMENT_BYTES,
    STAGED_SEGMENT_SIZE,
)
from recis_lightning.ops.gpu.runtime import (
    any_of,
    device_function,
    field,
    int64_at,
    lanes,
    line_of,
    stage,
)

_MIX_1 = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_2 = tl.constexpr(0xD6E8FEB86659FD93)

LANES = lanes(256, 4096)
VARIANT = {"LANES": 256}


@device_function
def slot_of(key, shift):
    """Return the slot where the search for ``key`` starts."""
    mixed = key.to(tl.uint64, bitcast=True) * _MIX_1
    mixed = (mixed ^ (mixed >> 32)) * _MIX_2
    return (mixed >> shift.to(tl.uint64)).to(tl.int64) & -LINE_ENTRIES


@device_function
def find_entry(entries, shift, capacity, key, searching):
    """Return the address of each id's entry, and the row field in it; NO_ROW where there is none.

    Lanes that are idle or find nothing get some address and NO_ROW.
    """
    slot = tl.where(key == EMPTY, capacity, slot_of(key, shift))
    entry = entries + 16 * slot
    row = key * 0 + NO_ROW
    while any_of(searching):
        at = entries + 16 * slot
        there = tl.load(int64_at(at), searching, EMPTY)
        its_row = tl.load(int64_at(at + 8), searching, NO_ROW)  # both loads at once: one wait
        hit = searching & (there == key)
        entry = tl.where(hit, at, entry)
        row = tl.where(hit, its_row, row)
        searching = searching & (hit == 0) & (there != EMPTY)
        slot = (slot + 1) & (capacity - 1)
    return entry, row


@device_function
def row_of(header, key, searching):
    """Return the row field of each id's entry; NO_ROW where there is none, or a lane is idle."""
    entries, shift, capacity = field(header, ENTRIES), field(header, SHIFT), field(header, CAPACITY)
    _, row = find_entry(entries, shift, capacity, key, searching)
    return row


@device_function
def claim_slot(entries, shift, capacity, key, claiming, dummy):
    """Return the address of each id's entry, claiming an empty one where the id has none.

    A compare-and-swap has no mask: a lane that claims nothing swaps EMPTY for EMPTY in its dummy
    cell, which changes nothing.

    Args:
        entries: Address of the index.
        shift: Of the index.
        capacity: Of the index.
        key: The ids; the id EMPTY has its entry, the last one, from the start.
        claiming: Lanes that have an id.
        dummy: Address of an int64 for each lane, which may be swapped for itself.

    Returns:
        The entries' addresses, the last entry's for idle lanes; and which lanes claimed one.
    """
    entry = entries + 16 * (capacity + key * 0)
    slot = slot_of(key, shift)
    searching = claiming & (key != EMPTY)
    claimed = searching & (key == EMPTY)
    while any_of(searching):
        at = entries + 16 * slot
        there = tl.load(int64_at(at), searching, 0)
        is_free = searching & (there == EMPTY)
        if any_of(is_free):
            swapped = tl.atomic_cas(
                int64_at(tl.where(is_free, at, dummy)),
                key * 0 + EMPTY,
                tl.where(is_free, key, EMPTY),
                sem="relaxed",
            )
            claimed = claimed | (is_free & (swapped == EMPTY))
            there = tl.where(is_free, swapped, there)
        done = searching & ((there == key) | (there == EMPTY))
        entry = tl.where(done, at, entry)
        searching = searching & (done == 0)
        slot = (slot + 1) & (capacity - 1)
    return entry, claimed


@device_function
def own_ids(segments, num_segments, LANES: tl.constexpr):
    """Return what a program handles: its chunk and segment, and the positions of its ids.

    Returns:
        The program's number, the address of its segment, the position of each lane, and which lanes
        have one.
    """
    chunk = tl.program_id(0).to(tl.int64)
    segment = line_of(segments, num_segments, STAGED_SEGMENT_BYTES, SEGMENT_FIRST_CHUNK, chunk)
    first = field(segment, SEGMENT_START) + (chunk - field(segment, SEGMENT_FIRST_CHUNK)) * LANES
    position = first + tl.arange(0, LANES)
    return chunk, segment, position, position < field(segment, SEGMENT_END)


@device_function
def is_missing(rows, position, inside):
    """Tell which positions of a lookup have an id that is to be inserted."""
    return tl.load(int64_at(rows + 8 * position), inside, 0) == MISSING


@device_function
def ids_at(segment, position, mask):
    """Load the ids at some positions of a segment."""
    return tl.load(int64_at(field(segment, SEGMENT_IDS) + 8 * position), mask, 0)


class _Split(NamedTuple):
    """Split of segments of some sizes into programs, whatever ids and tables they have."""

    lines: np.ndarray  # int64 [num_segments, STAGED_SEGMENT_SIZE], the contract's fields empty
    num_programs: int
    sizes: np.ndarray  # int64 [num_segments]
    ids_per_table: list


@functools.lru_cache(64)
def _split(starts, num_ids, segment_tables, num_tables):
    starts = np.frombuffer(starts, np.int64)
    lines = np.zeros((len(starts), STAGED_SEGMENT_SIZE.value), np.int64)
    lines[:, SEGMENT_END.value] = np.append(starts[1:], num_ids)
    sizes = lines[:, SEGMENT_END.value] - starts
    chunks = np.maximum(-(-sizes // LANES), 1)
    lines[:, SEGMENT_END_CHUNK.value] = np.cumsum(chunks)
    lines[:, SEGMENT_FIRST_CHUNK.value] = lines[:, SEGMENT_END_CHUNK.value] - chunks
    lines[:, SEGMENT_TABLE.value] = segment_tables
    last = {table: i for i, table in enumerate(segment_tables)}
    lines[list(last.values()), SEGMENT_IS_LAST.value] = 1
    return _Split(lines, int(chunks.sum()), sizes, _add_up(sizes, segment_tables, num_tables))


def _add_up(sizes, segment_tables, num_tables):
    owners = np.array(segment_tables, np.int64)
    return np.bincount(owners, sizes, num_tables).astype(np.int64).tolist()


class StagedSegments:
    """Segments of a lookup as kernels read them.

    Attributes:
        where: Address of int64 [num_segments, STAGED_SEGMENT_SIZE] on the device, and num_segments.
        num_programs: Programs that they are split into.
        ids_to_insert: For each table, how many ids, known and unknown, it may have to insert.
    """

    def __init__(self, segments, num_ids, device, tables=(), segment_tables=()):
        starts = np.ascontiguousarray(segments[:, fields.SEGMENT_START]).tobytes()
        segment_tables = tuple(segment_tables) or (0,) * len(segments)
        split = _split(starts, num_ids, segment_tables, len(tables))
        lines = split.lines.copy()
        lines[:, : segments.shape[1]] = segments
        if tables:
            steps = [table.header.fields.item(fields.STEP) for table in tables]
            lines[:, SEGMENT_STEP.value] = [steps[table] for table in segment_tables]
        inserts = segments[:, fields.SEGMENT_FLAGS] & fields.INSERT
        self.num_programs, self.ids_to_insert = split.num_programs, split.ids_per_table
        if not inserts.all():
            sizes = np.where(inserts, split.sizes, 0)
            self.ids_to_insert = _add_up(sizes, segment_tables, len(tables))
        self._lines = stage(lines, device)
        self.where = (self._lines.data_ptr(), len(lines))


class _LastStaged(threading.local):
    """Segments that ``find_or_insert`` staged last, for later ops of the same lookup."""

    key = staged = None


_last = _LastStaged()


def stage_lookup(segments, num_ids, device, tables, segment_tables):
    """Stage the segments of a lookup, and keep them for later ops on the same segments."""
    staged = StagedSegments(segments, num_ids, device, tables, segment_tables)
    _last.key, _last.staged = (segments.tobytes(), num_ids, device), staged
    return staged


def staged_segments(segments, num_ids, device):
    """Return staged segments: those staged last, if they are the same ones."""
    if _last.key == (segments.tobytes(), num_ids, device):
        return _last.staged
    return StagedSegments(segments, num_ids, device)
