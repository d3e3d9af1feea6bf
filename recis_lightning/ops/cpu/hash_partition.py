"""Very many ids, dealt out by the region of the index in which they belong, in order of position.

An index that must grow is not cleared before: its old entries are dealt out ahead of the ids, and
all of them into the memory of their own regions, if they fit. Whoever fills a region takes them up
and clears it. So new memory is faulted in once, and half as much of it passes through the caches.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

from recis_lightning.ops import host_memory
from recis_lightning.ops.cpu import runtime
from recis_lightning.ops.cpu.intrinsics import atomic_add, load_i64, store_i64, stream_line
from recis_lightning.ops.cpu.probe import slot_of
from recis_lightning.ops.cpu.runtime import address_of, as_array
from recis_lightning.ops.layout import (
    CLAIMED,
    HAS_PADDING,
    LINE_ENTRIES,
    PADDING,
    SEGMENT_FLAGS,
    SEGMENT_IDS,
    SEGMENT_PADDING,
)

_REGION_SHIFT = 15  # log2(entries of a region): half a megabyte
_MAX_REGIONS = 1 << 10  # as many streams as the deal can write to at once
_PARTS = 32  # of the ids, each dealt out by one thread


class Index(NamedTuple):
    """Where ids are entered."""

    entries: int  # address
    capacity: int
    shift: int
    is_fresh: bool  # not cleared yet, and of the old one nothing is in it


class Dealt(NamedTuple):
    """Ids with their positions, and old ones with ``~row``, by region."""

    items: npt.NDArray[np.int64] | None  # [n, 2]; None: each region's are in its own memory
    starts: npt.NDArray[np.int64]  # of each region's items
    ends: npt.NDArray[np.int64]
    region_shift: int  # log2(entries of a region)


@njit
def _deal_one(key, item, region, cursors, starts, dealt, lines):
    # Items are gathered a line a region in the core's own cache, and written a line at a time.
    place = load_i64(cursors + 8 * region)
    store_i64(cursors + 8 * region, place + 1)
    if not dealt:
        return
    line, number = lines + 64 * region, place & (LINE_ENTRIES - 1)
    store_i64(line + 16 * number, key)
    store_i64(line + 16 * number + 8, item)
    if number == LINE_ENTRIES - 1:
        begin, start = place - number, load_i64(starts + 8 * region)
        if begin >= start:
            stream_line(dealt + 16 * begin, line)
        else:  # the line began with another part's
            _write_items(line, start, place + 1, dealt)


@njit
def _write_items(line, begin, end, dealt):
    for place in range(begin, end):
        item = line + 16 * (place & (LINE_ENTRIES - 1))
        store_i64(dealt + 16 * place, load_i64(item))
        store_i64(dealt + 16 * place + 8, load_i64(item + 8))


@runtime.kernel
def _deal_kernel(args):
    # Two passes share it: with no dealt yet it counts each part's ids by region, then it deals.
    # The first parts are of the old index, whose ids come with ~row in the place of a position.
    old, old_capacity, old_parts = load_i64(args + 16), load_i64(args + 24), load_i64(args + 32)
    segment, first, n = load_i64(args + 40), load_i64(args + 48), load_i64(args + 56)
    shift, region_shift, regions = load_i64(args + 64), load_i64(args + 72), load_i64(args + 80)
    rows, all_cursors, all_starts = load_i64(args + 88), load_i64(args + 96), load_i64(args + 104)
    dealt, lines = load_i64(args + 112), load_i64(args + 120)
    if lines:
        lines += 64 * regions * atomic_add(args + 128, 1)
    parts = load_i64(args + 8)
    new_parts = parts - old_parts
    ids = load_i64(segment + 8 * SEGMENT_IDS)
    has_padding = load_i64(segment + 8 * SEGMENT_FLAGS) & HAS_PADDING
    padding = load_i64(segment + 8 * SEGMENT_PADDING)
    while True:
        part = atomic_add(args, 1)
        if part >= parts:
            break
        cursors, starts = all_cursors + 8 * part * regions, all_starts + 8 * part * regions
        if part < old_parts:
            low, high = (
                old_capacity * part // old_parts,
                old_capacity * (part + 1) // old_parts,
            )
            for i in range(low, high):
                key, row = load_i64(old + 16 * i), load_i64(old + 16 * i + 8)
                if row < CLAIMED:
                    region = slot_of(key, shift) >> region_shift
                    _deal_one(key, ~row, region, cursors, starts, dealt, lines)
        else:
            part -= old_parts
            low, high = first + n * part // new_parts, first + n * (part + 1) // new_parts
            for i in range(low, high):
                key = load_i64(ids + 8 * i)
                if has_padding and key == padding:
                    store_i64(rows + 8 * i, PADDING)
                    continue
                region = slot_of(key, shift) >> region_shift
                _deal_one(key, i, region, cursors, starts, dealt, lines)
        if dealt:
            for region in range(regions):
                end, start = load_i64(cursors + 8 * region), load_i64(starts + 8 * region)
                _write_items(lines + 64 * region, max(start, end & -LINE_ENTRIES), end, dealt)


def deal(segments, old, index, first, rows):
    """Deal out the ids, and the old entries where the index is fresh."""
    count, log2_capacity = rows.numel() - first, index.capacity.bit_length() - 1
    region_shift = max(_REGION_SHIFT, log2_capacity + 1 - _MAX_REGIONS.bit_length())
    region_shift = min(region_shift, log2_capacity)
    region_size, regions = 1 << region_shift, index.capacity >> region_shift
    old_parts = min(max(old[1] >> 16, 1), _PARTS) if index.is_fresh else 0
    counts = np.zeros((old_parts + _PARTS, regions), np.int64)
    where = (*old, old_parts, address_of(segments), first, count, index.shift, region_shift)
    where = (*where, regions, rows.data_ptr())
    _deal_kernel.launch(len(counts), *where, address_of(counts), address_of(counts), 0, 0, 0)
    sizes = counts.sum(0)
    room = region_size - int(sizes.max())
    if index.is_fresh and room >= 0:
        # Not all at their regions' starts, whose addresses share the same few lines of a cache.
        skew = np.arange(regions) * LINE_ENTRIES % max(room - room % LINE_ENTRIES, LINE_ENTRIES)
        items, address = None, index.entries
        starts = np.arange(regions) * region_size + skew
    else:
        items = host_memory.empty(16 * int(sizes.sum())).view(np.int64).reshape(-1, 2)
        address, starts = address_of(items), np.cumsum(sizes) - sizes
    begins = starts + np.cumsum(counts, 0) - counts
    cursors = begins.copy()
    lines = host_memory.empty(64 * regions * torch.get_num_threads())
    _deal_kernel.launch(
        len(counts),
        *where,
        address_of(cursors),
        address_of(begins),
        address,
        address_of(lines),
        0,
    )
    return Dealt(items, starts, starts + sizes, region_shift)


def all_items(segments, old, first, rows):
    """Return what ``deal`` deals out, in no order of regions."""
    count = rows.numel() - first
    ids = as_array(segments[0, SEGMENT_IDS] + 8 * first, count)
    items = np.column_stack([ids, np.arange(first, first + count)])
    if segments[0, SEGMENT_FLAGS] & HAS_PADDING:
        items = items[ids != segments[0, SEGMENT_PADDING]]
    if old is None:
        return items
    address, capacity = old
    entries = as_array(address, 2 * capacity).reshape(-1, 2)
    entries = entries[entries[:, 1] < CLAIMED]
    return np.concatenate([np.column_stack([entries[:, 0], ~entries[:, 1]]), items])
