"""What the index kernels share: the slot of an id, the segment of a position, the launch.

A search starts at the cache line that the top bits of a mixed hash name, so ids of any pattern
spread, and an index of twice the size has its entries in the same order.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from recis_lightning.ops.cpu.intrinsics import equal_words, load_i64, lowest_bit
from recis_lightning.ops.cpu.runtime import num_chunks
from recis_lightning.ops.layout import EMPTY, LINE_ENTRIES, NO_ROW, SEGMENT_SIZE, SEGMENT_START

CHUNK = 4096  # ids a ticket: long enough to hide the ticket, short enough to even out
AHEAD = 32  # ids between prefetch and use, a power of two
LINE_KEYS = 0b01010101  # which of a line's words are keys
assert LINE_ENTRIES == 4
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
    return np.int64(mixed >> np.uint64(shift)) & -LINE_ENTRIES


@njit
def find_row(key, entries, shift, capacity):
    """Return the row of an id, ``NO_ROW`` where it has none.

    Where in its line an id stands is chance, and a search entry by entry is mispredicted every
    other time: all of a line is compared at once.
    """
    if key == EMPTY:
        return load_i64(entries + 16 * capacity + 8)
    slot = slot_of(key, shift)
    while True:
        line = entries + 16 * slot
        hits = equal_words(line, key) & LINE_KEYS
        if hits:
            return load_i64(line + 8 * lowest_bit(hits) + 8)
        if equal_words(line, EMPTY) & LINE_KEYS:
            return np.int64(NO_ROW)
        slot = (slot + LINE_ENTRIES) & (capacity - 1)


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
