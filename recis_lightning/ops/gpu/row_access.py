"""Notes of training lookups on rows in Triton."""

import triton.language as tl

from recis_lightning.ops import layout as fields
from recis_lightning.ops.gpu.probe import (
    FIRST_CHUNK,
    FLAGS,
    HEADER,
    LANES,
    LINE_BYTES,
    VARIANT,
    positions_of,
    staged_segments,
)
from recis_lightning.ops.gpu.runtime import field, int64_at, kernel, line_of

COUNTS = tl.constexpr(fields.COUNTS)
LAST_TIME = tl.constexpr(fields.LAST_TIME)
TIME = tl.constexpr(fields.TIME)
STAMP = tl.constexpr(fields.STAMP)


@kernel({**VARIANT, "WEIGHTED": True}, {**VARIANT, "WEIGHTED": False})
def _stamp_kernel(
    segments: tl.int64,
    num_segments: tl.int64,
    rows: tl.int64,
    weights: tl.int64,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    line = line_of(segments, num_segments, LINE_BYTES, FIRST_CHUNK, chunk)
    if (field(line, FLAGS) & STAMP) != 0:
        header = field(line, HEADER)
        position, inside = positions_of(line, chunk, LANES)
        row = tl.load(int64_at(rows + 8 * position), inside, -1)
        known = row >= 0
        counts, times = field(header, COUNTS), field(header, LAST_TIME)
        weight = position * 0 + 1
        if WEIGHTED:
            weight = tl.load(int64_at(weights + 8 * position), inside, 0)
        if counts != 0:
            tl.atomic_add(int64_at(counts + 8 * row), weight, known, sem="relaxed")
        if times != 0:
            tl.store(int64_at(times + 8 * row), row * 0 + field(header, TIME), known)


def stamp_(segments, rows, sightings):
    """See the contract."""
    staged = staged_segments(segments, rows.numel(), rows.device)
    _stamp_kernel.launch(
        rows.device,
        staged.num_programs,
        *staged.where,
        rows.data_ptr(),
        0 if sightings is None else sightings.data_ptr(),
        WEIGHTED=sightings is not None,
        LANES=LANES,
    )


__all__ = ["stamp_"]
