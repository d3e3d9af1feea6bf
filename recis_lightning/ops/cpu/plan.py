"""Plan of a lookup or an update: its chunks, each some bags of one feature."""

from __future__ import annotations

import ctypes

import numpy as np

from recis_lightning.ops.cpu.intrinsics import inlined, load_f32, load_i64, store_i64
from recis_lightning.ops.cpu.runtime import kernel
from recis_lightning.ops.layout import (
    MEAN,
    MEAN_BY_COUNT,
    NONE,
    PADDING,
    PLAN_BAG_LENGTH,
    PLAN_BAGS_PER_CHUNK,
    PLAN_FIRST_CHUNK,
    PLAN_MODE,
    PLAN_NUM_BAGS,
    PLAN_NUM_IDS,
    PLAN_OFFSETS,
    PLAN_SIZE,
)

PLAN_BYTES = 8 * PLAN_SIZE  # of a feature's line
# Ids a chunk: fewer even out, more start a pipeline of prefetches less often.
_IDS_PER_CHUNK, _MANY_IDS_PER_CHUNK, _MANY_IDS = 1024, 4096, 1 << 16
_F = np.float32


@kernel
def _split_kernel(plan, num_features, num_chunks_out):
    num_ids = np.int64(0)
    for feature in range(num_features):
        num_ids += load_i64(plan + feature * PLAN_BYTES + 8 * PLAN_NUM_IDS)
    chunks = np.int64(0)
    for feature in range(num_features):
        line = plan + feature * PLAN_BYTES
        bags = load_i64(line + 8 * PLAN_NUM_BAGS)
        mean_length = max(load_i64(line + 8 * PLAN_NUM_IDS) // max(bags, 1), 1)
        ids = np.int64(_IDS_PER_CHUNK)
        if num_ids >= _MANY_IDS and load_i64(line + 8 * PLAN_MODE) == NONE:
            ids = np.int64(_MANY_IDS_PER_CHUNK)
        per_chunk = max(ids // mean_length, 1)
        store_i64(line + 8 * PLAN_BAGS_PER_CHUNK, per_chunk)
        store_i64(line + 8 * PLAN_FIRST_CHUNK, chunks)
        # One without bags too: its offsets are checked.
        chunks += max((bags + per_chunk - 1) // per_chunk, 1)
    store_i64(num_chunks_out, chunks)


STEP_KERNELS = (_split_kernel,)  # what a training step runs


def split_plan(plan):
    """Fill the plan's chunk columns; return the number of chunks."""
    chunks = ctypes.c_int64()
    _split_kernel.launch(1, 1, plan=plan, num_features=len(plan), num_chunks_out=chunks)
    return chunks.value


@inlined
def feature_at(plan, num_features, chunk):
    """Return the last feature whose first chunk is at or before ``chunk``."""
    low, high = 0, num_features
    while high - low > 1:
        middle = (low + high) >> 1
        if load_i64(plan + middle * PLAN_BYTES + 8 * PLAN_FIRST_CHUNK) <= chunk:
            low = middle
        else:
            high = middle
    return low


@inlined
def bags_of_chunk(line, chunk):
    """Return the first bag of a chunk and the end of its bags, by its feature's line."""
    per_chunk = load_i64(line + 8 * PLAN_BAGS_PER_CHUNK)
    low = (chunk - load_i64(line + 8 * PLAN_FIRST_CHUNK)) * per_chunk
    return low, min(low + per_chunk, load_i64(line + 8 * PLAN_NUM_BAGS))


@inlined
def bag_start(line, bag):
    """Return a bag's first id, kept inside the feature whatever its offsets say."""
    length = load_i64(line + 8 * PLAN_BAG_LENGTH)
    if length >= 0:
        return bag * length
    start = load_i64(load_i64(line + 8 * PLAN_OFFSETS) + 8 * bag)
    return min(max(start, 0), load_i64(line + 8 * PLAN_NUM_IDS))


@inlined
def bag_divisor(mode, rows, weights, start, end):
    """Return the divisor of a bag's sum: 1, the number of its ids, or the sum of their weights."""
    if mode not in (MEAN, MEAN_BY_COUNT):
        return _F(1)
    is_weighted = weights and mode == MEAN
    divisor = _F(0)
    for i in range(start, end):
        if load_i64(rows + 8 * i) != PADDING:
            divisor += load_f32(weights + 4 * i) if is_weighted else _F(1)
    return divisor
