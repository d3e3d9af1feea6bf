"""Access metadata of rows in Numba: how often and when training lookups read them."""

from __future__ import annotations

from recis_lightning.ops.cpu.intrinsics import atomic_add, load_i64, prefetch, store_i64
from recis_lightning.ops.cpu.probe import (
    AHEAD,
    CHUNK,
    SEGMENT_BYTES,
    segment_at,
    segment_start,
)
from recis_lightning.ops.cpu.runtime import kernel
from recis_lightning.ops.layout import COUNTS, LAST_TIME, SEGMENT_FLAGS, SEGMENT_HEADER, TIME, TOUCH


@kernel
def _stamp_kernel(low, high, num_items, rows, weights, segments, num_segments):
    start, index = low, segment_at(segments, num_segments, low)
    while start < high:
        segment = segments + index * SEGMENT_BYTES
        index += 1
        end = min(segment_start(segments, index, num_segments, num_items), high)
        if load_i64(segment + 8 * SEGMENT_FLAGS) & TOUCH:
            header = load_i64(segment + 8 * SEGMENT_HEADER)
            counts, times = load_i64(header + 8 * COUNTS), load_i64(header + 8 * LAST_TIME)
            now = load_i64(header + 8 * TIME)
            for i in range(start, end):
                if counts and i + AHEAD < end:
                    prefetch(counts + 8 * load_i64(rows + 8 * (i + AHEAD)))
                row = load_i64(rows + 8 * i)
                if row < 0:
                    continue
                if counts:
                    if weights:
                        atomic_add(counts + 8 * row, load_i64(weights + 8 * i))
                    else:
                        atomic_add(counts + 8 * row, 1)
                if times:
                    store_i64(times + 8 * row, now)
        start = end


def touch_(segments, rows, occurrences):
    _stamp_kernel.launch(
        rows.numel(),
        CHUNK,
        rows=rows,
        weights=occurrences,
        segments=segments,
        num_segments=len(segments),
    )
