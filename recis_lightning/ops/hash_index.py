"""Hash index of ids to rows: the contract.

Open addressing with linear probing from the first entry of a cache line. Entries ``(key, row)`` are
contiguous, so nearly every search is one memory transaction. The top bits of a mixed hash select
the line, so a doubling of the index maps old lines to new ones in order: growth streams through
memory. There are no tombstones: a removal rebuilds the index.

Ops take a *group* of tables. Each feature has a *segment*, which holds the address of its ids, the
header of its table and its padding id. Positions count the ids of all features, one feature after
the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import admission, backend, row_access
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import (
    CAPACITY,
    CHECK_ADMISSION,
    EMPTY,
    ENTRIES,
    NO_ROW,
    NUM_IDS,
    PADDING,
    SEGMENT_FLAGS,
    SEGMENT_IDS,
    SEGMENT_START,
    SHIFT,
    TOUCH,
)
from recis_lightning.ops.table_memory import TableMemory

Segments = npt.NDArray[np.int64]

MIN_CAPACITY = 64
# Load limits by size: a small index stays in cache and can use a lower load factor, in a large one
# memory counts.
_MAX_LOAD_SMALL, _MAX_LOAD_LARGE, _LARGE_CAPACITY = 0.5, 0.8, 1 << 22


def max_load(capacity: int) -> float:
    """Return the share of ``capacity`` that may be filled before the index grows."""
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
    header.read_counts()[NUM_IDS] = 0
    enter_entries(header, entries)
    header.publish_counts()
    return entries


def enter_entries(header: Header, entries: Tensor) -> None:
    """Point a header to an index, int64 [capacity + 1, 2]; the caller keeps the tensor alive."""
    values, capacity = header.fields, len(entries) - 1
    values[ENTRIES] = entries.data_ptr()
    values[SHIFT] = 64 - (capacity.bit_length() - 1)
    values[CAPACITY] = capacity
    header.publish()


def describe(segments: Segments, ids: Sequence[Tensor]) -> int:
    """Enter start and address of their ids into segments; return the number of all ids.

    Args:
        segments: int64 [num_segments, SEGMENT_SIZE]; start and address are overwritten.
        ids: int64 [n_i] for each segment, contiguous; the caller keeps them alive as long as the
            segments are used.
    """
    sizes = np.array([part.numel() for part in ids], np.int64)
    segments[:, SEGMENT_START] = np.cumsum(sizes) - sizes
    write_addresses(segments, ids)
    return int(sizes.sum())


def write_addresses(segments: Segments, ids: Sequence[Tensor]) -> None:
    """Enter addresses of ids into segments whose starts are entered already."""
    addresses = np.array([part.data_ptr() for part in ids], np.int64)
    segments[:, SEGMENT_IDS] = addresses - 8 * segments[:, SEGMENT_START]


def find(segments: Segments, num_ids: int, device: torch.device) -> Tensor:
    """Return the rows of ids; changes nothing.

    Args:
        segments: int64 [num_segments, SEGMENT_SIZE], by start; duplicate ids allowed.
        num_ids: n, in all segments together.
        device: Device of the ids.

    Returns:
        int64 [n], rows; ``UNKNOWN`` (-1) where there is none, ``PADDING`` (-2) for a padding id.
    """
    with backend.region("recis::find"):
        rows: Tensor = backend.module("hash_index", device).find(segments, num_ids, device)
    return rows


def find_or_insert(
    segments: Segments,
    num_ids: int,
    tables: Sequence[TableMemory],
    segment_tables: Sequence[int],
    device: torch.device,
    occurrences: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the rows of ids, insert unknown ones, and write last-seen steps.

    Only segments with the INSERT flag insert, and those with the CHECK_ADMISSION flag only the ids
    that the policy admits (``ops.admission``). Segments of one table may differ in these: where an
    id is not inserted, it reads as it was before, though another segment inserts it. Tables with a
    column LAST_SEEN write their step to it; segments with the TOUCH flag keep further access
    metadata (``ops.row_access``).

    Rows are assigned in the order in which ids first appear, freed rows first, so the result does
    not depend on the number of threads. Rows of new ids are not initialised here.

    Args:
        segments: As for ``find``.
        num_ids: n.
        tables: The group's tables; each reserves room as it is needed.
        segment_tables: For each segment, the index of its table in ``tables``.
        device: Device of the ids.
        occurrences: int64 [n], how many occurrences each position stands for, for policies that
            count; None means 1.

    Returns:
        rows: int64 [n], as ``find`` returns them.
        new: int64 [m], position of each new id's first occurrence, ascending; None if there is
            none. A backend that does not wait for the device returns [n], filled up with -1.

    Source: linear probing, Knuth, TAOCP vol. 3, 6.4, Algorithm L; the claim by compare-and-swap
    and the minimum over first positions are ours.
    """
    with backend.region("recis::find_or_insert"):
        module = backend.module("hash_index", device)
        check = None
        has_policies = segments[:, SEGMENT_FLAGS].max(initial=0) >= CHECK_ADMISSION
        if has_policies:
            check = admission.begin_check(
                segments, num_ids, tables, segment_tables, device, occurrences
            )
        rows: Tensor
        new: Tensor | None
        rows, new = module.find_or_insert(segments, num_ids, tables, segment_tables, check, device)
        if has_policies:
            _touch(segments, rows, tables, segment_tables, occurrences)
    return rows, new


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
        _touch(segments, rows, tables, segment_tables, None)


def _touch(
    segments: Segments,
    rows: Tensor,
    tables: Sequence[TableMemory],
    segment_tables: Sequence[int],
    occurrences: Tensor | None,
) -> None:
    touching = np.flatnonzero(segments[:, SEGMENT_FLAGS] & TOUCH).tolist()
    if not touching:
        return
    for i in {segment_tables[segment] for segment in touching}:
        tables[i].read_clock()
    counted = None if occurrences is None else occurrences.contiguous()
    row_access.touch_(segments, rows, counted, rows.device)


def rebuild(header: Header, capacity: int, evicted: Tensor | None = None) -> tuple[Tensor, int]:
    """Move the ids of a table into a new index, except those of evicted rows.

    Args:
        header: int64 [HEADER_SIZE]; afterwards it points to the new index.
        capacity: Capacity of the new index, a power of two.
        evicted: bool [rows], rows whose ids are removed; None keeps all. On return only rows that
            had an id are set.

    Returns:
        The new entries, and the number of removed ids.
    """
    with backend.region("recis::rebuild"):
        old = _entries(header)
        num_ids = int(header.read_counts()[NUM_IDS])
        entries = empty_entries(header, capacity)
        removed = backend.module("hash_index", header.device).rebuild(old, header, evicted)
        header.fields[NUM_IDS] = num_ids - removed
        header.publish_counts()
        return entries, removed


def fill(header: Header, entries: Tensor) -> None:
    """Add ids that are not in the index yet; there must be room for them.

    Args:
        header: int64 [HEADER_SIZE].
        entries: int64 [m, 2], distinct ids, each with its row.
    """
    if len(entries):
        old = entries.contiguous()
        backend.module("hash_index", header.device).rebuild(
            (old.data_ptr(), len(old) - 1), header, None
        )
        header.read_counts()[NUM_IDS] += len(old)
        header.publish_counts()


def id_of_row(header: Header, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return the id of each row, the inverse of the index.

    Returns:
        ids: int64 [num_rows]; undefined where no id has the row.
        occupied: bool [num_rows], whether an id has the row.
    """
    inverse: tuple[Tensor, Tensor]
    inverse = backend.module("hash_index", header.device).id_of_row(header, num_rows)
    return inverse


def _entries(header: Header) -> tuple[int, int]:
    values = header.fields
    return int(values[ENTRIES]), int(values[CAPACITY])


__all__ = [
    "EMPTY",
    "MIN_CAPACITY",
    "NO_ROW",
    "PADDING",
    "Segments",
    "TableMemory",
    "capacity_for",
    "describe",
    "empty_entries",
    "enter_entries",
    "fill",
    "find",
    "find_or_insert",
    "id_of_row",
    "max_load",
    "note_known",
    "rebuild",
    "write_addresses",
]
assert torch.iinfo(torch.int64).min == EMPTY
