"""Admission in plain torch."""

from __future__ import annotations

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

_SECOND_HASH = signed(0x9E3779B97F4A7C15)
_DRAW_KEY = signed(0xD1B54A32D192ED03)


def screen(
    segments: Segments, num_ids: int, misses: Tensor, rows: Tensor, weights: Tensor | None
) -> None:
    """See ``admission.screening``: first everything is sighted, then everything is judged."""
    given = torch.ones(num_ids, dtype=torch.int64) if weights is None else weights
    for segment, mine in _screened(segments, num_ids, misses):
        sighted, ids = _memory_of(segment), segment.ids[mine - segment.start]
        if sighted[fields.ADMISSION_KIND] == fields.COUNT:
            _count(sighted, ids, given[mine])
        elif sighted[fields.ADMISSION_KIND] == fields.SKETCH:
            _sketch(sighted, ids, given[mine])
    for segment, mine in _screened(segments, num_ids, misses):
        sighted, ids = _memory_of(segment), segment.ids[mine - segment.start]
        if sighted[fields.ADMISSION_KIND] == fields.COUNT:
            counts = Index.of(sighted).rows(ids) & fields.COUNT_MASK
        elif sighted[fields.ADMISSION_KIND] == fields.SKETCH:
            counts = _counters(sighted)[_cells(sighted, ids)].long().min(0).values
        else:
            key = mix(segment.header[fields.INIT_KEY] ^ _DRAW_KEY)
            bits = mix(mix(ids ^ key) ^ sighted[fields.ADMISSION_NUM_LOOKUPS])
            # Admitted where the draw is below the threshold: turned into a count that reaches it.
            drawn = shift_right(bits, 11) < sighted[fields.ADMISSION_THRESHOLD]
            counts = torch.where(drawn, sighted[fields.ADMISSION_THRESHOLD], -1)
        refused = mine[counts < sighted[fields.ADMISSION_THRESHOLD]]
        rows[refused] = UNKNOWN
        segment.header[fields.NUM_REFUSED] += given[refused].sum()


def forget_(memory: Header, ids: Tensor) -> None:
    """See ``admission.forget_``."""
    index = Index.of(memory.tensor)
    slots = index.slots(ids)
    index.entries[slots[index.entries[slots, 0] == ids], 1] = NO_ROW


def _screened(segments: Segments, num_ids: int, misses: Tensor) -> Iterator[tuple[Segment, Tensor]]:
    for segment in segments_of(segments, num_ids):
        end = segment.start + segment.ids.numel()
        mine = misses[(misses >= segment.start) & (misses < end)]
        if segment.screens and mine.numel():
            yield segment, mine


def _memory_of(segment: Segment) -> Tensor:
    return header_at(int(segment.header[fields.SIGHTINGS]))


def _count(sighted: Tensor, ids: Tensor, weights: Tensor) -> None:
    now, wanted = sighted[fields.ADMISSION_NUM_LOOKUPS], sighted[fields.ADMISSION_THRESHOLD]
    ids, inverse = torch.unique(ids, return_inverse=True)
    added = torch.zeros_like(ids).index_add_(0, inverse, weights)
    index = Index.of(sighted)
    first = ids[index.entries[index.slots(ids), 0] != ids]
    index.add(first, torch.full_like(first, NO_ROW))
    # The extra entry has the key of its id from the start, so it is never a first one.
    sighted[fields.NUM_IDS] += first.numel()
    slots = index.slots(ids)
    before = index.entries[slots, 1]
    last, counts = before >> 32, before & fields.COUNT_MASK
    void = (
        (before == NO_ROW)
        | (counts >= wanted)
        | (now - last > sighted[fields.ADMISSION_FORGET_AFTER])
    )
    this_lookup = (before != NO_ROW) & (last == now)
    counts = torch.where(void & ~this_lookup, 0, counts)
    if sighted[fields.ADMISSION_PER_BATCH]:
        added = torch.where(this_lookup, 0, 1)
    index.entries[slots, 1] = (now << 32) | (counts + added).clamp(max=wanted)


def _sketch(sighted: Tensor, ids: Tensor, weights: Tensor) -> None:
    counters = _counters(sighted)
    added = torch.zeros(counters.numel(), dtype=torch.int64)
    for cells in _cells(sighted, ids):
        added.index_add_(0, cells, weights)
    counters.copy_((counters + added).clamp(max=fields.MAX_COUNTER))
    sighted[fields.ADMISSION_NUM_COUNTED] += weights.sum()


def _counters(sighted: Tensor) -> Tensor:
    count = int(sighted[fields.ADMISSION_WIDTH] * sighted[fields.ADMISSION_NUM_HASHES])
    return memory(int(sighted[fields.ADMISSION_COUNTERS]), count, torch.uint8)


def _cells(sighted: Tensor, ids: Tensor) -> Tensor:
    """Return the counters of each id, int64 [num_hashes, n]."""
    width = int(sighted[fields.ADMISSION_WIDTH])
    first = mix(ids)
    second = mix(first ^ _SECOND_HASH)
    hashes = torch.arange(int(sighted[fields.ADMISSION_NUM_HASHES]))[:, None]
    return shift_right(shift_right(first + hashes * second, 32) * width, 32) + hashes * width
