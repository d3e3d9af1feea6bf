"""Probing of the index, and the segment of a position.

A search starts at the cache line that the top bits of a mixed hash name, so ids of any pattern
spread, and an index of twice the size has its entries in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from recis_lightning.ops.cpu.intrinsics import (
    compare_and_swap,
    equal_words,
    high_product,
    inlined,
    load_i64,
    lowest_bit,
    prefetch,
)
from recis_lightning.ops.layout import (
    CAPACITY,
    EMPTY,
    ENTRIES,
    LINE_ENTRIES,
    NO_ROW,
    SEGMENT_SIZE,
    SEGMENT_START,
)

CHUNK = 4096  # ids: long enough to hide taking a chunk, short enough to even out threads
AHEAD = 32  # ids between prefetch and use, a power of two
LINE_KEYS = 0b01010101  # which of a line's words are keys
assert LINE_ENTRIES == 4
SEGMENT_BYTES = 8 * SEGMENT_SIZE
_MIX_1 = np.uint64(0x9E3779B97F4A7C15)
_MIX_2 = np.uint64(0xD6E8FEB86659FD93)
_U32 = np.uint64(32)


class Index(NamedTuple):
    """Index that a header describes."""

    entries: int  # address
    capacity: int


@inlined
def index_of(header):
    """Return the index of a table or of an admission counter."""
    return Index(load_i64(header + 8 * ENTRIES), load_i64(header + 8 * CAPACITY))


@inlined
def _mix(key):
    mixed = np.uint64(key) * _MIX_1
    mixed ^= mixed >> _U32
    return mixed * _MIX_2


@inlined
def slot_of(key, capacity):
    """Return the slot where the search for ``key`` starts, of any capacity of whole lines."""
    return np.int64(high_product(_mix(key), np.uint64(capacity))) & -LINE_ENTRIES


@inlined
def slot_at_shift(key, shift):
    """Return what ``slot_of`` does where the capacity is a power of two, ``2 ** (64 - shift)``."""
    return np.int64(_mix(key) >> np.uint64(shift)) & -LINE_ENTRIES


@inlined
def prefetch_key(key, index):
    """Prefetch the line where the search for ``key`` starts."""
    prefetch(index.entries + 16 * slot_of(key, index.capacity))


@inlined
def find_row(key, index):
    """Return the row of an id, ``NO_ROW`` where it has none.

    Where in its line an id stands is chance, and a search entry by entry is mispredicted every
    other time: all of a line is compared at once.
    """
    if key == EMPTY:
        return load_i64(index.entries + 16 * index.capacity + 8)
    slot = slot_of(key, index.capacity)
    while True:
        line = index.entries + 16 * slot
        hits = equal_words(line, key) & LINE_KEYS
        if hits:
            return load_i64(line + 8 * lowest_bit(hits) + 8)
        if equal_words(line, EMPTY) & LINE_KEYS:
            return np.int64(NO_ROW)
        slot += LINE_ENTRIES
        if slot == index.capacity:
            slot = np.int64(0)


@inlined
def find_slot(key, index):
    """Return the slot of an id, or the empty one that ends its search."""
    if key == EMPTY:
        return index.capacity
    slot = slot_of(key, index.capacity)
    while True:
        stored = load_i64(index.entries + 16 * slot)
        if stored in (key, EMPTY):
            return slot
        slot += 1
        if slot == index.capacity:
            slot = np.int64(0)


@inlined
def claim_slot(key, index):
    """Return the slot of an id, claiming an empty one where it has none, and whether it did.

    Any number of threads may claim at once. The index has an empty entry.
    """
    if key == EMPTY:
        return index.capacity, False
    slot = slot_of(key, index.capacity)
    while True:
        stored = load_i64(index.entries + 16 * slot)
        if stored == EMPTY:
            stored = compare_and_swap(index.entries + 16 * slot, EMPTY, key)
            if stored == EMPTY:
                return slot, True
        if stored == key:
            return slot, False
        slot += 1
        if slot == index.capacity:
            slot = np.int64(0)


@inlined
def segment_start(segments, segment, num_segments, num_ids):
    """Return where a segment's ids start; ``num_ids`` past the last one."""
    if segment >= num_segments:
        return num_ids
    return load_i64(segments + segment * SEGMENT_BYTES + 8 * SEGMENT_START)


@inlined
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


@inlined
def next_segment(position, segment, segments, num_segments, num_ids):
    """Return the segment that holds ``position``, from ``segment`` on, and where its ids end.

    For ascending positions: an early ``segment`` costs a step for each one in between.
    """
    end = segment_start(segments, segment + 1, num_segments, num_ids)
    while position >= end:
        segment += 1
        end = segment_start(segments, segment + 1, num_segments, num_ids)
    return segment, end
