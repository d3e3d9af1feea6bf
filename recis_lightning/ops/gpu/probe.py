"""Probing of the hash index in Triton: search, and claim by compare-and-swap.

Lanes of a program search one table, so its header is read once a program and lanes differ only in
how far they probe.
"""

import triton.language as tl

from recis_lightning.ops.gpu.layout import (
    CAPACITY,
    EMPTY,
    ENTRIES,
    IS_FULL,
    LINE_ENTRIES,
    NO_ROW,
    SHIFT,
)
from recis_lightning.ops.gpu.runtime import (
    any_of,
    cells_at,
    device_function,
    field,
    int64_at,
)

_MIX_1 = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_2 = tl.constexpr(0xD6E8FEB86659FD93)


@device_function
def slot_of(key, shift):
    """Return the slot where the search for ``key`` starts."""
    mixed = key.to(tl.uint64, bitcast=True) * _MIX_1
    mixed = (mixed ^ (mixed >> 32)) * _MIX_2
    return (mixed >> shift.to(tl.uint64)).to(tl.int64) & -LINE_ENTRIES


@device_function
def _load_entries(at, searching):
    """Load keys and row fields of entries, int64 [lanes, 2], each by one load of 16 bytes."""
    cells = cells_at(int64_at(at), tl.arange(0, 2), True)
    return tl.load(cells, searching[:, None], 0)


@device_function
def find_entry(entries, shift, capacity, key, searching):
    """Return the address of each id's entry, and the row field in it; NO_ROW where there is none.

    Lanes that are idle or find nothing get some address and NO_ROW. A search ends when it has seen
    every entry, so a full index is no trap.
    """
    slot = tl.where(key == EMPTY, capacity, slot_of(key, shift))
    entry = entries + 16 * slot
    row = key * 0 + NO_ROW
    turn = capacity * 0
    while any_of(searching) & (turn < capacity):
        at = entries + 16 * slot
        there, its_row = tl.split(_load_entries(at, searching))
        hit = searching & (there == key)
        entry = tl.where(hit, at, entry)
        row = tl.where(hit, its_row, row)
        searching = searching & (hit == 0) & (there != EMPTY)
        slot = (slot + 1) & (capacity - 1)
        turn += 1
    return entry, row


@device_function
def row_of(header, key, searching):
    """Return the row field of each id's entry; NO_ROW where there is none, or a lane is idle."""
    entries, shift, capacity = field(header, ENTRIES), field(header, SHIFT), field(header, CAPACITY)
    _, row = find_entry(entries, shift, capacity, key, searching)
    return row


@device_function
def claim_slot(entries, shift, capacity, key, claiming, dummy):
    """Return the address of each id's entry, claiming an empty one where the id has none.

    A compare-and-swap has no mask: a lane that claims nothing swaps EMPTY for EMPTY in its dummy
    cell, which changes nothing.

    Args:
        entries: Address of the index.
        shift: Of the index.
        capacity: Of the index.
        key: The ids; the id EMPTY has its entry, the last one, from the start.
        claiming: Lanes that have an id.
        dummy: Address of an int64 for each lane, which may be swapped for itself.

    Returns:
        The entries' addresses, the last entry's for idle lanes and 0 where a full index has none;
        and which lanes claimed one.
    """
    entry = entries + 16 * (capacity + key * 0)
    slot = slot_of(key, shift)
    searching = claiming & (key != EMPTY)
    claimed = searching & (key == EMPTY)
    turn = capacity * 0
    while any_of(searching) & (turn < capacity):
        at = entries + 16 * slot
        # Past the first-level cache: there a line that another multiprocessor has changed looks
        # free, and each duplicate of a new id would swap.
        there = tl.load(int64_at(at), searching, 0, cache_modifier=".cg")
        is_free = searching & (there == EMPTY)
        if any_of(is_free):
            swapped = tl.atomic_cas(
                int64_at(tl.where(is_free, at, dummy)),
                key * 0 + EMPTY,
                tl.where(is_free, key, EMPTY),
                sem="relaxed",
            )
            claimed = claimed | (is_free & (swapped == EMPTY))
            there = tl.where(is_free, swapped, there)
        done = searching & ((there == key) | (there == EMPTY))
        entry = tl.where(done, at, entry)
        searching = searching & (done == 0)
        slot = (slot + 1) & (capacity - 1)
        turn += 1
    return tl.where(searching, 0, entry), claimed


@device_function
def report_full(header, entry, claiming):
    """Tell the host of lanes that ``claim_slot`` found no entry for; return the others."""
    lost = claiming & (entry == 0)
    if any_of(lost):
        tl.store(int64_at(header + 8 * IS_FULL), header * 0 + 1)
    return claiming & (entry != 0)


__all__ = ["claim_slot", "find_entry", "report_full", "row_of", "slot_of"]
