"""Segments of a lookup on the device, and their split into programs.

A program handles some ids of one segment, one a lane.
"""

import threading
from typing import NamedTuple

import numpy as np
import triton.language as tl

from recis_lightning.ops import layout as fields
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


class _Split(NamedTuple):
    """Split of segments into programs, for all lookups that differ in addresses and times alone."""

    lines: np.ndarray  # int64 [num_segments, STAGED_SEGMENT_SIZE]
    num_programs: int
    ids_to_insert: list  # for each table, how many ids, known and unknown, may need a row
    has_policies: bool


def _split(segments, num_ids, segment_tables, num_tables):
    starts, flags = segments[:, fields.SEGMENT_START], segments[:, fields.SEGMENT_FLAGS]
    lines = np.zeros((len(segments), STAGED_SEGMENT_SIZE.value), np.int64)
    lines[:, : segments.shape[1]] = segments
    lines[:, SEGMENT_END.value] = np.append(starts[1:], num_ids)
    sizes = lines[:, SEGMENT_END.value] - starts
    chunks = np.maximum(-(-sizes // LANES), 1)
    lines[:, SEGMENT_END_CHUNK.value] = np.cumsum(chunks)
    lines[:, SEGMENT_FIRST_CHUNK.value] = lines[:, SEGMENT_END_CHUNK.value] - chunks
    lines[:, SEGMENT_TABLE.value] = segment_tables
    last = {table: i for i, table in enumerate(segment_tables)}
    lines[list(last.values()), SEGMENT_IS_LAST.value] = 1
    inserted = np.where(flags & fields.INSERT, sizes, 0)
    owners = np.array(segment_tables, np.int64)
    ids_to_insert = np.bincount(owners, inserted, num_tables).astype(np.int64).tolist()
    has_policies = bool(flags.max(initial=0) >= fields.CHECK_ADMISSION)
    return _Split(lines, int(chunks.sum()), ids_to_insert, has_policies)


class StagedSegments:
    """Segments of a lookup as kernels read them.

    Args:
        segments: int64 [num_segments, SEGMENT_SIZE].
        num_ids: n.
        device: Where kernels read them.
        tables: The group's; none for a lookup that inserts nothing.
        segment_tables: For each segment, the index of its table.
        plan: int64 [num_features, PLAN_SIZE] to be sent with them, or None.
        plan_programs: Programs that it is split into.
        kept: As for ``ops.hash_index.find_or_insert``.

    Attributes:
        where: Address of int64 [num_segments, STAGED_SEGMENT_SIZE] and the flag of ``any_missing``
            on the device, and num_segments.
        flag: Address of the flag.
        num_programs: Programs that they are split into.
        ids_to_insert: For each table, how many ids, known and unknown, it may have to insert.
        plan: As given.
        plan_programs: As given.
        plan_address: Address of the plan on the device.
    """

    def __init__(
        self,
        segments,
        num_ids,
        device,
        tables=(),
        segment_tables=(),
        plan=None,
        plan_programs=0,
        kept=None,
    ):
        split = None if kept is None else kept.get("split")
        if split is None:
            owners = segment_tables or [0] * len(segments)
            split = _split(segments, num_ids, owners, len(tables))
            if kept is not None:
                kept["split"] = split
        lines = split.lines
        count, size = len(lines), lines.size
        sent = np.empty(size + 1 + (0 if plan is None else plan.size), np.int64)
        own = sent[:size].reshape(lines.shape)
        own[:] = lines
        own[:, fields.SEGMENT_IDS] = segments[:, fields.SEGMENT_IDS]
        if tables:
            steps = [table.header.fields.item(fields.STEP) for table in tables]
            own[:, SEGMENT_STEP.value] = [steps[table] for table in segment_tables]
            if split.has_policies:
                times = [table.header.fields.item(fields.TIME) for table in tables]
                lookups = [table.num_lookups for table in tables]
                own[:, SEGMENT_TIME.value] = [times[table] for table in segment_tables]
                own[:, SEGMENT_LOOKUP.value] = [lookups[table] for table in segment_tables]
        if plan is not None:
            sent[size + 1 :] = plan.reshape(-1)
        sent[size] = not tables  # whether an id may be missing; a lookup finds out
        self.num_programs, self.ids_to_insert = split.num_programs, split.ids_to_insert
        self._sent = stage(sent, device)
        address = self._sent.data_ptr()
        self.where, self.plan, self.plan_address = (address, count), plan, address + 8 * size + 8
        self.flag = address + 8 * size
        self.plan_programs = plan_programs


class _LastStaged(threading.local):
    """Segments that ``find_or_insert`` staged last, for later ops of the same lookup."""

    key = staged = None


_last = _LastStaged()


def stage_lookup(segments, num_ids, device, tables, segment_tables, *plan_and_kept):
    """Stage the segments of a lookup, and keep them for later ops on the same segments."""
    staged = StagedSegments(segments, num_ids, device, tables, segment_tables, *plan_and_kept)
    _last.key, _last.staged = (segments.tobytes(), num_ids, device), staged
    return staged


def staged_lookup(segments, num_ids, device):
    """Return the segments of the lookup under way, with what they know of their tables."""
    assert _last.key == (segments.tobytes(), num_ids, device)
    return _last.staged


def staged_segments(segments, num_ids, device):
    """Return staged segments: those staged last, if they are the same ones."""
    if _last.key == (segments.tobytes(), num_ids, device):
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
