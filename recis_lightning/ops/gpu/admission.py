"""Admission checks in Triton: one kernel counts all misses, a second one admits or rejects them."""

import torch
import triton.language as tl

from recis_lightning.ops import layout as fields
from recis_lightning.ops.gpu.duplicates import acting, added_up, of_acting
from recis_lightning.ops.gpu.layout import (
    ADMISSION_ADDED,
    ADMISSION_COUNTER,
    ADMISSION_COUNTERS,
    ADMISSION_FORGET_AFTER,
    ADMISSION_KIND,
    ADMISSION_NUM_BLOCKS,
    ADMISSION_NUM_HASHES,
    ADMISSION_PER_BATCH,
    ADMISSION_THRESHOLD,
    ADMISSION_WIDTH,
    CAPACITY,
    CHECK_ADMISSION,
    COUNT,
    COUNT_MASK,
    EMPTY,
    ENTRIES,
    INIT_KEY,
    MAX_COUNTER,
    NO_ROW,
    NUM_IDS,
    NUM_REJECTED,
    SEGMENT_FLAGS,
    SEGMENT_HEADER,
    SEGMENT_LOOKUP,
    SHIFT,
    SKETCH,
    UNKNOWN,
)
from recis_lightning.ops.gpu.probe import claim_slot, find_entry, report_full
from recis_lightning.ops.gpu.row_init import mix
from recis_lightning.ops.gpu.runtime import (
    any_of,
    device_function,
    field,
    int64_at,
    kernel,
    num_programs_at_once,
    sum_over,
)
from recis_lightning.ops.gpu.segments import (
    LANES,
    SEARCH,
    SEARCH_VARIANT,
    SEARCH_WARPS,
    VARIANT,
    any_missing,
    ids_at,
    is_missing,
    own_ids,
    staged_lookup,
)

_SECOND_HASH = tl.constexpr(0x9E3779B97F4A7C15)
_DRAW_KEY = tl.constexpr(0xD1B54A32D192ED03)
_SHARD_1 = tl.constexpr(0xFF51AFD7ED558CCD)
_SHARD_2 = tl.constexpr(0xC4CEB9FE1A85EC53)


@device_function
def _count_entry_of(counter, key, asked, dummy):
    """Return each id's count entry, claiming one where the id has none, and which ids have one."""
    entries, shift, capacity = (
        field(counter, ENTRIES),
        field(counter, SHIFT),
        field(counter, CAPACITY),
    )
    entry, claimed = claim_slot(entries, shift, capacity, key, asked, dummy)
    num_claimed = sum_over(claimed.to(tl.int64), 0)
    if num_claimed != 0:
        tl.atomic_add(int64_at(counter + 8 * NUM_IDS), num_claimed, sem="relaxed")
    return entry, report_full(counter, entry, asked)


@device_function
def _add_to_counts(counter, now, cell, occurrences, adding, dummy):
    """Add to entries' counts, from 0 if they are void, up to the threshold."""
    wanted = field(counter, ADMISSION_THRESHOLD)
    forget_after = field(counter, ADMISSION_FORGET_AFTER)
    per_batch = field(counter, ADMISSION_PER_BATCH) != 0
    before = tl.load(int64_at(cell), adding, NO_ROW)
    while any_of(adding):
        last, count = before >> 32, before & COUNT_MASK
        is_counted_now = (before != NO_ROW) & (last == now)
        is_void = (count >= wanted) | (now - last > forget_after)
        count = tl.where((before == NO_ROW) | (is_void & (is_counted_now == 0)), 0, count)
        after = (now << 32) | tl.minimum(count + occurrences, wanted)
        after = tl.where(per_batch, tl.where(is_counted_now, before, after), after)
        adding = adding & (after != before)
        if any_of(adding):
            swapped = tl.atomic_cas(
                int64_at(tl.where(adding, cell, dummy)),
                tl.where(adding, before, EMPTY),
                tl.where(adding, after, EMPTY),
                sem="relaxed",
            )
            adding = adding & (swapped != before)
            before = tl.where(adding, swapped, before)


@device_function
def _block_of(counter, key):
    """Return each id's block of the sketch: ``ops.shard_hash`` modulo their number."""
    bits = key.to(tl.uint64, bitcast=True)
    bits = (bits ^ (bits >> 33)) * _SHARD_1
    bits = (bits ^ (bits >> 33)) * _SHARD_2
    num_blocks = field(counter, ADMISSION_NUM_BLOCKS).to(tl.uint32)
    return ((bits >> 33).to(tl.uint32) % num_blocks).to(tl.int64)  # 31 bits: no division of 64


@device_function
def _sketch_cell(counter, block, first, i):
    """Return the address of a byte of a block: that of hash ``i``; ``first`` is hash 0."""
    width = field(counter, ADMISSION_WIDTH)
    second = mix(first ^ _SECOND_HASH)
    high = (first + i.to(tl.uint64) * second) >> 32
    column = (high * width.to(tl.uint64)) >> 32
    line = block * field(counter, ADMISSION_NUM_HASHES) + i
    return field(counter, ADMISSION_COUNTERS) + line * width + column.to(tl.int64)


@device_function
def _add_to_sketch(counter, block, first, occurrences, adding, dummy):
    """Add to the bytes of a sketch, by compare-and-swap of the word around each."""
    i = field(counter, ADMISSION_NUM_HASHES) * 0
    while i < field(counter, ADMISSION_NUM_HASHES):
        cell = _sketch_cell(counter, block, first, i)
        i += 1
        word = cell & -4
        shift = ((cell & 3) * 8).to(tl.int32)
        waiting = adding
        before = tl.load(word.to(tl.pointer_type(tl.int32)), waiting, 0)
        while any_of(waiting):
            count = (before >> shift) & 255
            total = tl.minimum(count.to(tl.int64) + occurrences, MAX_COUNTER).to(tl.int32)
            after = (before & ~(255 << shift)) | (total << shift)
            waiting = waiting & (after != before)
            if any_of(waiting):
                swapped = tl.atomic_cas(
                    tl.where(waiting, word, dummy).to(tl.pointer_type(tl.int32)),
                    tl.where(waiting, before, 0),
                    tl.where(waiting, after, 0),
                    sem="relaxed",
                )
                waiting = waiting & (swapped != before)
                before = tl.where(waiting, swapped, before)


@device_function
def _checked_ids(segments, num_segments, rows, LANES: tl.constexpr, PARTS: tl.constexpr = 1):
    """Return a program's segment, positions, which of them miss, and whether to check these."""
    _, segment, position, inside = own_ids(segments, num_segments, LANES, PARTS)
    missing = is_missing(rows, position, inside)
    has_check = (field(segment, SEGMENT_FLAGS) & CHECK_ADMISSION) != 0
    return segment, position, missing, has_check & any_of(missing)


@device_function
def _occurrences_at(occurrences, position, mask, WEIGHTED: tl.constexpr):
    """Return how many occurrences each position stands for."""
    count = position * 0 + 1
    if WEIGHTED:
        count = tl.load(int64_at(occurrences + 8 * position), mask, 0)
    return count


@kernel(
    {**SEARCH_VARIANT, "WEIGHTED": True},
    {**SEARCH_VARIANT, "WEIGHTED": False},
    num_warps=SEARCH_WARPS,
)
def _count_kernel(
    segments: tl.int64,
    num_segments: tl.int64,
    rows: tl.int64,
    slots: tl.int64,
    occurrences: tl.int64,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
):
    if any_missing(segments, num_segments):
        segment, position, missing, checks = _checked_ids(
            segments, num_segments, rows, LANES, PARTS
        )
        if checks:
            counter = field(field(segment, SEGMENT_HEADER), ADMISSION_COUNTER)
            key = ids_at(segment, position, missing)
            slot = slots + 8 * position
            kind = field(counter, ADMISSION_KIND)
            # Counts stop at the threshold, so sums of occurrences may be added in their place.
            acts = acting(key, missing, LANES)
            added = _occurrences_at(occurrences, position, missing, WEIGHTED)
            added = added_up(key, added, missing, LANES)
            if kind == COUNT:
                entry, placed = _count_entry_of(counter, key, acts, slot)
                counted = tl.where(field(counter, ADMISSION_PER_BATCH) != 0, 1, added)
                now = field(segment, SEGMENT_LOOKUP)
                _add_to_counts(counter, now, entry + 8, counted, placed, slot)
                tl.store(int64_at(slot), of_acting(key, entry, missing, LANES), missing)
            if kind == SKETCH:
                first = mix(key.to(tl.uint64, bitcast=True))
                block = _block_of(counter, key)
                _add_to_sketch(counter, block, first, added, acts, slot)
                in_block = int64_at(field(counter, ADMISSION_ADDED) + 8 * block)
                tl.atomic_add(in_block, added, acts, sem="relaxed")


@kernel({**VARIANT, "WEIGHTED": True}, {**VARIANT, "WEIGHTED": False})
def _admit_kernel(
    segments: tl.int64,
    num_segments: tl.int64,
    rows: tl.int64,
    slots: tl.int64,
    occurrences: tl.int64,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
):
    if any_missing(segments, num_segments):
        segment, position, missing, checks = _checked_ids(segments, num_segments, rows, LANES)
        if checks:
            header = field(segment, SEGMENT_HEADER)
            counter = field(header, ADMISSION_COUNTER)
            kind, wanted = field(counter, ADMISSION_KIND), field(counter, ADMISSION_THRESHOLD)
            key = ids_at(segment, position, missing)
            first = mix(key.to(tl.uint64, bitcast=True))
            count = position * 0
            if kind == COUNT:
                entry = tl.load(int64_at(slots + 8 * position), missing, 0)
                count = tl.load(int64_at(entry + 8), entry != 0, 0) & COUNT_MASK
            elif kind == SKETCH:
                count = position * 0 + MAX_COUNTER
                block = _block_of(counter, key)
                i = field(counter, ADMISSION_NUM_HASHES) * 0
                while i < field(counter, ADMISSION_NUM_HASHES):
                    cell = _sketch_cell(counter, block, first, i)
                    i += 1
                    byte = tl.load(cell.to(tl.pointer_type(tl.uint8)), missing, 0)
                    count = tl.minimum(count, byte.to(tl.int64))
            else:
                table_key = mix(field(header, INIT_KEY).to(tl.uint64, bitcast=True) ^ _DRAW_KEY)
                now = field(segment, SEGMENT_LOOKUP).to(tl.uint64, bitcast=True)
                bits = mix(mix(key.to(tl.uint64, bitcast=True) ^ table_key) ^ now)
                count = tl.where((bits >> 11).to(tl.int64) < wanted, wanted, -1)
            rejected = missing & (count < wanted)
            tl.store(int64_at(rows + 8 * position), position * 0 + UNKNOWN, rejected)
            added = _occurrences_at(occurrences, position, missing, WEIGHTED)
            total = sum_over(tl.where(rejected, added, 0), 0)
            if total != 0:
                tl.atomic_add(int64_at(header + 8 * NUM_REJECTED), total, sem="relaxed")


@kernel(VARIANT)
def _forget_kernel(
    entries: tl.int64,
    shift: tl.int64,
    capacity: tl.int64,
    ids: tl.int64,
    num_ids: tl.int64,
    LANES: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = position < num_ids
    key = tl.load(int64_at(ids + 8 * position), inside, 0)
    entry, count = find_entry(entries, position * 0 + shift, capacity, key, inside)
    tl.store(int64_at(entry + 8), position * 0 + NO_ROW, count != NO_ROW)


@kernel(VARIANT)
def _decay_kernel(
    sketch: tl.int64,
    added: tl.int64,
    num_blocks: tl.int64,
    block_bytes: tl.int64,
    window: tl.int64,
    LANES: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    while block < num_blocks:
        cell = added + 8 * block
        if tl.load(int64_at(cell)) >= window:
            first = block * 0
            while first < block_bytes:
                i = first + tl.arange(0, LANES)
                byte = (sketch + block * block_bytes + i).to(tl.pointer_type(tl.uint8))
                tl.store(byte, tl.load(byte, i < block_bytes, 0) >> 1, i < block_bytes)
                first += LANES
            tl.debug_barrier()
            tl.store(int64_at(cell), window * 0)
        block += tl.num_programs(0)


def decay_(sketch, added, window):
    # The device decides which blocks are due; a block is read and written by one program alone.
    num_blocks = added.numel()
    programs = min(num_blocks, num_programs_at_once(sketch.device))
    where = (sketch.data_ptr(), added.data_ptr(), num_blocks, sketch[0].numel(), window)
    _decay_kernel.launch(sketch.device, programs, *where, LANES=LANES)


def check_(segments, num_ids, misses, rows, occurrences):
    # A program finds the misses among its positions itself.
    staged = staged_lookup(segments, num_ids, rows.device)
    slots = torch.zeros(num_ids + LANES, dtype=torch.int64, device=rows.device)
    where = (*staged.where, rows.data_ptr(), slots.data_ptr())
    where += (0 if occurrences is None else occurrences.data_ptr(),)
    weighted = occurrences is not None
    programs = staged.num_programs * SEARCH["PARTS"]
    _count_kernel.launch(rows.device, programs, *where, WEIGHTED=weighted, **SEARCH)
    _admit_kernel.launch(rows.device, staged.num_programs, *where, WEIGHTED=weighted, LANES=LANES)


def forget_(counter, ids):
    values = counter.fields
    index = [int(values[f]) for f in (fields.ENTRIES, fields.SHIFT, fields.CAPACITY)]
    programs = -(-ids.numel() // LANES)
    _forget_kernel.launch(ids.device, programs, *index, ids.data_ptr(), ids.numel(), LANES=LANES)


__all__ = ["check_", "decay_", "forget_"]
