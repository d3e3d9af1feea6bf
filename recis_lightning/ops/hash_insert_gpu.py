"""Insertion into the hash index in Triton: parallel, and still deterministic.

Every unknown id claims its entry by compare-and-swap, all its occurrences vote for the first
position by an atomic minimum, and the winners get rows in order of position, by a prefix sum. The
host does not wait for any of it: it asks tables for room beforehand, by what it knows of them.
"""

import torch
import triton.language as tl

from recis_lightning.ops import table_header as fields
from recis_lightning.ops.hash_slot_gpu import (
    CLAIMED,
    EMPTY,
    END,
    FIRST_CHUNK,
    HEADER,
    IDS,
    IS_LAST,
    LANES,
    LINE_BYTES,
    MISSING,
    START,
    STEP,
    TABLE,
    VARIANT,
    ids_to_insert,
    positions_of,
    slot_of,
)
from recis_lightning.ops.launch_gpu import (
    CAPACITY,
    ENTRIES,
    SHIFT,
    any_of,
    field,
    int64_at,
    kernel,
    line_of,
    sum_over,
)
from recis_lightning.ops.split_header import note_insertion, watch_counts

FREE_ROWS = tl.constexpr(fields.FREE_ROWS)
NUM_FREE = tl.constexpr(fields.NUM_FREE)
NEXT_ROW = tl.constexpr(fields.NEXT_ROW)
NUM_IDS = tl.constexpr(fields.NUM_IDS)
LAST_SEEN = tl.constexpr(fields.LAST_SEEN)
COUNT_LANES = 128


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
        header = field(line, HEADER)
        entries, shift = field(header, ENTRIES), field(header, SHIFT)
        capacity = field(header, CAPACITY)
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
def _mark_first_kernel(
    rows: tl.int64, places: tl.int64, firsts: tl.int64, num_ids: tl.int64, LANES: tl.constexpr
):
    # An id's first position won its entry: there it counts as new.
    position = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    missing = tl.load(int64_at(rows + 8 * position), position < num_ids, 0) == MISSING
    place = tl.load(int64_at(places + 8 * position), missing, 0)
    claim = tl.load(int64_at(place + 8), missing, 0)
    first = missing & (claim == (position | CLAIMED))
    tl.store(int64_at(firsts + 8 * position), first.to(tl.int64), position < num_ids)


@kernel({"LANES": COUNT_LANES})
def _count_kernel(
    segments: tl.int64, ranks: tl.int64, before: tl.int64, totals: tl.int64, LANES: tl.constexpr
):
    # One program a segment: new ids of its table in earlier segments, less those of any table.
    number = tl.program_id(0).to(tl.int64)
    line = segments + number * LINE_BYTES
    table = field(line, TABLE)
    count = number * 0
    first = number * 0
    while first <= number:
        other = first + tl.arange(0, LANES)
        at = segments + other * LINE_BYTES
        mine = other <= number
        mine = mine & (tl.load(int64_at(at + 8 * TABLE), mine, -1) == table)
        low = tl.load(int64_at(at + 8 * START), mine, 0)
        high = tl.load(int64_at(at + 8 * END), mine, 0)
        high = tl.load(int64_at(ranks + 8 * (high - 1)), mine & (high > 0), 0)
        low = tl.load(int64_at(ranks + 8 * (low - 1)), mine & (low > 0), 0)
        count += sum_over(high - low, 0)
        first += LANES
    end = field(line, END)
    up_to_end = tl.load(int64_at(ranks + 8 * (end - 1)), end > 0, 0)
    tl.store(int64_at(totals + 8 * number), count)
    tl.store(int64_at(before + 8 * number), count - up_to_end)


@kernel(VARIANT)
def _assign_kernel(
    segments: tl.int64,
    num_segments: tl.int64,
    places: tl.int64,
    firsts: tl.int64,
    ranks: tl.int64,
    before: tl.int64,
    new: tl.int64,
    LANES: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    line = line_of(segments, num_segments, LINE_BYTES, FIRST_CHUNK, chunk)
    position, inside = positions_of(line, chunk, LANES)
    first = tl.load(int64_at(firsts + 8 * position), inside, 0) != 0
    if any_of(first):
        header = field(line, HEADER)
        num_free, next_row = field(header, NUM_FREE), field(header, NEXT_ROW)
        rank = tl.load(int64_at(ranks + 8 * position), first, 1) - 1
        number = rank + field(before, (line - segments) // LINE_BYTES)
        reused = number < num_free
        top = field(header, FREE_ROWS) + 8 * (num_free - 1 - number)
        row = tl.load(int64_at(top), first & reused, 0)
        row = tl.where(reused, row, next_row + number - num_free)
        place = tl.load(int64_at(places + 8 * position), first, 0)
        tl.store(int64_at(place + 8), row, first)
        tl.store(int64_at(new + 8 * rank), position, first)


@kernel(VARIANT)
def _fill_rows_kernel(
    segments: tl.int64,
    num_segments: tl.int64,
    rows: tl.int64,
    places: tl.int64,
    totals: tl.int64,
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
        count = field(totals, (line - segments) // LINE_BYTES)
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


def _count_distinct(staged, num_programs, rows, num_tables):
    """Return how many distinct ids each table lacks; the host waits for it."""
    keys, owners = torch.empty_like(rows), torch.empty_like(rows)
    where = (staged.data_ptr(), len(staged), rows.data_ptr(), keys.data_ptr(), owners.data_ptr())
    _copy_missing_kernel.launch(rows.device, num_programs, *where, LANES=LANES)
    missing = owners >= 0
    pairs = torch.stack([owners[missing], keys[missing]])
    distinct = torch.unique(pairs, dim=1)[0]
    return torch.bincount(distinct, minlength=num_tables).tolist()


def _make_room(lines, staged, num_programs, rows, tables):
    """Make room for all new ids, before any is inserted: what fails here has changed nothing.

    Where it is certain that all ids fit, were they all new, nobody waits for the device.

    Returns:
        How many ids may be inserted in each table.
    """
    at_most = ids_to_insert(lines, len(tables)).tolist()
    pairs = list(zip(tables, at_most, strict=True))
    short = [number for number, (table, n) in enumerate(pairs) if n and not table.surely_fits(n)]
    if short:
        counts = _count_distinct(staged, num_programs, rows, len(tables))
        for number in short:
            tables[number].reserve_ids(counts[number])
        for number in short:
            tables[number].reserve_rows(counts[number])
        for number in short:
            tables[number].reserve_ahead(counts[number], at_most[number])
            at_most[number] = counts[number]
    for table, count in zip(tables, at_most, strict=True):
        note_insertion(table.header, count)
    return at_most


def insert_misses(lines, staged, num_programs, rows, tables):
    """Insert the ids of ``rows`` that are MISSING and enter their rows.

    Returns:
        int64 [n]: positions of the new ids' first occurrences, ascending, then -1.
    """
    device, n, num_segments = rows.device, rows.numel(), len(lines)
    at_most = _make_room(lines, staged, num_programs, rows, tables)
    places = torch.empty(n + LANES, dtype=torch.int64, device=device)
    firsts, new = torch.empty_like(rows), torch.full_like(rows, -1)
    counts = torch.empty(2, num_segments, dtype=torch.int64, device=device)
    totals, before = counts[0].data_ptr(), counts[1].data_ptr()
    where = (staged.data_ptr(), num_segments)
    first = (rows.data_ptr(), places.data_ptr())
    _claim_kernel.launch(device, num_programs, *where, *first, LANES=LANES)
    _mark_first_kernel.launch(device, -(-n // LANES), *first, firsts.data_ptr(), n, LANES=LANES)
    ranks = firsts.cumsum(0)
    sums = (ranks.data_ptr(), before, totals)
    _count_kernel.launch(device, num_segments, where[0], *sums, LANES=COUNT_LANES)
    third = (firsts.data_ptr(), ranks.data_ptr(), before, new.data_ptr())
    _assign_kernel.launch(device, num_programs, *where, places.data_ptr(), *third, LANES=LANES)
    _fill_rows_kernel.launch(device, num_programs, *where, *first, totals, LANES=LANES)
    pairs = zip(tables, at_most, strict=True)
    # Soon these would have to wait.
    watch_counts([table.header for table, n in pairs if n and not table.surely_fits(4 * n)])
    return new
