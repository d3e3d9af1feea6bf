"""Hash index of ids to rows: the contract.

Open addressing with linear probing from the first entry of a cache line. Entries ``(key, row)`` are
contiguous, so nearly every search is one memory transaction. The top bits of a mixed hash select
the line, so a larger index has old lines in the same order: growth streams through memory. On the
CPU a small index may have any capacity of whole lines (``table.sizing``). There are no tombstones:
a removal rebuilds the index.

Ops take a *group* of tables. Each feature has a *segment*, which holds the address of its ids, the
header of its table and its padding id. Positions count the ids of all features, one feature after
the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import admission, backend, row_access, traffic
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import (
    CAPACITY,
    CHECK_ADMISSION,
    EMPTY,
    ENTRIES,
    NEXT_ROW,
    NO_ROW,
    NUM_FREE,
    NUM_IDS,
    PADDING,
    PLAN_FIRST_ID,
    PLAN_ROWS,
    SEGMENT_FLAGS,
    SEGMENT_IDS,
    SEGMENT_START,
    SHIFT,
    TOUCH,
)
from recis_lightning.ops.table_memory import TableMemory

Segments = npt.NDArray[np.int64]

MIN_CAPACITY = 64
# Load limits by size: an index that stays in cache can use a lower load factor, in a large one
# memory counts.
_MAX_LOAD_SMALL, _MAX_LOAD_LARGE, _LARGE_CAPACITY = 0.5, 0.8, 1 << 22
_COUNTS = slice(NUM_IDS, NUM_FREE + 1)  # header fields that an insertion changes
assert list(range(ENTRIES, NUM_FREE + 1)) == [
    *(ENTRIES, SHIFT, CAPACITY, NUM_IDS, NEXT_ROW, NUM_FREE)
]


class Claim(NamedTuple):
    """Part of an insertion under way, as a backend notes it before it changes an index.

    Attributes:
        tables: Tables whose indexes may hold ids without a row from now on.
        counts: For each of them NUM_IDS, NEXT_ROW and NUM_FREE, as they were; None where only the
            device knows them, and changes them last of all.
        new: As ``find_or_insert`` returns it, if the next thing to change are the counts.
    """

    tables: Sequence[TableMemory]
    counts: Sequence[Sequence[int]] | None
    new: Tensor | None = None


def max_load(capacity: int) -> float:
    """Return the share of a power of two that may be filled before the index grows."""
    return _MAX_LOAD_SMALL if capacity < _LARGE_CAPACITY else _MAX_LOAD_LARGE


def capacity_for(num_ids: int) -> int:
    """Return the smallest capacity (a power of two) that holds ``num_ids`` under its load limit.

    Example:
        >>> capacity_for(0), capacity_for(32), capacity_for(33)
        (64, 64, 128)
    """
    capacity = MIN_CAPACITY
    while num_ids > capacity * max_load(capacity):
        capacity *= 2
    return capacity


def empty_entries(header: Header, capacity: int) -> Tensor:
    """Allocate an index with no id in it and enter it into ``header``.

    Args:
        header: int64 [HEADER_SIZE]; its index fields are overwritten.
        capacity: Number of entries, a power of two.

    Returns:
        int64 [capacity + 1, 2]; the last entry is that of the id ``EMPTY`` itself. The caller keeps
        the tensor alive as long as the header points to it.
    """
    entries: Tensor = backend.module("hash_index", header.device).allocate_entries(
        capacity, header.device
    )
    enter_entries(header, entries, 0)
    return entries


def enter_entries(header: Header, entries: Tensor, num_ids: int | None = None) -> None:
    """Point a header to an index, in one step that nothing interrupts.

    Args:
        header: int64 [HEADER_SIZE].
        entries: int64 [capacity + 1, 2]; the caller keeps it alive, and the one before until then.
        num_ids: Ids in it; None for as many as before.
    """
    place = (entries.data_ptr(), *_shape_of(entries))
    if num_ids is None:
        header.fields[ENTRIES:NUM_IDS] = place
    else:
        header.read_counts()[ENTRIES : NUM_IDS + 1] = (*place, num_ids)
        header.publish_counts()
    header.publish()


def _shape_of(entries: Tensor) -> tuple[int, int]:
    """Return SHIFT and CAPACITY of an index."""
    capacity = len(entries) - 1
    return 64 - (capacity.bit_length() - 1), capacity


def describe(segments: Segments, ids: Sequence[Tensor]) -> int:
    """Enter start and address of their ids into segments; return the number of all ids.

    Args:
        segments: int64 [num_segments, SEGMENT_SIZE]; start and address are overwritten.
        ids: int64 [n_i] for each segment, contiguous; the caller keeps them alive as long as the
            segments are used.
    """
    sizes = enter_starts(segments, ids)
    write_addresses(segments, ids)
    return int(sizes.sum())


def enter_starts(segments: Segments, ids: Sequence[Tensor]) -> npt.NDArray[np.int64]:
    """Enter the start of their ids into segments; return the number of ids of each."""
    sizes = np.array(list(map(Tensor.numel, ids)), np.int64)
    segments[:, SEGMENT_START] = np.cumsum(sizes) - sizes
    return sizes


def write_addresses(segments: Segments, ids: Sequence[Tensor]) -> None:
    """Enter addresses of ids into segments whose starts are entered already."""
    addresses = np.array([part.data_ptr() for part in ids], np.int64)
    segments[:, SEGMENT_IDS] = addresses - 8 * segments[:, SEGMENT_START]


def point_to_rows(plan: npt.NDArray[np.int64], rows: Tensor) -> None:
    """Point each line of a plan to the rows of its ids, which start at its FIRST_ID in ``rows``."""
    plan[:, PLAN_ROWS] = 8 * plan[:, PLAN_FIRST_ID] + rows.data_ptr()


def find(segments: Segments, num_ids: int, device: torch.device) -> Tensor:
    """Return the rows of ids; changes nothing.

    Args:
        segments: int64 [num_segments, SEGMENT_SIZE], by start; duplicate ids allowed.
        num_ids: n, in all segments together.
        device: Device of the ids.

    Returns:
        int64 [n], rows; ``UNKNOWN`` (-1) where there is none, ``PADDING`` (-2) for a padding id.
    """
    with backend.region("recis::find", lambda: traffic.of_find(num_ids)):
        rows: Tensor = backend.module("hash_index", device).find(segments, num_ids, device)
    return rows


def find_or_insert(
    segments: Segments,
    num_ids: int,
    tables: Sequence[TableMemory],
    segment_tables: Sequence[int],
    device: torch.device,
    occurrences: Tensor | None = None,
    write_new: Callable[[Tensor, Tensor], None] | None = None,
    make_room: Callable[[Tensor], None] | None = None,
    plan: npt.NDArray[np.int64] | None = None,
    embedding_dim: int = 0,
    kept: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the rows of ids, insert unknown ones, and write last-seen steps.

    If it fails or is interrupted, at whatever point, no table keeps an id of the call that it did
    not have. (Beside a GPU the ids may stay, with what ``write_new`` writes.)

    Only segments with the INSERT flag insert, and those with the CHECK_ADMISSION flag only the ids
    that the policy admits (``ops.admission``). Segments of one table may differ in these: where an
    id is not inserted, it reads as it was before, though another segment inserts it. Tables with a
    column LAST_SEEN write their step to it; segments with the TOUCH flag keep further access
    metadata (``ops.row_access``).

    Rows are assigned in the order in which ids first appear, freed rows first, so the result does
    not depend on the number of threads. Rows of new ids are for ``write_new`` to initialise.

    Args:
        segments: As for ``find``.
        num_ids: n.
        tables: The group's tables; each reserves room as it is needed.
        segment_tables: For each segment, the index of its table in ``tables``.
        device: Device of the ids.
        occurrences: int64 [n], how many occurrences each position stands for, for policies that
            count; None means 1.
        write_new: Called with ``rows`` and ``new`` if there is one, and perhaps a second time;
            writes the rows of the new ids.
        make_room: Called once with rows, int64 [n], that are MISSING where an id is about to be
            inserted; may remove any other id than those of the call.
        plan: Plan that ``embedding_bag.gather`` is given next, whose PLAN_ROWS point to the rows
            afterwards; so a backend may send it to its device with the segments.
        embedding_dim: Weights in a row, for ``plan``.
        kept: What a backend keeps for later calls that differ from this one in addresses alone.

    Returns:
        rows: int64 [n], as ``find`` returns them.
        new: int64 [m], position of each new id's first occurrence, ascending; None if there is
            none. A backend that does not wait for the device returns [n], filled up with -1.

    Source: linear probing, Knuth, TAOCP vol. 3, 6.4, Algorithm L; the claim by compare-and-swap
    and the minimum over first positions are ours.
    """
    with backend.region("recis::find_or_insert", lambda: traffic.of_find(num_ids)):
        module = backend.module("hash_index", device)
        check = None
        has_policies = None if kept is None else kept.get("has_policies")
        if has_policies is None:
            has_policies = bool(segments[:, SEGMENT_FLAGS].max(initial=0) >= CHECK_ADMISSION)
            if kept is not None:
                kept["has_policies"] = has_policies
        if has_policies:
            check = admission.begin_check(
                segments, num_ids, tables, segment_tables, device, occurrences
            )
            _read_clocks(segments, tables, segment_tables)
        room = None if make_room is None else _RoomCheck(check, make_room)
        rows: Tensor
        new: Tensor | None
        claims, is_inserted = list[Claim](), False
        try:
            rows, new = module.find_or_insert(
                *(segments, num_ids, tables, segment_tables, room or check, device, claims),
                *(plan, embedding_dim, kept),
            )
            if plan is not None and not backend.is_async(device):
                point_to_rows(plan, rows)
            if room is not None and not room.was_made:  # nothing is missing here
                room.make(rows)
            if new is not None and write_new is not None:
                write_new(rows, new)
            is_inserted = True
            if has_policies:
                _touch(segments, rows, occurrences)
        except BaseException:
            if is_inserted:  # counted twice, perhaps, but never without a time
                _touch(segments, rows, occurrences)
                raise
            _undo(claims)
            if write_new is not None and any(claim.new is not None for claim in claims):
                _write_inserted(module, segments, num_ids, device, claims, write_new)
            raise
    return rows, new


class _RoomCheck:
    """Check of what is about to be inserted that makes room for what it admits.

    Args:
        check: Of the admission policies, or None.
        make: As ``make_room`` for ``find_or_insert``.

    Attributes:
        make: As given.
        was_made: Whether it was called.
    """

    def __init__(
        self, check: admission.CheckFunction | None, make: Callable[[Tensor], None]
    ) -> None:
        self._check, self.make, self.was_made = check, make, False

    def __call__(self, misses: Tensor | None, rows: Tensor) -> Tensor | None:
        admitted = misses if self._check is None else self._check(misses, rows)
        self.was_made = True
        self.make(rows)
        return admitted


def _undo(claims: Sequence[Claim]) -> None:
    """Make the ids of an insertion unknown that did not come to its end."""
    for tables, counts, _ in reversed(claims):
        for i, table in enumerate(tables):
            table.take_back(None if counts is None else counts[i])


def _write_inserted(
    module: Any,
    segments: Segments,
    num_ids: int,
    device: torch.device,
    claims: Sequence[Claim],
    write_new: Callable[[Tensor, Tensor], None],
) -> None:
    """Write the rows of new ids that a device has inserted before the host was interrupted."""
    rows: Tensor = module.find(segments, num_ids, device)
    for claim in claims:
        if claim.new is not None:
            new = claim.new[claim.new >= 0]
            new = new[rows[new] >= 0]
            if new.numel():
                write_new(rows, new)


def take_back(header: Header, counts: Sequence[int] | None) -> int:
    """Undo an insertion: ids whose rows were not handed out, by the counts, become unknown.

    Allocates no memory that grows with the table or the ids.

    Args:
        header: int64 [HEADER_SIZE].
        counts: NUM_IDS, NEXT_ROW and NUM_FREE from before the insertion; None to leave them.

    Returns:
        Number of entries that keep an id without a row: until the index is rebuilt they take room.
    """
    values = header.read_counts()
    if counts is not None:
        values[_COUNTS] = counts
        header.publish_counts()
    num_void: int = backend.module("hash_index", header.device).drop_rowless(header)
    return num_void


def note_known(
    segments: Segments, rows: Tensor, tables: Sequence[TableMemory], segment_tables: Sequence[int]
) -> None:
    """Update policies' counts and times as ``find_or_insert`` does, for a lookup without misses.

    Args:
        segments: As for ``find_or_insert``, like all but ``rows``.
        rows: int64 [n], the rows that were found.
        tables: The group's tables.
        segment_tables: For each segment, the index of its table in ``tables``.
    """
    if segments[:, SEGMENT_FLAGS].max(initial=0) >= CHECK_ADMISSION:
        admission.begin_check(segments, rows.numel(), tables, segment_tables, rows.device, None)
        _read_clocks(segments, tables, segment_tables)
        _touch(segments, rows, None)


def _read_clocks(
    segments: Segments, tables: Sequence[TableMemory], segment_tables: Sequence[int]
) -> None:
    touching = np.flatnonzero(segments[:, SEGMENT_FLAGS] & TOUCH).tolist()
    for i in {segment_tables[segment] for segment in touching}:
        tables[i].read_clock()


def _touch(segments: Segments, rows: Tensor, occurrences: Tensor | None) -> None:
    if not (segments[:, SEGMENT_FLAGS] & TOUCH).any():
        return
    counted = None if occurrences is None else occurrences.contiguous()
    row_access.touch_(segments, rows, counted, rows.device)


def rebuild(header: Header, capacity: int, evicted: Tensor | None = None) -> tuple[Tensor, int]:
    """Move the ids of a table into a new index, except those of evicted rows.

    Args:
        header: int64 [HEADER_SIZE]; afterwards it points to the new index, or to the old one if
            this fails. The caller keeps the old one alive until it has the new one.
        capacity: Capacity of the new index, a power of two.
        evicted: bool [rows], rows whose ids are removed; None keeps all. On return only rows that
            had an id are set.

    Returns:
        The new entries, and the number of removed ids.
    """
    with backend.region("recis::rebuild"):
        module, before = backend.module("hash_index", header.device), header.read_counts().copy()
        entries: Tensor = module.allocate_entries(capacity, header.device)
        old, new = (int(before[ENTRIES]), int(before[CAPACITY])), entries.data_ptr()
        removed: int = module.rebuild(old, header, (new, *_shape_of(entries)), evicted)
        try:
            enter_entries(header, entries, int(before[NUM_IDS]) - removed)
        except BaseException:
            header.restore(before)
            raise
        return entries, removed


def fill(header: Header, entries: Tensor) -> None:
    """Add ids that are not in the index yet; there must be room for them.

    Args:
        header: int64 [HEADER_SIZE].
        entries: int64 [m, 2], distinct ids, each with its row.
    """
    if len(entries):
        old, values = entries.contiguous(), header.read_counts()
        values[NUM_IDS] += len(old)  # before they are there: an index too full has no end
        header.publish_counts()
        place = (int(values[ENTRIES]), int(values[SHIFT]), int(values[CAPACITY]))
        backend.module("hash_index", header.device).rebuild(
            (old.data_ptr(), len(old) - 1), header, place, None
        )


def id_of_row(header: Header, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return the id of each row, the inverse of the index.

    Returns:
        ids: int64 [num_rows]; undefined where no id has the row.
        occupied: bool [num_rows], whether an id has the row.
    """
    inverse: tuple[Tensor, Tensor]
    inverse = backend.module("hash_index", header.device).id_of_row(header, num_rows)
    return inverse


__all__ = [
    "EMPTY",
    "MIN_CAPACITY",
    "NO_ROW",
    "PADDING",
    "Claim",
    "Segments",
    "TableMemory",
    "capacity_for",
    "describe",
    "empty_entries",
    "enter_entries",
    "enter_starts",
    "fill",
    "find",
    "find_or_insert",
    "id_of_row",
    "max_load",
    "note_known",
    "point_to_rows",
    "rebuild",
    "take_back",
    "write_addresses",
]
assert torch.iinfo(torch.int64).min == EMPTY
