"""The hash index: id -> row. Contract of find, find_or_insert and rebuild.

Open addressing with linear probing from the first entry of a cache line; entries ``(key, row)``
stand side by side, so that nearly every search is one memory transaction. The line is named by the
top bits of a mixed hash, so doubling the index maps old lines to new ones in order: growth streams
through memory. No tombstones: removal rebuilds.

Ops take a *group* of tables: one segment a feature says where its ids lie, which table they ask and
what its padding id is. Positions count the ids of all features, one feature after the other.
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
    EMPTY,
    ENTRIES,
    NO_ROW,
    NUM_IDS,
    PADDING,
    SCREEN,
    SEGMENT_FLAGS,
    SEGMENT_IDS,
    SEGMENT_START,
    SHIFT,
    STAMP,
)
from recis_lightning.ops.table_memory import TableMemory

Segments = npt.NDArray[np.int64]

MIN_CAPACITY = 64
# Entries an id may take at most, by size: small indices live in cache and can afford air, in
# large ones memory counts (two thirds full at the growth of a doubling index, on average).
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
        int64 [capacity + 1, 2]; the last entry is the one of the id ``EMPTY`` itself. The caller
        keeps it alive as long as the header points to it.
    """
    entries: Tensor = backend.module("hash_index", header.device).allocate_entries(
        capacity, header.device
    )
    header.read_counts()[NUM_IDS] = 0
    enter_entries(header, entries)
    header.publish_counts()
    return entries


def enter_entries(header: Header, entries: Tensor) -> None:
    """Let a header point to an index, int64 [capacity + 1, 2]; the caller keeps that alive."""
    values, capacity = header.fields, len(entries) - 1
    values[ENTRIES] = entries.data_ptr()
    values[SHIFT] = 64 - (capacity.bit_length() - 1)
    values[CAPACITY] = capacity
    header.publish()


def describe(segments: Segments, ids: Sequence[Tensor]) -> int:
    """Enter into segments where their ids lie; return how many there are.

    Args:
        segments: int64 [num_segments, SEGMENT_SIZE]; start and address are overwritten.
        ids: int64 [n_i] for each segment, contiguous; the caller keeps them as long as the
            segments are used.
    """
    sizes = np.array([part.numel() for part in ids], np.int64)
    segments[:, SEGMENT_START] = np.cumsum(sizes) - sizes
    write_addresses(segments, ids)
    return int(sizes.sum())


def write_addresses(segments: Segments, ids: Sequence[Tensor]) -> None:
    """Enter where ids lie into segments that know already where each of them starts."""
    addresses = np.array([part.data_ptr() for part in ids], np.int64)
    segments[:, SEGMENT_IDS] = addresses - 8 * segments[:, SEGMENT_START]


def find(segments: Segments, num_ids: int, device: torch.device) -> Tensor:
    """Look ids up and change nothing.

    Args:
        segments: int64 [num_segments, SEGMENT_SIZE], by start; duplicate ids allowed.
        num_ids: n, in all segments together.
        device: Where the ids are.

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
    sightings: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Look ids up, give unknown ones a row, and stamp rows with their table's step.

    Only segments with the INSERT flag insert, and all segments of one table carry the same flags:
    whether it inserts is the table's policy. Those with the SCREEN flag insert what the table's
    memory of sightings lets in (``ops.admission``). Only tables with a column stamp; those with
    the STAMP flag note more than the step (``ops.row_access``).

    Rows are handed out in the order in which ids first appear, freed rows first: the result does
    not depend on how many threads ran. Rows of new ids are not initialised here.

    Args:
        segments: As for ``find``.
        num_ids: n.
        tables: The group's tables; each is asked for room as it is needed.
        segment_tables: For each segment, its table's position in ``tables``.
        device: Where the ids are.
        sightings: int64 [n], how many occurrences each position stands for, for policies that
            count; None means 1.

    Returns:
        rows: int64 [n], as ``find`` returns them.
        new: int64 [m], positions of the first sight of each new id, ascending; None if none. A
            backend that does not wait for the device fills it up with -1.

    Source: linear probing, Knuth, TAOCP vol. 3, 6.4, Algorithm L; the claim by compare-and-swap
    and the minimum over first positions are ours.
    """
    with backend.region("recis::find_or_insert"):
        module = backend.module("hash_index", device)
        screen = None
        asks = segments[:, SEGMENT_FLAGS].max(initial=0) >= SCREEN  # as a rule no policy does
        if asks:
            screen = admission.screening(
                segments, num_ids, tables, segment_tables, device, sightings
            )
        found: tuple[Tensor, Tensor | None]
        found = module.find_or_insert(segments, num_ids, tables, segment_tables, screen, device)
        if asks:
            _stamp(segments, found[0], tables, segment_tables, sightings)
    return found


def note_known(
    segments: Segments, rows: Tensor, tables: Sequence[TableMemory], segment_tables: Sequence[int]
) -> None:
    """Do for policies what ``find_or_insert`` does, after a training lookup without misses.

    Args:
        segments: As for ``find_or_insert``, like all but ``rows``.
        rows: int64 [n], what was found.
        tables: The group's tables.
        segment_tables: For each segment, its table's position in ``tables``.
    """
    if segments[:, SEGMENT_FLAGS].max(initial=0) >= SCREEN:
        admission.screening(segments, rows.numel(), tables, segment_tables, rows.device, None)
        _stamp(segments, rows, tables, segment_tables, None)


def _stamp(
    segments: Segments,
    rows: Tensor,
    tables: Sequence[TableMemory],
    segment_tables: Sequence[int],
    sightings: Tensor | None,
) -> None:
    stamped = np.flatnonzero(segments[:, SEGMENT_FLAGS] & STAMP).tolist()
    if not stamped:
        return
    for number in {segment_tables[segment] for segment in stamped}:
        tables[number].read_clock()
    weights = None if sightings is None else sightings.contiguous()
    row_access.stamp_(segments, rows, weights, rows.device)


def rebuild(header: Header, capacity: int, evicted: Tensor | None = None) -> tuple[Tensor, int]:
    """Move the ids of a table into a new index, leaving out those of evicted rows.

    Args:
        header: int64 [HEADER_SIZE]; afterwards it points to the new index.
        capacity: Capacity of the new index, a power of two.
        evicted: bool [rows], the rows whose ids are left out; None keeps all. On return it holds
            only rows that did have an id.

    Returns:
        The new entries, and how many ids were left out.
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
    """Turn the index around.

    Returns:
        ids: int64 [num_rows]; undefined where no id has the row.
        occupied: bool [num_rows].
    """
    turned: tuple[Tensor, Tensor]
    turned = backend.module("hash_index", header.device).id_of_row(header, num_rows)
    return turned


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
