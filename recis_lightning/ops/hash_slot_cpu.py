"""What the index kernels share: the slot of an id, the segment of a position, the launch.

A slot is the top bits of a mixed hash, so ids of any pattern spread, and an index of twice the size
has its entries in the same order.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from recis_lightning.ops.intrinsics_cpu import load_i64, prefetch
from recis_lightning.ops.parallel_cpu import num_chunks
from recis_lightning.ops.table_header import EMPTY, NO_ROW, SEGMENT_SIZE, SEGMENT_START

CHUNK = 4096  # ids a ticket: long enough to hide the ticket, short enough to even out
AHEAD = 24  # ids between prefetch and use
LOOK = 8  # of them, ids between a look at the first line of a search and its end
ELSEWHERE = -4  # what such a look finds where the id is not in that line
_LINE_ENTRIES = 4
SEGMENT_BYTES = 8 * SEGMENT_SIZE
_MIX_1 = np.uint64(0x9E3779B97F4A7C15)
_MIX_2 = np.uint64(0xD6E8FEB86659FD93)
_U32 = np.uint64(32)


@njit
def slot_of(key, shift):
    """Return the slot where the search for ``key`` starts."""
    mixed = np.uint64(key) * _MIX_1
    mixed ^= mixed >> _U32
    mixed *= _MIX_2
    return np.int64(mixed >> np.uint64(shift))


@njit
def find_row(key, entries, shift, capacity):
    """Return the row of an id, ``NO_ROW`` where it has none."""
    slot = slot_of(key, shift)
    while True:
        there = load_i64(entries + 16 * slot)
        if there == key:
            row = load_i64(entries + 16 * slot + 8)
            break
        if there == EMPTY:
            row = np.int64(NO_ROW)
            break
        slot = (slot + 1) & (capacity - 1)
    if row == NO_ROW and key == EMPTY:  # it was sought, and found, among empty entries
        row = load_i64(entries + 16 * capacity + 8)
    return row


@njit
def look_at_home(key, entries, shift):
    """Return an id's row if it stands in the line where its search starts, else ``ELSEWHERE``.

    Most do, but where in the line is chance: a search entry by entry is mispredicted every other
    time. So all of the line is compared, without a branch; an id is in the index once. Where the
    search goes on, the next line is asked for.
    """
    line = entries + 16 * (slot_of(key, shift) & -_LINE_ENTRIES)
    hit, found = np.int64(0), load_i64(line) == key
    for entry in range(1, _LINE_ENTRIES):
        here = load_i64(line + 16 * entry) == key
        hit = np.int64(entry) if here else hit
        found |= here
    row = load_i64(line + 16 * hit + 8)
    # The id that marks empty entries "stands" in one of them.
    row = row if found and row != NO_ROW else np.int64(ELSEWHERE)
    prefetch(line + 64 if row == ELSEWHERE else line)
    return row


@njit
def segment_start(segments, segment, num_segments, num_ids):
    """Return where a segment's ids start; ``num_ids`` past the last one."""
    if segment >= num_segments:
        return num_ids
    return load_i64(segments + segment * SEGMENT_BYTES + 8 * SEGMENT_START)


@njit
def segment_at(segments, num_segments, position):
    """Return the last segment that starts at or before ``position``."""
    low, high = 0, num_segments
    while high - low > 1:
        middle = (low + high) >> 1
        if load_i64(segments + middle * SEGMENT_BYTES + 8 * SEGMENT_START) <= position:
            low = middle
        else:
            high = middle
    return low


def launch(kernel, n, chunk_size, *args):
    """Run a kernel over ``n`` items in chunks; its arguments begin with chunk size and n."""
    kernel.launch(num_chunks(n, chunk_size), chunk_size, n, *args)
