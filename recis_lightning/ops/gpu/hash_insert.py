"""Insertion into the hash index in Triton: parallel, and still deterministic.

Every unknown id claims its entry by compare-and-swap, all its occurrences vote for the first
position by an atomic minimum, and the winners get rows in order of position, by a prefix sum. The
host does not wait for any of it: it asks tables for room beforehand, by what it knows of them.
"""

import torch
import triton.language as tl

from recis_lightning.ops import layout as fields
from recis_lightning.ops.gpu.prefix_sum import add_up_
from recis_lightning.ops.gpu.probe import (
    CLAIMED,
    EMPTY,
    END_CHUNK,
    FIRST_CHUNK,
    HEADER,
    IDS,
    IS_LAST,
    LANES,
    LINE_BYTES,
    MISSING,
    STEP,
    TABLE,
    VARIANT,
    positions_of,
    slot_of,
)
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
    sum_over,
    sums_up_to,
)
from recis_lightning.ops.header import watch_counts

FREE_ROWS = tl.constexpr(fields.FREE_ROWS)
NUM_FREE = tl.constexpr(fields.NUM_FREE)
NEXT_ROW = tl.constexpr(fields.NEXT_ROW)
NUM_IDS = tl.constexpr(fields.NUM_IDS)
LAST_SEEN = tl.constexpr(fields.LAST_SEEN)


@device_function
def claim(line, header, rows, places, position, missing):
    """Give unknown ids an entry each, and let every occurrence vote for the first position."""
    entries, shift, capacity = field(header, ENTRIES), field(header, SHIFT), field(header, CAPACITY)
    key = tl.load(int64_at(field(line, IDS) + 8 * position), missing, 0)
    # A compare-and-swap has no mask: idle lanes swap a place of their own, nothing for nothing.
    own = places + 8 * position
    place = entries + 16 * (capacity + position * 0)
    slot = slot_of(key, shift)
    searching = missing & (key != EMPTY)
    while any_of(searching):
        at = entries + 16 * slot
        there = tl.load(int64_at(at), searching, 0)
        wants = searching & (there == EMPTY)
        if any_of(wants):
            got = tl.atomic_cas(
                int64_at(tl.where(wants, at, own)),
                position * 0 + EMPTY,
                tl.where(wants, key, EMPTY),
                sem="relaxed",
            )
            there = tl.where(wants, got, there)
        done = searching & ((there == key) | (there == EMPTY))
        place = tl.where(done, at, place)
        searching = searching & (done == 0)
        slot = (slot + 1) & (capacity - 1)
    tl.atomic_min(int64_at(place + 8), position | CLAIMED, missing, sem="relaxed")
    tl.store(int64_at(places + 8 * position), place, missing)


@kernel(VARIANT)
def _claim_kernel(
    segments: tl.int64,
    num_segments: tl.int64,
    rows: tl.int64,
    places: tl.int64,
    LANES: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    line = line_of(segments, num_segments, LINE_BYTES, FIRST_CHUNK, chunk)
    position, inside = positions_of(line, chunk, LANES)
    missing = tl.load(int64_at(rows + 8 * position), inside, 0) == MISSING
    if any_of(missing):
        claim(line, field(line, HEADER), rows, places, position, missing)


@device_function
def _is_first(rows, places, position, inside):
    """Tell at which positions new ids stand first: those won their entries; and where these are."""
    missing = tl.load(int64_at(rows + 8 * position), inside, 0) == MISSING
    place = tl.load(int64_at(places + 8 * position), missing, 0)
    return missing & (tl.load(int64_at(place + 8), missing, 0) == (position | CLAIMED)), place


@kernel(VARIANT)
def _count_first_kernel(
    segments: tl.int64,
    num_segments: tl.int64,
    rows: tl.int64,
    places: tl.int64,
    counts: tl.int64,
    new: tl.int64,
    LANES: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    line = line_of(segments, num_segments, LINE_BYTES, FIRST_CHUNK, chunk)
    position, inside = positions_of(line, chunk, LANES)
    first, _ = _is_first(rows, places, position, inside)
    tl.store(int64_at(counts + 8 * chunk), sum_over(first.to(tl.int64), 0))
    tl.store(int64_at(new + 8 * position), position * 0 - 1, inside)


@device_function
def _new_before(segments, number, before, table, LANES: tl.constexpr):
    """Return how many new ids a table has in the first segments, ``number`` of them."""
    count = number * 0
    first = number * 0
    while first < number:
        other = first + tl.arange(0, LANES)
        at = segments + other * LINE_BYTES
        mine = other < number
        mine = mine & (tl.load(int64_at(at + 8 * TABLE), mine, -1) == table)
        low = tl.load(int64_at(at + 8 * FIRST_CHUNK), mine, 0)
        high = tl.load(int64_at(at + 8 * END_CHUNK), mine, 0)
        low = tl.load(int64_at(before + 8 * low), mine, 0)
        high = tl.load(int64_at(before + 8 * high), mine, 0)
        count += sum_over(high - low, 0)
        first += LANES
    return count


@kernel(VARIANT)
def _assign_kernel(
    segments: tl.int64,
    num_segments: tl.int64,
    rows: tl.int64,
    places: tl.int64,
    before: tl.int64,
    new: tl.int64,
    LANES: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    line = line_of(segments, num_segments, LINE_BYTES, FIRST_CHUNK, chunk)
    low, high = field(before, chunk), field(before, chunk + 1)
    if high > low:
        position, inside = positions_of(line, chunk, LANES)
        first, place = _is_first(rows, places, position, inside)
        header = field(line, HEADER)
        num_free, next_row = field(header, NUM_FREE), field(header, NEXT_ROW)
        own = (line - segments) // LINE_BYTES
        number = _new_before(segments, own, before, field(line, TABLE), LANES)
        number += low - field(before, field(line, FIRST_CHUNK))
        rank = sums_up_to(first.to(tl.int64)) - 1
        number = number + rank
        reused = number < num_free
        top = field(header, FREE_ROWS) + 8 * (num_free - 1 - number)
        row = tl.load(int64_at(top), first & reused, 0)
        row = tl.where(reused, row, next_row + number - num_free)
        tl.store(int64_at(place + 8), row, first)
        tl.store(int64_at(new + 8 * (low + rank)), position, first)


@kernel(VARIANT)
def _fill_rows_kernel(
    segments: tl.int64,
    num_segments: tl.int64,
    rows: tl.int64,
    places: tl.int64,
    before: tl.int64,
    LANES: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    line = line_of(segments, num_segments, LINE_BYTES, FIRST_CHUNK, chunk)
    position, inside = positions_of(line, chunk, LANES)
    missing = tl.load(int64_at(rows + 8 * position), inside, 0) == MISSING
    place = tl.load(int64_at(places + 8 * position), missing, 0)
    row = tl.load(int64_at(place + 8), missing, 0)
    tl.store(int64_at(rows + 8 * position), row, missing)
    header = field(line, HEADER)
    last_seen = field(header, LAST_SEEN)
    if last_seen != 0:
        tl.store(int64_at(last_seen + 8 * row), position * 0 + field(line, STEP), missing)
    if (field(line, IS_LAST) != 0) & (chunk == field(line, FIRST_CHUNK)):
        own = (line - segments) // LINE_BYTES
        count = _new_before(segments, own + 1, before, field(line, TABLE), LANES)
        num_free, next_row = field(header, NUM_FREE), field(header, NEXT_ROW)
        reused = tl.minimum(num_free, count)
        tl.store(int64_at(header + 8 * NUM_FREE), num_free - reused)
        tl.store(int64_at(header + 8 * NEXT_ROW), next_row + count - reused)
        tl.store(int64_at(header + 8 * NUM_IDS), field(header, NUM_IDS) + count)


@kernel(VARIANT)
def _copy_missing_kernel(
    segments: tl.int64,
    num_segments: tl.int64,
    rows: tl.int64,
    keys: tl.int64,
    owners: tl.int64,
    LANES: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    line = line_of(segments, num_segments, LINE_BYTES, FIRST_CHUNK, chunk)
    position, inside = positions_of(line, chunk, LANES)
    missing = tl.load(int64_at(rows + 8 * position), inside, 0) == MISSING
    key = tl.load(int64_at(field(line, IDS) + 8 * position), missing, 0)
    owner = tl.where(missing, position * 0 + field(line, TABLE), -1)
    tl.store(int64_at(keys + 8 * position), key, inside)
    tl.store(int64_at(owners + 8 * position), owner, inside)


def _count_distinct(staged, rows, num_tables):
    """Return how many distinct ids each table lacks; the host waits for it."""
    keys, owners = torch.empty_like(rows), torch.empty_like(rows)
    where = (*staged.where, rows.data_ptr(), keys.data_ptr(), owners.data_ptr())
    _copy_missing_kernel.launch(rows.device, staged.num_programs, *where, LANES=LANES)
    missing = owners >= 0
    pairs = torch.stack([owners[missing], keys[missing]])
    distinct = torch.unique(pairs, dim=1)[0]
    return torch.bincount(distinct, minlength=num_tables).tolist()


def tables_without_room(staged, tables):
    """Return how many ids the host knows to fit in each table, and which tables may lack room."""
    rooms = [table.guaranteed_free() for table in tables]
    asked = zip(staged.ids_to_insert, rooms, strict=True)
    return rooms, [number for number, (n, room) in enumerate(asked) if n > room]


def make_room(staged, rows, tables, short):
    """Make room for the new ids of some tables, before any is inserted: the host waits for it.

    What fails here has changed nothing.

    Returns:
        How many new ids they have: table's number -> count.
    """
    counts = _count_distinct(staged, rows, len(tables))
    for number in short:
        tables[number].reserve_ids(counts[number])
    for number in short:
        tables[number].reserve_rows(counts[number])
    for number in short:
        tables[number].reserve_headroom(counts[number], staged.ids_to_insert[number])
    return {number: counts[number] for number in short}


def insert_misses(staged, rows, places, claimed):
    """Insert the ids of ``rows`` that are MISSING and enter their rows; there is room for them.

    Args:
        staged: The lookup's segments.
        rows: int64 [n].
        places: int64 [n + LANES], the entries of ids that are claimed already.
        claimed: Whether they are.

    Returns:
        int64 [n]: positions of the new ids' first occurrences, ascending, then -1.
    """
    device, programs, new = rows.device, staged.num_programs, torch.empty_like(rows)
    counts = torch.empty(programs + 1, dtype=torch.int64, device=device)
    where = (*staged.where, rows.data_ptr(), places.data_ptr())
    if not claimed:
        _claim_kernel.launch(device, programs, *where, LANES=LANES)
    found = (*where, counts.data_ptr(), new.data_ptr())
    _count_first_kernel.launch(device, programs, *found, LANES=LANES)
    add_up_(device, counts.data_ptr(), programs)
    _assign_kernel.launch(device, programs, *found, LANES=LANES)
    _fill_rows_kernel.launch(device, programs, *where, counts.data_ptr(), LANES=LANES)
    return new


def note_insertions(staged, tables, rooms, counted):
    """Keep count of what may have been inserted.

    Args:
        staged: The lookup's segments.
        tables: The group's.
        rooms: How many ids surely fitted in each table before.
        counted: How many new ids there were, for the tables where that is known.
    """
    soon = []
    for number, (table, asked) in enumerate(zip(tables, staged.ids_to_insert, strict=True)):
        if asked:
            inserted = counted.get(number, asked)
            table.header.note_insertion(inserted)
            room = table.guaranteed_free() if number in counted else rooms[number] - inserted
            if 4 * asked > room:  # soon the host would have to wait
                soon.append(table.header)
    watch_counts(soon)
