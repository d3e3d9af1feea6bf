"""Admission checks in plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from recis_lightning.ops import layout as fields
from recis_lightning.ops.hash_index import Segments
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import NO_ROW, UNKNOWN
from recis_lightning.ops.reference.index import (
    Index,
    Segment,
    mix,
    segments_of,
    shift_right,
    signed,
)
from recis_lightning.ops.reference.storage import header_at, memory
from recis_lightning.ops.shard_hash import shard_hash

_SECOND_HASH = signed(0x9E3779B97F4A7C15)
_DRAW_KEY = signed(0xD1B54A32D192ED03)


def check_(
    segments: Segments, num_ids: int, misses: Tensor, rows: Tensor, occurrences: Tensor | None
) -> None:
    # All ids are counted before the first one is admitted.
    given = (
        torch.ones(num_ids, dtype=torch.int64, device="cpu") if occurrences is None else occurrences
    )
    for segment, positions in _checked(segments, num_ids, misses):
        counter, ids = _counter_of(segment), segment.ids[positions - segment.start]
        if counter[fields.ADMISSION_KIND] == fields.COUNT:
            _count(counter, ids, given[positions])
        elif counter[fields.ADMISSION_KIND] == fields.SKETCH:
            _add_to_sketch(counter, ids, given[positions])
    for segment, positions in _checked(segments, num_ids, misses):
        counter, ids = _counter_of(segment), segment.ids[positions - segment.start]
        if counter[fields.ADMISSION_KIND] == fields.COUNT:
            counts = Index.of(counter).rows(ids) & fields.COUNT_MASK
        elif counter[fields.ADMISSION_KIND] == fields.SKETCH:
            counts = _sketch(counter)[_sketch_cells(counter, ids)].long().min(0).values
        else:
            key = mix(segment.header[fields.INIT_KEY] ^ _DRAW_KEY)
            bits = mix(mix(ids ^ key) ^ counter[fields.ADMISSION_NUM_LOOKUPS])
            # Admitted where the draw is below the threshold: turned into a count that reaches it.
            drawn = shift_right(bits, 11) < counter[fields.ADMISSION_THRESHOLD]
            counts = torch.where(drawn, counter[fields.ADMISSION_THRESHOLD], -1)
        rejected = positions[counts < counter[fields.ADMISSION_THRESHOLD]]
        rows[rejected] = UNKNOWN
        segment.header[fields.NUM_REJECTED] += given[rejected].sum()


def forget_(counter: Header, ids: Tensor) -> None:
    index = Index.of(counter.tensor)
    slots = index.slots(ids)
    index.entries[slots[index.entries[slots, 0] == ids], 1] = NO_ROW


def _checked(segments: Segments, num_ids: int, misses: Tensor) -> Iterator[tuple[Segment, Tensor]]:
    """Yield each segment whose policy checks ids, with its misses, if it has any."""
    for segment in segments_of(segments, num_ids):
        end = segment.start + segment.ids.numel()
        positions = misses[(misses >= segment.start) & (misses < end)]
        if segment.has_check and positions.numel():
            yield segment, positions


def _counter_of(segment: Segment) -> Tensor:
    return header_at(int(segment.header[fields.ADMISSION_COUNTER]))


def _count(counter: Tensor, ids: Tensor, occurrences: Tensor) -> None:
    now, wanted = counter[fields.ADMISSION_NUM_LOOKUPS], counter[fields.ADMISSION_THRESHOLD]
    ids, inverse = torch.unique(ids, return_inverse=True)
    added = torch.zeros_like(ids).index_add_(0, inverse, occurrences)
    index = Index.of(counter)
    first = ids[index.entries[index.slots(ids), 0] != ids]
    index.add(first, torch.full_like(first, NO_ROW))
    # The last entry holds the key of its id from the start, so that id is never among the first.
    counter[fields.NUM_IDS] += first.numel()
    slots = index.slots(ids)
    before = index.entries[slots, 1]
    last, counts = before >> 32, before & fields.COUNT_MASK
    is_void = (
        (before == NO_ROW)
        | (counts >= wanted)
        | (now - last > counter[fields.ADMISSION_FORGET_AFTER])
    )
    this_lookup = (before != NO_ROW) & (last == now)
    counts = torch.where(is_void & ~this_lookup, 0, counts)
    if counter[fields.ADMISSION_PER_BATCH]:
        added = torch.where(this_lookup, 0, 1)
    index.entries[slots, 1] = (now << 32) | (counts + added).clamp(max=wanted)


def _add_to_sketch(counter: Tensor, ids: Tensor, occurrences: Tensor) -> None:
    sketch = _sketch(counter)
    added = torch.zeros(sketch.numel(), dtype=torch.int64, device="cpu")
    for cells in _sketch_cells(counter, ids):
        added.index_add_(0, cells, occurrences)
    sketch.copy_((sketch + added).clamp(max=fields.MAX_COUNTER))
    num_blocks = int(counter[fields.ADMISSION_NUM_BLOCKS])
    in_blocks = memory(int(counter[fields.ADMISSION_ADDED]), num_blocks, torch.int64)
    in_blocks.index_add_(0, shard_hash(ids) % num_blocks, occurrences)


def _sketch(counter: Tensor) -> Tensor:
    sizes = fields.ADMISSION_NUM_BLOCKS, fields.ADMISSION_NUM_HASHES, fields.ADMISSION_WIDTH
    count = math.prod(int(counter[size]) for size in sizes)
    return memory(int(counter[fields.ADMISSION_COUNTERS]), count, torch.uint8)


def _sketch_cells(counter: Tensor, ids: Tensor) -> Tensor:
    """Return the indices of each id's bytes in the sketch, int64 [num_hashes, n]."""
    width = int(counter[fields.ADMISSION_WIDTH])
    first = mix(ids)
    second = mix(first ^ _SECOND_HASH)
    num_hashes = int(counter[fields.ADMISSION_NUM_HASHES])
    hashes = torch.arange(num_hashes, device="cpu")[:, None]
    block = shard_hash(ids) % int(counter[fields.ADMISSION_NUM_BLOCKS])
    column = shift_right(shift_right(first + hashes * second, 32) * width, 32)
    return (block * num_hashes + hashes) * width + column
