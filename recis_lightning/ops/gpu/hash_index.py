"""The hash index in Triton: find, find_or_insert and rebuild."""

import torch
import triton.language as tl

from recis_lightning.ops import layout as fields
from recis_lightning.ops.gpu.hash_insert import (
    claim,
    insert_misses,
    make_room,
    note_insertions,
    tables_without_room,
)
from recis_lightning.ops.gpu.probe import (
    CLAIMED,
    EMPTY,
    FIRST_CHUNK,
    FLAGS,
    HAS_PADDING,
    HEADER,
    IDS,
    INSERT,
    LANES,
    LINE_BYTES,
    MISSING,
    NO_ROW,
    PADDING,
    PADDING_IDX,
    STEP,
    UNKNOWN,
    VARIANT,
    StagedSegments,
    positions_of,
    row_of,
    slot_of,
    stage_lookup,
)
from recis_lightning.ops.gpu.runtime import any_of, field, int64_at, kernel, line_of, sum_over

LAST_SEEN = tl.constexpr(fields.LAST_SEEN)
NUM_REFUSED = tl.constexpr(fields.NUM_REFUSED)


@kernel(
    {**VARIANT, "TRAINING": True, "CLAIMS": True},
    {**VARIANT, "TRAINING": True, "CLAIMS": False},
    {**VARIANT, "TRAINING": False, "CLAIMS": False},
)
def _find_kernel(
    segments: tl.int64,
    num_segments: tl.int64,
    rows: tl.int64,
    places: tl.int64,
    TRAINING: tl.constexpr,
    CLAIMS: tl.constexpr,
    LANES: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    line = line_of(segments, num_segments, LINE_BYTES, FIRST_CHUNK, chunk)
    position, inside = positions_of(line, chunk, LANES)
    header, flags = field(line, HEADER), field(line, FLAGS)
    key = tl.load(int64_at(field(line, IDS) + 8 * position), inside, 0)
    is_padding = (key == field(line, PADDING_IDX)) & ((flags & HAS_PADDING) != 0)
    row = row_of(header, key, inside & (is_padding == 0))
    known = row < CLAIMED  # what other programs claim meanwhile is unknown here too
    absent = inside & (is_padding == 0) & (known == 0)
    unknown = chunk * 0 + UNKNOWN
    if TRAINING:
        unknown = tl.where((flags & INSERT) != 0, MISSING, UNKNOWN)
        if (flags & INSERT) == 0:
            refused = sum_over(absent.to(tl.int64), 0)
            if refused != 0:
                tl.atomic_add(int64_at(header + 8 * NUM_REFUSED), refused, sem="relaxed")
        last_seen = field(header, LAST_SEEN)
        if last_seen != 0:
            stamp = row * 0 + field(line, STEP)
            tl.store(int64_at(last_seen + 8 * row), stamp, inside & known)
        if CLAIMS:
            if ((flags & INSERT) != 0) & any_of(absent):
                claim(line, header, rows, places, position, absent)
    row = tl.where(is_padding, PADDING, tl.where(known, row, unknown))
    tl.store(int64_at(rows + 8 * position), row, inside)


@kernel(VARIANT)
def _clear_kernel(entries: tl.int64, num_entries: tl.int64, LANES: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    tl.store(int64_at(entries + 16 * entry), entry * 0 + EMPTY, entry < num_entries)
    tl.store(int64_at(entries + 16 * entry + 8), entry * 0 + NO_ROW, entry < num_entries)


@kernel({**VARIANT, "EVICTS": True}, {**VARIANT, "EVICTS": False})
def _rebuild_kernel(
    old: tl.int64,
    num_entries: tl.int64,
    new: tl.int64,
    shift: tl.int64,
    capacity: tl.int64,
    evicted: tl.int64,
    gone: tl.int64,
    EVICTS: tl.constexpr,
    LANES: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = entry < num_entries
    key = tl.load(int64_at(old + 16 * entry), inside, EMPTY)
    row = tl.load(int64_at(old + 16 * entry + 8), inside, NO_ROW)
    moves = inside & (row < CLAIMED)  # not empty, nor left by an insertion that found no room
    if EVICTS:
        mark = (evicted + row).to(tl.pointer_type(tl.int8))
        leaves = moves & (tl.load(mark, moves, 0) != 0)
        tl.store((gone + row).to(tl.pointer_type(tl.int8)), leaves.to(tl.int8), leaves)
        moves = moves & (leaves == 0)
    place = new + 16 * (entry * 0 + capacity)
    slot = slot_of(key, entry * 0 + shift)
    searching = moves & (key != EMPTY)
    while any_of(searching):
        at = new + 16 * slot
        # A compare-and-swap has no mask: the idle ones swap their old entry's key for itself.
        cell = tl.where(searching, at, old + 16 * tl.minimum(entry, num_entries - 1))
        there = tl.atomic_cas(
            int64_at(cell),
            tl.where(searching, EMPTY, key),
            key,
            sem="relaxed",
        )
        done = searching & (there == EMPTY)
        place = tl.where(done, at, place)
        searching = searching & (done == 0)
        slot = (slot + 1) & (capacity - 1)
    tl.store(int64_at(place + 8), row, moves)


@kernel(VARIANT)
def _id_of_row_kernel(
    entries: tl.int64,
    num_entries: tl.int64,
    ids: tl.int64,
    occupied: tl.int64,
    num_rows: tl.int64,
    LANES: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = entry < num_entries
    row = tl.load(int64_at(entries + 16 * entry + 8), inside, NO_ROW)
    inside = inside & (row < num_rows)
    key = tl.load(int64_at(entries + 16 * entry), inside, 0)
    tl.store(int64_at(ids + 8 * row), key, inside)
    tl.store((occupied + row).to(tl.pointer_type(tl.int8)), inside.to(tl.int8), inside)


def allocate_entries(capacity, device):
    """Allocate and clear entries."""
    try:
        entries = torch.empty((capacity + 1, 2), dtype=torch.int64, device=device)
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"{16 * (capacity + 1)} bytes on {device}") from error
    count = capacity + 1
    _clear_kernel.launch(device, -(-count // LANES), entries.data_ptr(), count, LANES=LANES)
    return entries


def _find(staged, rows, places, training):
    where = (*staged.where, rows.data_ptr(), 0 if places is None else places.data_ptr())
    constants = {"TRAINING": training, "CLAIMS": places is not None, "LANES": LANES}
    _find_kernel.launch(rows.device, staged.num_programs, *where, **constants)


def find(segments, num_ids, device):
    """See the contract."""
    rows = torch.empty(num_ids, dtype=torch.int64, device=device)
    _find(StagedSegments(segments, num_ids, device), rows, None, False)
    return rows


def find_or_insert(segments, num_ids, tables, segment_tables, screen, device):
    """See the contract; ``new`` is as long as ``rows`` and ends in -1, as nobody waits for it.

    What is unknown is claimed in the same pass, where it is certain that all ids fit, were they all
    new. Else the host learns first what is missing, or the policy does.
    """
    rows = torch.empty(num_ids, dtype=torch.int64, device=device)
    if not num_ids:
        return rows, None
    staged = stage_lookup(segments, num_ids, device, tables, segment_tables)
    rooms, short = tables_without_room(staged, tables)
    places = torch.empty(num_ids + LANES, dtype=torch.int64, device=device)
    claims, counted = not short and screen is None, {}
    _find(staged, rows, places if claims else None, True)
    if screen is not None:
        screen(None, rows)  # which positions miss, the device knows
    if short:
        counted = make_room(staged, rows, tables, short)
    new = insert_misses(staged, rows, places, claims)
    note_insertions(staged, tables, rooms, counted)
    return rows, new


def rebuild(old, header, evicted):
    """See the contract; ``old`` is (address, capacity) of the entries to move."""
    address, capacity = old
    gone = None if evicted is None else torch.zeros_like(evicted)
    values = header.fields
    _rebuild_kernel.launch(
        header.device,
        -(-(capacity + 1) // LANES),
        address,
        capacity + 1,
        int(values[fields.ENTRIES]),
        int(values[fields.SHIFT]),
        int(values[fields.CAPACITY]),
        0 if evicted is None else evicted.data_ptr(),
        0 if gone is None else gone.data_ptr(),
        EVICTS=evicted is not None,
        LANES=LANES,
    )
    if gone is None:
        return 0
    evicted.copy_(gone)
    return int(gone.sum())


def id_of_row(header, num_rows):
    """See the contract."""
    device, values = header.device, header.fields
    ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    occupied = torch.zeros(num_rows, dtype=torch.bool, device=device)
    count = int(values[fields.CAPACITY]) + 1
    addresses = (int(values[fields.ENTRIES]), count, ids.data_ptr(), occupied.data_ptr(), num_rows)
    _id_of_row_kernel.launch(device, -(-count // LANES), *addresses, LANES=LANES)
    return ids, occupied
