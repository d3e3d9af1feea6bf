"""Notes of training lookups on rows in Numba."""

from __future__ import annotations

from recis_lightning.ops.cpu import runtime
from recis_lightning.ops.cpu.intrinsics import atomic_add, load_i64, prefetch, store_i64
from recis_lightning.ops.cpu.probe import (
    AHEAD,
    CHUNK,
    SEGMENT_BYTES,
    launch,
    segment_at,
    segment_start,
)
from recis_lightning.ops.cpu.runtime import address_of
from recis_lightning.ops.layout import COUNTS, LAST_TIME, SEGMENT_FLAGS, SEGMENT_HEADER, STAMP, TIME


@runtime.kernel
def _stamp_kernel(args):
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)
    rows, weights = load_i64(args + 32), load_i64(args + 40)
    segments, num_segments = load_i64(args + 48), load_i64(args + 56)
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        i = chunk * chunk_size
        high = min(i + chunk_size, n)
        segment = segment_at(segments, num_segments, i)
        while i < high:
            info = segments + segment * SEGMENT_BYTES
            segment += 1
            end = min(segment_start(segments, segment, num_segments, n), high)
            if load_i64(info + 8 * SEGMENT_FLAGS) & STAMP:
                header = load_i64(info + 8 * SEGMENT_HEADER)
                counts, times = load_i64(header + 8 * COUNTS), load_i64(header + 8 * LAST_TIME)
                now = load_i64(header + 8 * TIME)
                for j in range(i, end):
                    if counts and j + AHEAD < end:
                        prefetch(counts + 8 * load_i64(rows + 8 * (j + AHEAD)))
                    row = load_i64(rows + 8 * j)
                    if row < 0:
                        continue
                    if counts:
                        if weights:
                            atomic_add(counts + 8 * row, load_i64(weights + 8 * j))
                        else:
                            atomic_add(counts + 8 * row, 1)
                    if times:
                        store_i64(times + 8 * row, now)
            i = end


def touch_(segments, rows, sightings):
    """See the contract."""
    launch(
        _stamp_kernel,
        rows.numel(),
        CHUNK,
        rows.data_ptr(),
        0 if sightings is None else sightings.data_ptr(),
        address_of(segments),
        len(segments),
    )
