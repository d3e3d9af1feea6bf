"""Access metadata of rows in Triton."""

import triton.language as tl

from recis_lightning.ops.gpu.layout import (
    COUNTS,
    LAST_TIME,
    SEGMENT_FLAGS,
    SEGMENT_HEADER,
    SEGMENT_TIME,
    TOUCH,
)
from recis_lightning.ops.gpu.runtime import field, int64_at, kernel
from recis_lightning.ops.gpu.segments import LANES, VARIANT, own_ids, staged_lookup


@kernel({**VARIANT, "WEIGHTED": True}, {**VARIANT, "WEIGHTED": False})
def _touch_kernel(
    segments: tl.int64,
    num_segments: tl.int64,
    rows: tl.int64,
    occurrences: tl.int64,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
):
    _, segment, position, inside = own_ids(segments, num_segments, LANES)
    if (field(segment, SEGMENT_FLAGS) & TOUCH) != 0:
        header = field(segment, SEGMENT_HEADER)
        row = tl.load(int64_at(rows + 8 * position), inside, -1)
        known = row >= 0
        counts, times = field(header, COUNTS), field(header, LAST_TIME)
        added = position * 0 + 1
        if WEIGHTED:
            added = tl.load(int64_at(occurrences + 8 * position), inside, 0)
        if counts != 0:
            tl.atomic_add(int64_at(counts + 8 * row), added, known, sem="relaxed")
        if times != 0:
            tl.store(int64_at(times + 8 * row), row * 0 + field(segment, SEGMENT_TIME), known)


def touch_(segments, rows, occurrences):
    if not rows.numel():
        return
    staged = staged_lookup(segments, rows.numel(), rows.device)
    _touch_kernel.launch(
        rows.device,
        staged.num_programs,
        *staged.where,
        rows.data_ptr(),
        0 if occurrences is None else occurrences.data_ptr(),
        WEIGHTED=occurrences is not None,
        LANES=LANES,
    )


__all__ = ["touch_"]
