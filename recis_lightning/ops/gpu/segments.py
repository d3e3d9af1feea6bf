"""Segments of a lookup on the device, and their split into programs.

A program handles some ids of one segment, one a lane.
"""

import functools
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
            if segments[:, fields.SEGMENT_FLAGS].max(initial=0) >= fields.CHECK_ADMISSION:
                times = [table.header.fields.item(fields.TIME) for table in tables]
                lookups = [table.num_lookups for table in tables]
                lines[:, SEGMENT_TIME.value] = [times[table] for table in segment_tables]
                lines[:, SEGMENT_LOOKUP.value] = [lookups[table] for table in segment_tables]
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


def staged_lookup(segments, num_ids, device):
    """Return the segments of the lookup under way, with what they know of their tables."""
    assert _last.key == (segments.tobytes(), num_ids, device)
    return _last.staged


def staged_segments(segments, num_ids, device):
    """Return staged segments: those staged last, if they are the same ones."""
    if _last.key == (segments.tobytes(), num_ids, device):
        return _last.staged
    return StagedSegments(segments, num_ids, device)


__all__ = [
    "LANES",
    "VARIANT",
    "StagedSegments",
    "ids_at",
    "is_missing",
    "own_ids",
    "stage_lookup",
    "staged_lookup",
    "staged_segments",
]
