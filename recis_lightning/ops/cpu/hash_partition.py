"""Radix partitioning of very many ids by the region of the index they belong to, stable.

An index that must grow is not cleared before: its old entries are partitioned ahead of the ids, and
all of them into the memory of their own regions, if they fit. Whoever fills a region reads them
from there and clears it. So new memory is faulted in once, and half as much of it passes through
the caches.

Source: Polychroniou and Ross, "A Comprehensive Study of Main-Memory Partitioning and its
Application to Large-Scale Comparison- and Radix-Sort", SIGMOD 2014: a histogram, its prefix sum,
and a scatter through buffers of a cache line that are written past the caches.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from recis_lightning.ops import host_memory
from recis_lightning.ops.cpu.intrinsics import inlined, load_i64, store_i64, stream_line
from recis_lightning.ops.cpu.probe import slot_at_shift
from recis_lightning.ops.cpu.runtime import as_array, kernel
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
_MAX_REGIONS = 1 << 10  # as many streams as a thread can write to at once
_SLICES = 32  # of the ids, each partitioned by one thread


class Target(NamedTuple):
    """Index that ids are inserted into."""

    entries: int  # address
    capacity: int
    shift: int
    is_fresh: bool  # not cleared yet, and without the old index's entries


class Partitions(NamedTuple):
    """Ids with their positions, and old ids with ``~row``, by region."""

    items: npt.NDArray[np.int64] | None  # [n, 2]; None: each region's are in its own memory
    starts: npt.NDArray[np.int64]  # of each region's items
    ends: npt.NDArray[np.int64]
    region_shift: int  # log2(entries of a region)


@inlined
def _append(key, item, region, cursors, starts, items, buffers):
    """Append an id to its region through the region's buffer, a cache line in the core's cache.

    Without ``items`` it is counted only.
    """
    index = load_i64(cursors + 8 * region)
    store_i64(cursors + 8 * region, index + 1)
    if not items:
        return
    buffer, lane = buffers + 64 * region, index & (LINE_ENTRIES - 1)
    store_i64(buffer + 16 * lane, key)
    store_i64(buffer + 16 * lane + 8, item)
    if lane == LINE_ENTRIES - 1:
        line, start = index - lane, load_i64(starts + 8 * region)
        if line >= start:
            stream_line(items + 16 * line, buffer)
        else:  # the line begins with another slice's items
            _flush(buffer, start, index + 1, items)


@inlined
def _flush(buffer, start, end, items):
    """Write a buffer's items from index ``start`` to ``end``."""
    for index in range(start, end):
        source = buffer + 16 * (index & (LINE_ENTRIES - 1))
        store_i64(items + 16 * index, load_i64(source))
        store_i64(items + 16 * index + 8, load_i64(source + 8))


@kernel
def _partition_kernel(
    chunk,
    num_chunks,
    thread,
    old_entries,
    old_capacity,
    num_old_slices,
    segment,
    first,
    num_ids,
    shift,
    region_shift,
    num_regions,
    rows,
    all_cursors,
    all_starts,
    items,
    all_buffers,
):
    # Two passes share it: without items it counts each slice's ids by region, with them it writes.
    # The first slices are of the old index, whose ids come with ~row in place of a position.
    buffers = all_buffers + 64 * num_regions * thread
    cursors = all_cursors + 8 * chunk * num_regions
    starts = all_starts + 8 * chunk * num_regions
    if chunk < num_old_slices:
        for i in range(
            old_capacity * chunk // num_old_slices, old_capacity * (chunk + 1) // num_old_slices
        ):
            key, row = load_i64(old_entries + 16 * i), load_i64(old_entries + 16 * i + 8)
            if row < CLAIMED:
                region = slot_at_shift(key, shift) >> region_shift
                _append(key, ~row, region, cursors, starts, items, buffers)
    else:
        ids = load_i64(segment + 8 * SEGMENT_IDS)
        has_padding = load_i64(segment + 8 * SEGMENT_FLAGS) & HAS_PADDING
        padding = load_i64(segment + 8 * SEGMENT_PADDING)
        index, num_slices = chunk - num_old_slices, num_chunks - num_old_slices
        low, high = num_ids * index // num_slices, num_ids * (index + 1) // num_slices
        for i in range(first + low, first + high):
            key = load_i64(ids + 8 * i)
            if has_padding and key == padding:
                store_i64(rows + 8 * i, PADDING)
                continue
            region = slot_at_shift(key, shift) >> region_shift
            _append(key, i, region, cursors, starts, items, buffers)
    if items:
        for region in range(num_regions):
            end, start = load_i64(cursors + 8 * region), load_i64(starts + 8 * region)
            _flush(buffers + 64 * region, max(start, end & -LINE_ENTRIES), end, items)


def partition(segments, old, index, first, rows):
    """Partition the ids from position ``first`` on, and the old entries if the index is fresh."""
    count, log2_capacity = rows.numel() - first, index.capacity.bit_length() - 1
    region_shift = max(_REGION_SHIFT, log2_capacity + 1 - _MAX_REGIONS.bit_length())
    region_shift = min(region_shift, log2_capacity)
    region_size, num_regions = 1 << region_shift, index.capacity >> region_shift
    old_entries, old_capacity = old
    num_old_slices = min(max(old_capacity >> 16, 1), _SLICES) if index.is_fresh else 0
    counts = np.zeros((num_old_slices + _SLICES, num_regions), np.int64)
    source = {
        "old_entries": old_entries,
        "old_capacity": old_capacity,
        "num_old_slices": num_old_slices,
        "segment": segments,
        "first": first,
        "num_ids": count,
        "shift": index.shift,
        "region_shift": region_shift,
        "num_regions": num_regions,
        "rows": rows,
    }
    _partition_kernel.launch(
        len(counts),
        1,
        **source,
        all_cursors=counts,
        all_starts=None,
        items=None,
        all_buffers=None,
    )
    sizes = counts.sum(0)
    room = region_size - int(sizes.max())
    if index.is_fresh and room >= 0:
        # Not all at their regions' starts, whose addresses share the same few lines of a cache.
        skew = np.arange(num_regions) * LINE_ENTRIES
        skew %= max(room - room % LINE_ENTRIES, LINE_ENTRIES)
        items, starts = None, np.arange(num_regions) * region_size + skew
    else:
        items = host_memory.empty(16 * int(sizes.sum())).view(np.int64).reshape(-1, 2)
        starts = np.cumsum(sizes) - sizes
    slice_starts = starts + np.cumsum(counts, 0) - counts
    _partition_kernel.launch(
        len(counts),
        1,
        **source,
        all_cursors=slice_starts.copy(),
        all_starts=slice_starts,
        items=index.entries if items is None else items,
        all_buffers=host_memory.empty(64 * num_regions * torch.get_num_threads()),
    )
    return Partitions(items, starts, starts + sizes, region_shift)


def all_items(segments, old, first, rows):
    """Return what ``partition`` partitions, in no order of regions."""
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
