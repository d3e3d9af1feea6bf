"""What the index kernels share: the slot of an id, and how segments are split into programs.

A program handles some ids of one segment, one a lane, so the table's header is read once a program
and lanes differ only in how far they probe.
"""

import functools
import threading
from typing import NamedTuple

import numpy as np
import triton.language as tl

from recis_lightning.ops import layout as fields
from recis_lightning.ops.gpu.runtime import (
    CAPACITY,
    ENTRIES,
    SHIFT,
    any_of,
    device_function,
    field,
    int64_at,
    lanes,
    stage,
)

# A segment on the device: the contract's fields, and how the work is split.
_LINE_SIZE = 16
LINE_BYTES = tl.constexpr(8 * _LINE_SIZE)
START = tl.constexpr(fields.SEGMENT_START)
HEADER = tl.constexpr(fields.SEGMENT_HEADER)
FLAGS = tl.constexpr(fields.SEGMENT_FLAGS)
PADDING_IDX = tl.constexpr(fields.SEGMENT_PADDING)
IDS = tl.constexpr(fields.SEGMENT_IDS)
_END, _FIRST_CHUNK, _END_CHUNK, _TABLE, _STEP, _IS_LAST = range(8, 14)
END = tl.constexpr(_END)  # position behind its last id
FIRST_CHUNK = tl.constexpr(_FIRST_CHUNK)  # its first program
END_CHUNK = tl.constexpr(_END_CHUNK)  # behind its last program
TABLE = tl.constexpr(_TABLE)  # which of the call's tables it asks
STEP = tl.constexpr(_STEP)  # what rows are stamped with
IS_LAST = tl.constexpr(_IS_LAST)  # whether no later segment asks the table

LINE_ENTRIES = tl.constexpr(fields.LINE_ENTRIES)
EMPTY = tl.constexpr(fields.EMPTY)
NO_ROW = tl.constexpr(fields.NO_ROW)
CLAIMED = tl.constexpr(fields.CLAIMED)
UNKNOWN = tl.constexpr(fields.UNKNOWN)
PADDING = tl.constexpr(fields.PADDING)
MISSING = tl.constexpr(fields.MISSING)
HAS_PADDING = tl.constexpr(fields.HAS_PADDING)
INSERT = tl.constexpr(fields.INSERT)
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
def row_of(header, key, looking):
    """Return the row field of each id's entry; NO_ROW where there is none, or a lane is idle."""
    entries, shift, capacity = field(header, ENTRIES), field(header, SHIFT), field(header, CAPACITY)
    slot = tl.where(key == EMPTY, capacity, slot_of(key, shift))
    row = key * 0 + NO_ROW
    while any_of(looking):
        place = entries + 16 * slot
        there = tl.load(int64_at(place), looking, EMPTY)
        its_row = tl.load(int64_at(place + 8), looking, NO_ROW)  # together: one wait
        hit = looking & (there == key)
        row = tl.where(hit, its_row, row)
        looking = looking & (hit == 0) & (there != EMPTY)
        slot = (slot + 1) & (capacity - 1)
    return row


@device_function
def positions_of(line, chunk, LANES: tl.constexpr):
    """Return the positions of a program's ids, and which lanes have one."""
    first = field(line, START) + (chunk - field(line, FIRST_CHUNK)) * LANES
    position = first + tl.arange(0, LANES)
    return position, position < field(line, END)


class _Split(NamedTuple):
    """How segments of some sizes are split, whatever ids and tables they have."""

    lines: np.ndarray  # int64 [num_segments, 16], the contract's fields empty
    num_programs: int
    sizes: np.ndarray  # int64 [num_segments]
    per_table: list  # ids that each table is asked for


@functools.lru_cache(64)
def _split(starts, num_ids, segment_tables, num_tables):
    starts = np.frombuffer(starts, np.int64)
    lines = np.zeros((len(starts), _LINE_SIZE), np.int64)
    lines[:, _END] = np.append(starts[1:], num_ids)
    sizes = lines[:, _END] - starts
    chunks = np.maximum(-(-sizes // LANES), 1)
    lines[:, _END_CHUNK] = np.cumsum(chunks)
    lines[:, _FIRST_CHUNK] = lines[:, _END_CHUNK] - chunks
    lines[:, _TABLE] = segment_tables
    last = {table: number for number, table in enumerate(segment_tables)}
    lines[list(last.values()), _IS_LAST] = 1
    return _Split(lines, int(chunks.sum()), sizes, _add_up(sizes, segment_tables, num_tables))


def _add_up(sizes, segment_tables, num_tables):
    owners = np.array(segment_tables, np.int64)
    return np.bincount(owners, sizes, num_tables).astype(np.int64).tolist()


class StagedSegments:
    """The segments of a lookup as kernels read them.

    Attributes:
        where: Address of int64 [num_segments, 16] on the device, and num_segments.
        num_programs: How many programs have a part of them.
        ids_to_insert: How many ids, known and unknown, each table may have to insert.
    """

    def __init__(self, segments, num_ids, device, tables=(), segment_tables=()):
        starts = np.ascontiguousarray(segments[:, fields.SEGMENT_START]).tobytes()
        segment_tables = tuple(segment_tables) or (0,) * len(segments)
        split = _split(starts, num_ids, segment_tables, len(tables))
        lines = split.lines.copy()
        lines[:, : segments.shape[1]] = segments
        if tables:
            steps = [table.header.fields.item(fields.STEP) for table in tables]
            lines[:, _STEP] = [steps[table] for table in segment_tables]
        inserts = segments[:, fields.SEGMENT_FLAGS] & fields.INSERT
        self.num_programs, self.ids_to_insert = split.num_programs, split.per_table
        if not inserts.all():
            sizes = np.where(inserts, split.sizes, 0)
            self.ids_to_insert = _add_up(sizes, segment_tables, len(tables))
        self._lines = stage(lines, device)
        self.where = (self._lines.data_ptr(), len(lines))


class _LookupUnderWay(threading.local):
    """What ``find_or_insert`` has staged last, for the ops that follow it in the same lookup."""

    key = staged = None


_under_way = _LookupUnderWay()


def stage_lookup(segments, num_ids, device, tables, segment_tables):
    """Stage the segments of a lookup that other ops on the same segments follow."""
    staged = StagedSegments(segments, num_ids, device, tables, segment_tables)
    _under_way.key, _under_way.staged = (segments.tobytes(), num_ids, device), staged
    return staged


def staged_segments(segments, num_ids, device):
    """Return segments staged: those of the lookup under way, if they say the same."""
    if _under_way.key == (segments.tobytes(), num_ids, device):
        return _under_way.staged
    return StagedSegments(segments, num_ids, device)
