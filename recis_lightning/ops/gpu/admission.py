"""Admission in Triton: sight all misses, then judge each of them."""

import torch
import triton.language as tl

from recis_lightning.ops import layout as fields
from recis_lightning.ops.gpu.probe import (
    EMPTY,
    FIRST_CHUNK,
    FLAGS,
    HEADER,
    IDS,
    LANES,
    LINE_BYTES,
    MISSING,
    NO_ROW,
    UNKNOWN,
    VARIANT,
    positions_of,
    slot_of,
    staged_segments,
)
from recis_lightning.ops.gpu.row_init import mix
from recis_lightning.ops.gpu.runtime import (
    CAPACITY,
    ENTRIES,
    SHIFT,
    any_of,
    device_function,
    field,
    int64_at,
    kernel,
    line_of,
    num_programs_at_once,
    sum_over,
)

INIT_KEY = tl.constexpr(fields.INIT_KEY)
NUM_IDS = tl.constexpr(fields.NUM_IDS)
NUM_REFUSED = tl.constexpr(fields.NUM_REFUSED)
SCREEN = tl.constexpr(fields.SCREEN)
SIGHTINGS = tl.constexpr(fields.SIGHTINGS)
KIND = tl.constexpr(fields.ADMISSION_KIND)
THRESHOLD = tl.constexpr(fields.ADMISSION_THRESHOLD)
NUM_LOOKUPS = tl.constexpr(fields.ADMISSION_NUM_LOOKUPS)
FORGET_AFTER = tl.constexpr(fields.ADMISSION_FORGET_AFTER)
PER_BATCH = tl.constexpr(fields.ADMISSION_PER_BATCH)
COUNTERS = tl.constexpr(fields.ADMISSION_COUNTERS)
WIDTH = tl.constexpr(fields.ADMISSION_WIDTH)
NUM_HASHES = tl.constexpr(fields.ADMISSION_NUM_HASHES)
NUM_COUNTED = tl.constexpr(fields.ADMISSION_NUM_COUNTED)
COUNT = tl.constexpr(fields.COUNT)
SKETCH = tl.constexpr(fields.SKETCH)
COUNT_MASK = tl.constexpr(fields.COUNT_MASK)
MAX_COUNTER = tl.constexpr(fields.MAX_COUNTER)
_SECOND_HASH = tl.constexpr(0x9E3779B97F4A7C15)
_DRAW_KEY = tl.constexpr(0xD1B54A32D192ED03)


@device_function
def _place_of(memory, key, asked, own):
    """Return each id's entry, claiming an empty one where it is absent; idle lanes get ``own``."""
    entries, shift, capacity = (
        field(memory, ENTRIES),
        field(memory, SHIFT),
        field(memory, CAPACITY),
    )
    place = tl.where(asked, entries + 16 * (capacity + key * 0), own)
    slot = slot_of(key, shift)
    searching = asked & (key != EMPTY)
    while any_of(searching):
        at = entries + 16 * slot
        there = tl.load(int64_at(at), searching, 0)
        wants = searching & (there == EMPTY)
        if any_of(wants):
            # A compare-and-swap has no mask: idle lanes swap a place of their own.
            got = tl.atomic_cas(
                int64_at(tl.where(wants, at, own)),
                key * 0 + EMPTY,
                tl.where(wants, key, EMPTY),
                sem="relaxed",
            )
            there = tl.where(wants, got, there)
            claimed = wants & (got == EMPTY)
            number = sum_over(claimed.to(tl.int64), 0)
            if number != 0:
                tl.atomic_add(int64_at(memory + 8 * NUM_IDS), number, sem="relaxed")
        done = searching & ((there == key) | (there == EMPTY))
        place = tl.where(done, at, place)
        searching = searching & (done == 0)
        slot = (slot + 1) & (capacity - 1)
    return place


@device_function
def _add_sightings(memory, cell, weight, adding, own):
    """Add to entries' counts, from 0 if what they say is void, up to the threshold."""
    now, wanted = field(memory, NUM_LOOKUPS), field(memory, THRESHOLD)
    forget_after, per_batch = field(memory, FORGET_AFTER), field(memory, PER_BATCH) != 0
    before = tl.load(int64_at(cell), adding, NO_ROW)
    while any_of(adding):
        last, count = before >> 32, before & COUNT_MASK
        now_too = (before != NO_ROW) & (last == now)
        void = (count >= wanted) | (now - last > forget_after)
        count = tl.where((before == NO_ROW) | (void & (now_too == 0)), 0, count)
        after = (now << 32) | tl.minimum(count + weight, wanted)
        after = tl.where(per_batch, tl.where(now_too, before, after), after)
        adding = adding & (after != before)
        if any_of(adding):
            got = tl.atomic_cas(
                int64_at(tl.where(adding, cell, own)),
                tl.where(adding, before, EMPTY),
                tl.where(adding, after, EMPTY),
                sem="relaxed",
            )
            adding = adding & (got != before)
            before = tl.where(adding, got, before)


@device_function
def _counter_of(memory, first, number):
    """Return the address of the counter of ids, whose first hash is ``first``."""
    width = field(memory, WIDTH)
    second = mix(first ^ _SECOND_HASH)
    high = (first + number.to(tl.uint64) * second) >> 32
    index = (high * width.to(tl.uint64)) >> 32
    return field(memory, COUNTERS) + number * width + index.to(tl.int64)


@device_function
def _add_to_counters(memory, first, weight, adding, own):
    """Add to the bytes of a sketch, by compare-and-swap of the word around each."""
    number = field(memory, NUM_HASHES) * 0
    while number < field(memory, NUM_HASHES):
        cell = _counter_of(memory, first, number)
        number += 1
        word = cell & -4
        shift = ((cell & 3) * 8).to(tl.int32)
        waiting = adding
        before = tl.load(word.to(tl.pointer_type(tl.int32)), waiting, 0)
        while any_of(waiting):
            count = (before >> shift) & 255
            sum_now = tl.minimum(count.to(tl.int64) + weight, MAX_COUNTER).to(tl.int32)
            after = (before & ~(255 << shift)) | (sum_now << shift)
            waiting = waiting & (after != before)
            if any_of(waiting):
                got = tl.atomic_cas(
                    tl.where(waiting, word, own).to(tl.pointer_type(tl.int32)),
                    tl.where(waiting, before, 0),
                    tl.where(waiting, after, 0),
                    sem="relaxed",
                )
                waiting = waiting & (got != before)
                before = tl.where(waiting, got, before)


@kernel({**VARIANT, "WEIGHTED": True}, {**VARIANT, "WEIGHTED": False})
def _sight_kernel(
    segments: tl.int64,
    num_segments: tl.int64,
    rows: tl.int64,
    places: tl.int64,
    weights: tl.int64,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    line = line_of(segments, num_segments, LINE_BYTES, FIRST_CHUNK, chunk)
    position, inside = positions_of(line, chunk, LANES)
    asked = tl.load(int64_at(rows + 8 * position), inside, 0) == MISSING
    if ((field(line, FLAGS) & SCREEN) != 0) & any_of(asked):
        memory = field(field(line, HEADER), SIGHTINGS)
        key = tl.load(int64_at(field(line, IDS) + 8 * position), asked, 0)
        own = places + 8 * position
        weight = position * 0 + 1
        if WEIGHTED:
            weight = tl.load(int64_at(weights + 8 * position), asked, 0)
        kind = field(memory, KIND)
        if kind == COUNT:
            place = _place_of(memory, key, asked, own)
            counted = tl.where(field(memory, PER_BATCH) != 0, 1, weight)
            _add_sightings(memory, place + 8, counted, asked, own)
            tl.store(int64_at(own), place, asked)
        if kind == SKETCH:
            first = mix(key.to(tl.uint64, bitcast=True))
            _add_to_counters(memory, first, weight, asked, own)
            added = sum_over(tl.where(asked, weight, 0), 0)
            tl.atomic_add(int64_at(memory + 8 * NUM_COUNTED), added, sem="relaxed")


@kernel({**VARIANT, "WEIGHTED": True}, {**VARIANT, "WEIGHTED": False})
def _judge_kernel(
    segments: tl.int64,
    num_segments: tl.int64,
    rows: tl.int64,
    places: tl.int64,
    weights: tl.int64,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    line = line_of(segments, num_segments, LINE_BYTES, FIRST_CHUNK, chunk)
    position, inside = positions_of(line, chunk, LANES)
    asked = tl.load(int64_at(rows + 8 * position), inside, 0) == MISSING
    if ((field(line, FLAGS) & SCREEN) != 0) & any_of(asked):
        header = field(line, HEADER)
        memory = field(header, SIGHTINGS)
        kind, wanted = field(memory, KIND), field(memory, THRESHOLD)
        key = tl.load(int64_at(field(line, IDS) + 8 * position), asked, 0)
        first = mix(key.to(tl.uint64, bitcast=True))
        count = position * 0
        if kind == COUNT:
            place = tl.load(int64_at(places + 8 * position), asked, 0)
            count = tl.load(int64_at(place + 8), asked, 0) & COUNT_MASK
        elif kind == SKETCH:
            count = position * 0 + MAX_COUNTER
            number = field(memory, NUM_HASHES) * 0
            while number < field(memory, NUM_HASHES):
                cell = _counter_of(memory, first, number)
                number += 1
                byte = tl.load(cell.to(tl.pointer_type(tl.uint8)), asked, 0)
                count = tl.minimum(count, byte.to(tl.int64))
        else:
            its_key = mix(field(header, INIT_KEY).to(tl.uint64, bitcast=True) ^ _DRAW_KEY)
            now = field(memory, NUM_LOOKUPS).to(tl.uint64, bitcast=True)
            bits = mix(mix(key.to(tl.uint64, bitcast=True) ^ its_key) ^ now)
            count = tl.where((bits >> 11).to(tl.int64) < wanted, wanted, -1)
        refused = asked & (count < wanted)
        tl.store(int64_at(rows + 8 * position), position * 0 + UNKNOWN, refused)
        weight = position * 0 + 1
        if WEIGHTED:
            weight = tl.load(int64_at(weights + 8 * position), asked, 0)
        total = sum_over(tl.where(refused, weight, 0), 0)
        if total != 0:
            tl.atomic_add(int64_at(header + 8 * NUM_REFUSED), total, sem="relaxed")


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
    slot = tl.where(key == EMPTY, capacity, slot_of(key, position * 0 + shift))
    looking = inside
    found = position < 0
    place = entries + 16 * slot
    while any_of(looking):
        at = entries + 16 * slot
        there = tl.load(int64_at(at), looking, EMPTY)
        hit = looking & (there == key)
        place = tl.where(hit, at, place)
        found = found | hit
        looking = looking & (hit == 0) & (there != EMPTY)
        slot = (slot + 1) & (capacity - 1)
    tl.store(int64_at(place + 8), position * 0 + NO_ROW, found)


@kernel(VARIANT)
def _fade_kernel(
    memory: tl.int64, counters: tl.int64, num_words: tl.int64, window: tl.int64, LANES: tl.constexpr
):
    if field(memory, NUM_COUNTED) >= window:
        stride = tl.num_programs(0).to(tl.int64) * LANES
        first = tl.program_id(0).to(tl.int64) * LANES
        while first < num_words:
            place = first + tl.arange(0, LANES)
            word = (counters + 4 * place).to(tl.pointer_type(tl.int32))
            four = tl.load(word, place < num_words, 0)
            tl.store(word, (four >> 1) & 0x7F7F7F7F, place < num_words)  # four bytes, each halved
            first += stride


@kernel({})
def _restart_kernel(memory: tl.int64, window: tl.int64):
    if field(memory, NUM_COUNTED) >= window:
        tl.store(int64_at(memory + 8 * NUM_COUNTED), window * 0)


def fade_(memory, counters, window):
    """See the contract; whether it is due, the device decides."""
    num_words = counters.numel() // 4
    programs = min(-(-num_words // LANES), num_programs_at_once(memory.device))
    where = (memory.address, counters.data_ptr(), num_words, window)
    _fade_kernel.launch(memory.device, programs, *where, LANES=LANES)
    _restart_kernel.launch(memory.device, 1, memory.address, window)  # when all have seen it


def screen(segments, num_ids, misses, rows, weights):
    """See ``admission.screening``; a program looks for the misses among its positions itself."""
    staged = staged_segments(segments, num_ids, rows.device)
    places = torch.zeros(num_ids + LANES, dtype=torch.int64, device=rows.device)
    where = (*staged.where, rows.data_ptr(), places.data_ptr())
    where += (0 if weights is None else weights.data_ptr(),)
    constants = {"WEIGHTED": weights is not None, "LANES": LANES}
    _sight_kernel.launch(rows.device, staged.num_programs, *where, **constants)
    _judge_kernel.launch(rows.device, staged.num_programs, *where, **constants)


def forget_(memory, ids):
    """See the contract."""
    values = memory.fields
    numbers = [int(values[f]) for f in (fields.ENTRIES, fields.SHIFT, fields.CAPACITY)]
    programs = -(-ids.numel() // LANES)
    _forget_kernel.launch(ids.device, programs, *numbers, ids.data_ptr(), ids.numel(), LANES=LANES)


__all__ = ["fade_", "forget_", "screen"]
