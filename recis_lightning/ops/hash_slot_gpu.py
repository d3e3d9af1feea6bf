"""What the index kernels share: the slot of an id, and how segments are split into programs.

A program handles some ids of one segment, one a lane, so the table's header is read once a program
and lanes differ only in how far they probe.
"""

import numpy as np
import triton.language as tl

from recis_lightning.ops import table_header as fields
from recis_lightning.ops.launch_gpu import (
    CAPACITY,
    ENTRIES,
    SHIFT,
    any_of,
    device_function,
    field,
    int64_at,
    lanes,
)
from recis_lightning.ops.split_header import host_fields

# A segment on the device: the contract's fields, and how the work is split.
_LINE_SIZE = 16
LINE_BYTES = tl.constexpr(8 * _LINE_SIZE)
START = tl.constexpr(fields.SEGMENT_START)
HEADER = tl.constexpr(fields.SEGMENT_HEADER)
FLAGS = tl.constexpr(fields.SEGMENT_FLAGS)
PADDING_IDX = tl.constexpr(fields.SEGMENT_PADDING)
IDS = tl.constexpr(fields.SEGMENT_IDS)
_END, _FIRST_CHUNK, _TABLE, _STEP, _IS_LAST = 8, 9, 10, 11, 12
END = tl.constexpr(_END)  # position behind its last id
FIRST_CHUNK = tl.constexpr(_FIRST_CHUNK)  # its first program
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


def split_segments(segments, num_ids, tables=(), segment_tables=()):
    """Return lines for the kernels, int64 [num_segments, 16], and the number of programs."""
    lines = np.zeros((len(segments), _LINE_SIZE), np.int64)
    lines[:, : segments.shape[1]] = segments
    starts = segments[:, fields.SEGMENT_START]
    lines[:, _END] = np.append(starts[1:], num_ids)
    chunks = np.maximum(-(-(lines[:, _END] - starts) // LANES), 1)
    lines[:, _FIRST_CHUNK] = np.cumsum(chunks) - chunks
    if tables:
        lines[:, _TABLE] = segment_tables
        steps = [host_fields(table.header)[fields.STEP] for table in tables]
        lines[:, _STEP] = np.array(steps)[segment_tables]
        last = {table: number for number, table in enumerate(segment_tables)}
        lines[list(last.values()), _IS_LAST] = 1
    return lines, int(chunks.sum())


def ids_to_insert(lines, num_tables):
    """Return how many ids, known and unknown, each table may have to insert."""
    sizes = lines[:, _END] - lines[:, fields.SEGMENT_START]
    sizes = np.where(lines[:, fields.SEGMENT_FLAGS] & fields.INSERT, sizes, 0)
    return np.bincount(lines[:, _TABLE], sizes, num_tables).astype(np.int64)
