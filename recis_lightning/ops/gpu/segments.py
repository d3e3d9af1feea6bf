"""Segments of a lookup on the device, and their split into programs.

A program handles some ids of one segment, one a lane.
"""

import threading
from typing import Any

import numpy as np
import triton.language as tl

from recis_lightning.ops import layout as fields
from recis_lightning.ops.gpu.allowance import Allowance
from recis_lightning.ops.gpu.layout import (
    MISSING,
    SEGMENT_END,
    SEGMENT_END_CHUNK,
    SEGMENT_FIRST_CHUNK,
    SEGMENT_IDS,
    SEGMENT_IS_LAST,
    SEGMENT_LOOKUP,
    SEGMENT_START,
    SEGMENT_STEP,
    SEGMENT_TABLE,
    SEGMENT_TIME,
    STAGED_SEGMENT_BYTES,
    STAGED_SEGMENT_SIZE,
)
from recis_lightning.ops.gpu.runtime import device_function, field, int64_at, lanes, line_of, stage

LANES = lanes(256, 4096)
VARIANT = {"LANES": 256}
# Of kernels that probe: no warp waits for the search of another.
SEARCH_LANES = lanes(64, 4096)
SEARCH = {"LANES": SEARCH_LANES, "PARTS": LANES // SEARCH_LANES}
SEARCH_VARIANT = {"LANES": 64, "PARTS": 4}
SEARCH_WARPS = 1


@device_function
def own_ids(segments, num_segments, LANES: tl.constexpr, PARTS: tl.constexpr = 1):
    """Return what a program handles: its chunk and segment, and the positions of its ids.

    ``PARTS`` programs, numbered one after the other, share a chunk of ``LANES * PARTS`` ids.

    Returns:
        The chunk's number, the address of its segment, the position of each lane, and which lanes
        have one.
    """
    program = tl.program_id(0).to(tl.int64)
    chunk = program // PARTS
    segment = line_of(segments, num_segments, STAGED_SEGMENT_BYTES, SEGMENT_FIRST_CHUNK, chunk)
    part = program - field(segment, SEGMENT_FIRST_CHUNK) * PARTS
    first = field(segment, SEGMENT_START) + part * LANES
    position = first + tl.arange(0, LANES)
    return chunk, segment, position, position < field(segment, SEGMENT_END)


@device_function
def any_missing(segments, num_segments):
    """Tell whether a lookup may have met an id that is to be inserted: else there is no more to do.

    Behind the lines lies a flag, which is cleared when they are sent.
    """
    return field(segments, num_segments * STAGED_SEGMENT_SIZE) != 0


@device_function
def note_missing(segments, num_segments):
    """Set the flag that ``any_missing`` reads in later launches."""
    at = segments + num_segments * STAGED_SEGMENT_BYTES
    tl.store(int64_at(at), num_segments * 0 + 1)


@device_function
def is_missing(rows, position, inside):
    """Tell which positions of a lookup have an id that is to be inserted."""
    return tl.load(int64_at(rows + 8 * position), inside, 0) == MISSING


@device_function
def ids_at(segment, position, mask):
    """Load the ids at some positions of a segment."""
    return tl.load(int64_at(field(segment, SEGMENT_IDS) + 8 * position), mask, 0)


class LookupSplit:
    """Split of a lookup into programs, for all lookups that differ in addresses and times alone.

    Args:
        segments: int64 [num_segments, SEGMENT_SIZE].
        num_ids: n.
        tables: The group's; none for a lookup that inserts nothing.
        segment_tables: For each segment, the index of its table.
        plan: int64 [num_features, PLAN_SIZE] to be sent with them, or None.
        split_plan: Given a plan, returns the first program of each line, and how many there are.

    Attributes:
        allowance: Of these lookups.
        num_programs: Programs that the segments are split into.
        ids_to_insert: For each table, how many ids, known and unknown, it may have to insert.
        has_offsets: Whether any line of the plan has.
        plan_programs: Programs that the plan is split into.
    """

    def __init__(self, segments, num_ids, tables=(), segment_tables=(), plan=None, split_plan=None):
        count = len(segments)
        starts, flags = segments[:, fields.SEGMENT_START], segments[:, fields.SEGMENT_FLAGS]
        self._owners = list(segment_tables) or [0] * count
        lines = np.zeros((count, STAGED_SEGMENT_SIZE.value), np.int64)
        lines[:, : segments.shape[1]] = segments
        lines[:, SEGMENT_END.value] = np.append(starts[1:], num_ids)
        sizes = lines[:, SEGMENT_END.value] - starts
        chunks = np.maximum(-(-sizes // LANES), 1)
        lines[:, SEGMENT_END_CHUNK.value] = np.cumsum(chunks)
        lines[:, SEGMENT_FIRST_CHUNK.value] = lines[:, SEGMENT_END_CHUNK.value] - chunks
        lines[:, SEGMENT_TABLE.value] = self._owners
        last = {table: i for i, table in enumerate(self._owners)}
        lines[list(last.values()), SEGMENT_IS_LAST.value] = 1
        inserted = np.where(flags & fields.INSERT, sizes, 0)
        owners = np.array(self._owners, np.int64)
        self.ids_to_insert = np.bincount(owners, inserted, len(tables)).astype(np.int64).tolist()
        self._has_policies = bool(flags.max(initial=0) >= fields.CHECK_ADMISSION)
        self.num_programs, self.count, self.size = int(chunks.sum()), count, lines.size
        self.allowance = Allowance()
        self._ids = slice(fields.SEGMENT_IDS, self.size, STAGED_SEGMENT_SIZE.value)
        # What is sent: the lines, the flag of ``any_missing``, and the plan.
        flag = int(not tables)  # whether an id may be missing; a lookup finds out
        self._sent = np.append(lines.reshape(-1), flag)
        self._keeps_last_seen = any(table.keeps_last_seen for table in tables)
        self.plan_programs = 0
        if plan is not None:
            self._sent = np.append(self._sent, np.zeros(plan.size, np.int64))
            self._first_chunks, self.plan_programs = split_plan(plan)
            self._row_offsets = 8 * plan[:, fields.PLAN_FIRST_ID]
            self.has_offsets = min(plan[:, fields.PLAN_BAG_LENGTH].tolist(), default=0) < 0

    def point(self, plan, rows):
        """Point the lines of such a plan to rows, int64 [n], and to their first programs."""
        np.add(self._row_offsets, rows.data_ptr(), out=plan[:, fields.PLAN_ROWS])
        plan[:, fields.PLAN_FIRST_CHUNK] = self._first_chunks

    def to_send(self, segments, tables, plan):
        """Return what kernels read of a lookup: lines, flag and plan."""
        sent, size = self._sent.copy(), self.size
        sent[self._ids] = segments[:, fields.SEGMENT_IDS]
        if self._keeps_last_seen:
            self._enter(sent, SEGMENT_STEP, [t.header.fields.item(fields.STEP) for t in tables])
        if self._has_policies and tables:
            self._enter(sent, SEGMENT_TIME, [t.header.fields.item(fields.TIME) for t in tables])
            self._enter(sent, SEGMENT_LOOKUP, [t.num_lookups for t in tables])
        if plan is not None:
            sent[size + 1 :] = plan.reshape(-1)
        return sent

    def _enter(self, sent, field_number, numbers):
        """Enter a number of each table into the lines of its segments."""
        column = slice(field_number.value, self.size, STAGED_SEGMENT_SIZE.value)
        sent[column] = [numbers[table] for table in self._owners]


class StagedSegments:
    """Segments of a lookup as kernels read them.

    Args:
        segments: int64 [num_segments, SEGMENT_SIZE].
        num_ids: n.
        device: Where kernels read them.
        tables: The group's; none for a lookup that inserts nothing.
        plan: int64 [num_features, PLAN_SIZE] to be sent with them, or None.
        split: Of such lookups; None makes it.

    Attributes:
        where: Address of int64 [num_segments, STAGED_SEGMENT_SIZE] and the flag of ``any_missing``
            on the device, and num_segments.
        flag: Address of the flag.
        split: As given.
        num_programs: Programs that they are split into.
        plan: As given.
        plan_address: Address of the plan on the device.
    """

    def __init__(self, segments, num_ids, device, tables=(), plan=None, split=None):
        self.split = split = LookupSplit(segments, num_ids) if split is None else split
        self.num_programs, self.plan = split.num_programs, plan
        self._sent = stage(split.to_send(segments, tables, plan), device)
        address = self._sent.data_ptr()
        self.where = address, split.count
        self.flag = address + 8 * split.size
        self.plan_address = self.flag + 8


class _LastStaged(threading.local):
    """Segments that ``find_or_insert`` staged last, for later ops of the same lookup."""

    segments: Any = None
    num_ids = device = staged = None


_last = _LastStaged()


def stage_lookup(segments, num_ids, device, tables, plan, split):
    """Stage the segments of a lookup, and keep them for later ops on the same segments."""
    staged = StagedSegments(segments, num_ids, device, tables, plan, split)
    _last.segments, _last.num_ids, _last.device, _last.staged = segments, num_ids, device, staged
    return staged


def _is_last(segments, num_ids, device):
    if _last.num_ids != num_ids or _last.device != device:
        return False
    return _last.segments is segments or _last.segments.tobytes() == segments.tobytes()


def staged_lookup(segments, num_ids, device):
    """Return the segments of the lookup under way, with what they know of their tables."""
    assert _is_last(segments, num_ids, device)
    return _last.staged


def staged_segments(segments, num_ids, device):
    """Return staged segments: those staged last, if they are the same ones."""
    if _is_last(segments, num_ids, device):
        return _last.staged
    return StagedSegments(segments, num_ids, device)


def take_staged_plan(plan):
    """Return what was staged with this very plan, and what it is kept in; None if it was not."""
    staged = _last.staged
    if staged is None or staged.plan is not plan:
        return None
    staged.plan = None  # its caller may change it from now on
    return staged


__all__ = [
    "LANES",
    "SEARCH",
    "SEARCH_VARIANT",
    "SEARCH_WARPS",
    "VARIANT",
    "LookupSplit",
    "StagedSegments",
    "any_missing",
    "ids_at",
    "is_missing",
    "note_missing",
    "own_ids",
    "stage_lookup",
    "staged_lookup",
    "staged_segments",
    "take_staged_plan",
]
