"""The hash index in Triton: find, find_or_insert and rebuild."""

import torch
import triton.language as tl

from recis_lightning.ops import device_memory
from recis_lightning.ops import layout as fields
from recis_lightning.ops.gpu.embedding_bag import chunks_of
from recis_lightning.ops.gpu.hash_insert import (
    Workspace,
    claim,
    insert_misses,
    make_room,
    note_insertions,
    tables_without_room,
)
from recis_lightning.ops.gpu.layout import (
    BLOCK_SHIFT,
    BLOCKS,
    CLAIMED,
    EMPTY,
    FREE_ROWS,
    HAS_PADDING,
    INSERT,
    LAST_SEEN,
    MISSING,
    NEXT_ROW,
    NO_ROW,
    NUM_FREE,
    NUM_REJECTED,
    PADDING,
    ROW_BYTES,
    SEGMENT_FLAGS,
    SEGMENT_HEADER,
    SEGMENT_PADDING,
    SEGMENT_STEP,
    UNKNOWN,
)
from recis_lightning.ops.gpu.probe import claim_slot, report_full, row_of
from recis_lightning.ops.gpu.runtime import any_of, field, int64_at, kernel, row_address, sum_over
from recis_lightning.ops.gpu.segments import (
    LANES,
    SEARCH,
    SEARCH_VARIANT,
    SEARCH_WARPS,
    VARIANT,
    LookupSplit,
    StagedSegments,
    ids_at,
    note_missing,
    own_ids,
    stage_lookup,
)
from recis_lightning.ops.hash_index import Claim


@kernel(
    {**SEARCH_VARIANT, "TRAINING": True, "CLAIMS": True},
    {**SEARCH_VARIANT, "TRAINING": True, "CLAIMS": False},
    {**SEARCH_VARIANT, "TRAINING": False, "CLAIMS": False},
    num_warps=SEARCH_WARPS,
)
def _find_kernel(
    segments: tl.int64,
    num_segments: tl.int64,
    rows: tl.int64,
    slots: tl.int64,
    TRAINING: tl.constexpr,
    CLAIMS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
):
    chunk, segment, position, inside = own_ids(segments, num_segments, LANES, PARTS)
    header, flags = field(segment, SEGMENT_HEADER), field(segment, SEGMENT_FLAGS)
    key = ids_at(segment, position, inside)
    is_padding = (key == field(segment, SEGMENT_PADDING)) & ((flags & HAS_PADDING) != 0)
    row = row_of(header, key, inside & (is_padding == 0))
    known = row < CLAIMED  # what other programs claim meanwhile is unknown here too
    absent = inside & (is_padding == 0) & (known == 0)
    unknown = chunk * 0 + UNKNOWN
    if TRAINING:
        unknown = tl.where((flags & INSERT) != 0, MISSING, UNKNOWN)
        if (flags & INSERT) == 0:
            num_rejected = sum_over(absent.to(tl.int64), 0)
            if num_rejected != 0:
                tl.atomic_add(int64_at(header + 8 * NUM_REJECTED), num_rejected, sem="relaxed")
        last_seen = field(header, LAST_SEEN)
        if last_seen != 0:
            step = row * 0 + field(segment, SEGMENT_STEP)
            tl.store(int64_at(last_seen + 8 * row), step, inside & known)
        if ((flags & INSERT) != 0) & any_of(absent):
            note_missing(segments, num_segments)
            if CLAIMS:
                claim(segment, header, slots, position, absent, LANES)
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
    removed: tl.int64,
    header: tl.int64,
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
        tl.store((removed + row).to(tl.pointer_type(tl.int8)), leaves.to(tl.int8), leaves)
        moves = moves & (leaves == 0)
    # No other program touches the old entry of a lane.
    dummy = old + 16 * tl.minimum(entry, num_entries - 1)
    target, _ = claim_slot(new, entry * 0 + shift, capacity, key, moves, dummy)
    placed = report_full(header, target, moves)
    tl.store(int64_at(target + 8), row, placed)


@kernel(VARIANT)
def _number_free_rows_kernel(header: tl.int64, num_free: tl.int64, LANES: tl.constexpr):
    # A freed row notes its place in the stack: that tells it from a row in use, without a list.
    place = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = place < num_free
    row = tl.load(int64_at(field(header, FREE_ROWS) + 8 * place), inside, 0)
    blocks, shift = field(header, BLOCKS), field(header, BLOCK_SHIFT)
    at = row_address(blocks, shift, field(header, ROW_BYTES), row, inside)
    tl.store(at.to(tl.pointer_type(tl.int32)), place.to(tl.int32), inside)


@kernel(VARIANT)
def _drop_rowless_kernel(
    header: tl.int64,
    entries: tl.int64,
    num_entries: tl.int64,
    num_void: tl.int64,
    LANES: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = entry < num_entries
    key = tl.load(int64_at(entries + 16 * entry), inside, EMPTY)
    row = tl.load(int64_at(entries + 16 * entry + 8), inside, NO_ROW)
    next_row, num_free = field(header, NEXT_ROW), field(header, NUM_FREE)
    is_numbered = inside & (row < next_row)
    blocks, shift = field(header, BLOCKS), field(header, BLOCK_SHIFT)
    at = row_address(blocks, shift, field(header, ROW_BYTES), row, is_numbered)
    place = tl.load(at.to(tl.pointer_type(tl.int32)), is_numbered, -1).to(tl.int64)
    is_numbered = is_numbered & (place >= 0) & (place < num_free)
    noted = tl.load(int64_at(field(header, FREE_ROWS) + 8 * place), is_numbered, NO_ROW)
    rowless = inside & ((row >= next_row) | (is_numbered & (noted == row)))
    tl.store(int64_at(entries + 16 * entry + 8), entry * 0 + NO_ROW, rowless)
    void = sum_over((rowless & (key != EMPTY)).to(tl.int64), 0)
    if void != 0:
        tl.atomic_add(int64_at(num_void), void, sem="relaxed")


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
    entries = device_memory.empty((capacity + 1, 2), torch.int64, device)
    count = capacity + 1
    _clear_kernel.launch(device, -(-count // LANES), entries.data_ptr(), count, LANES=LANES)
    return entries


def _find(staged, rows, slots, training):
    where = (*staged.where, rows.data_ptr(), slots)
    constants = {"TRAINING": training, "CLAIMS": slots != 0, **SEARCH}
    programs = staged.num_programs * SEARCH["PARTS"]
    _find_kernel.launch(rows.device, programs, *where, **constants)


def find(segments, num_ids, device):
    rows = torch.empty(num_ids, dtype=torch.int64, device=device)
    _find(StagedSegments(segments, num_ids, device), rows, 0, False)
    return rows


def find_or_insert(
    segments, num_ids, tables, segment_tables, check, device, claims, plan, dim, kept
):
    try:
        rows = torch.empty(num_ids, dtype=torch.int64, device=device)
        split = None if kept is None else kept.get("split")
        if split is None:
            args = segments, num_ids, tables, segment_tables, plan
            split = LookupSplit(*args, lambda plan: chunks_of(plan, dim))
            if kept is not None:
                kept["split"] = split
        if plan is not None:
            split.point(plan, rows)
        if not num_ids:
            return rows, None
        staged = stage_lookup(segments, num_ids, rows.device, tables, plan, split)
        return rows, _insert(staged, rows, tables, check, claims)
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"a lookup of {num_ids} ids found no memory on {device}") from error


def _insert(staged, rows, tables, check, claims):
    # Where all ids fit, were they all new, unknown ids are claimed in the pass that finds rows.
    # Else the host, or the policy, must first learn which are missing.
    is_noted = staged.split.allowance.take()
    free, short = ([], []) if is_noted else tables_without_room(staged, tables)
    workspace = Workspace(rows, staged.num_programs)
    claims_at_once, counted = not short and check is None, {}
    claims.append(Claim(tables, None))
    _find(staged, rows, workspace.slots if claims_at_once else 0, True)
    if check is not None:
        check(None, rows)  # the device knows which positions miss
    if short:
        counted = make_room(staged, rows, tables, short)
    new = insert_misses(staged, rows, workspace, claims_at_once, claims)
    if not is_noted:
        note_insertions(staged, tables, free, counted)
    return new


def rebuild(old, header, new, evicted):
    address, num_entries = old[0], old[1] + 1
    removed = None if evicted is None else torch.zeros_like(evicted)
    _rebuild_kernel.launch(
        header.device,
        -(-num_entries // LANES),
        address,
        num_entries,
        *new,
        0 if evicted is None else evicted.data_ptr(),
        0 if removed is None else removed.data_ptr(),
        header.address,
        EVICTS=evicted is not None,
        LANES=LANES,
    )
    if removed is None:
        return 0
    evicted.copy_(removed)
    return int(removed.sum())


def drop_rowless(header):
    values, device = header.fields, header.device
    num_void = torch.zeros(1, dtype=torch.int64, device=device)
    num_free, count = int(values[fields.NUM_FREE]), int(values[fields.CAPACITY]) + 1
    _number_free_rows_kernel.launch(
        device, -(-num_free // LANES), header.address, num_free, LANES=LANES
    )
    where = (header.address, int(values[fields.ENTRIES]), count, num_void.data_ptr())
    _drop_rowless_kernel.launch(device, -(-count // LANES), *where, LANES=LANES)
    return int(num_void)


def id_of_row(header, num_rows):
    device, values = header.device, header.fields
    ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    occupied = torch.zeros(num_rows, dtype=torch.bool, device=device)
    count = int(values[fields.CAPACITY]) + 1
    addresses = (int(values[fields.ENTRIES]), count, ids.data_ptr(), occupied.data_ptr(), num_rows)
    _id_of_row_kernel.launch(device, -(-count // LANES), *addresses, LANES=LANES)
    return ids, occupied


__all__ = ["allocate_entries", "find", "find_or_insert", "id_of_row", "rebuild"]
