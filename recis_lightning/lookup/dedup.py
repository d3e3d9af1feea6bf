"""The distinct ids of a lookup, sorted by the rank that owns them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.distributed.ownership import owner_of
from recis_lightning.ops import backend, hash_index
from recis_lightning.ops.async_copy import to_device_async
from recis_lightning.ops.hash_index import Segments
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import (
    HAS_PADDING,
    INSERT,
    NEXT_ROW,
    NUM_FREE,
    NUM_IDS,
    PADDING,
    SEGMENT_FLAGS,
    SEGMENT_HEADER,
    SEGMENT_START,
    UNKNOWN,
)


class DistinctIds(NamedTuple):
    """What of a lookup has to travel.

    Attributes:
        ids: int64 [u], by owner, then table, then first occurrence.
        counts: int64 [num_ranks, num_tables], how many of each owner and table.
        places: int64 [n], for each position of the lookup that of its id in ``ids``, or PADDING.
    """

    ids: Tensor
    counts: npt.NDArray[np.int64]
    places: Tensor

    def num_sighted(self) -> Tensor:
        """Return int64 [u], how often each of ``ids`` occurs."""
        size = len(self.ids)
        if self.places.is_cpu:
            return torch.bincount(self.places[self.places >= 0], minlength=size)
        counts = self.places.new_zeros(size + 1)  # bincount would wait; padding goes to the last
        counts.index_add_(
            0,
            self.places.remainder(size + 3).clamp(max=size),
            counts.new_ones(1).expand_as(self.places),
        )
        return counts[:size]


class DistinctIdFinder:
    """Finds the distinct ids of a group's lookups, with the index that finds rows.

    Each lookup starts an empty index a table and inserts the ids: the row that an id gets is its
    number, the same for every order in which threads run.

    Args:
        segments: As the group describes its features to ``find_or_insert``; headers and the
            INSERT flags are replaced.
        segment_tables: For each segment, its table's position.
        num_tables: Of the group.
        num_ranks: Ranks that own ids.
        device: Where ids are.
    """

    def __init__(
        self,
        segments: Segments,
        segment_tables: Sequence[int],
        num_tables: int,
        num_ranks: int,
        device: torch.device,
    ) -> None:
        self._segment_tables = list(segment_tables)
        self._num_ranks, self._device = num_ranks, device
        self._owners = torch.tensor(self._segment_tables, device=device)
        self._seen = [_SeenIds(device) for _ in range(num_tables)]
        self._segments = segments.copy()
        self._segments[:, SEGMENT_FLAGS] = segments[:, SEGMENT_FLAGS] & HAS_PADDING | INSERT
        headers = [self._seen[table].header.address for table in segment_tables]
        self._segments[:, SEGMENT_HEADER] = headers

    def find(self, ids: Sequence[Tensor]) -> DistinctIds:
        """Return the distinct ids of each table among ``ids``, int64 [n_i] for each segment."""
        num_tables, num_ids = len(self._seen), hash_index.describe(self._segments, ids)
        starts = self._segments[:, SEGMENT_START]
        sizes = np.diff(starts, append=num_ids)
        per_table = np.bincount(self._segment_tables, sizes, num_tables).astype(np.int64)
        # An id's number is at least that of all ids of the tables before: numbers are distinct
        # over tables, with gaps.
        numbers = np.cumsum(per_table) - per_table
        for seen, size, number in zip(
            self._seen, per_table.tolist(), numbers.tolist(), strict=True
        ):
            seen.start(size, number)
        rows, new = hash_index.find_or_insert(
            self._segments, num_ids, self._seen, self._segment_tables, self._device
        )
        num_keys = self._num_ranks * num_tables
        if new is None:
            return DistinctIds(rows[:0], np.zeros((self._num_ranks, num_tables), np.int64), rows)
        is_new = None
        if backend.is_async(self._device):  # then -1 fills up what is not new
            is_new, new = new >= 0, new.clamp(min=0)
        joined = ids[0] if len(ids) == 1 else torch.cat(list(ids))
        distinct = joined[new]
        keys = owner_of(distinct, self._num_ranks)
        if num_tables > 1:
            if is_new is None:
                bounds = torch.from_numpy(np.append(starts, num_ids))
                found = torch.searchsorted(new, bounds).diff()
                owners = torch.repeat_interleave(self._owners, found)
            else:
                segments = (
                    torch.searchsorted(to_device_async(starts, self._device), new, right=True) - 1
                )
                owners = self._owners[segments]
            keys = keys * num_tables + owners
        if is_new is None:
            order = _stable_order(keys, num_keys)
            counts = torch.bincount(keys, minlength=num_keys).numpy()
        else:
            keys, order = torch.sort(torch.where(is_new, keys, num_keys), stable=True)
            ends = torch.arange(num_keys + 1, device=self._device)
            cuts = torch.searchsorted(keys, ends).cpu().numpy()  # waits: it must know what to send
            counts, order = np.diff(cuts), order[: int(cuts[-1])]
        # -1 and -2, the rows of ids without one, index from the end.
        places = rows.new_empty(num_ids + 2)
        places[num_ids], places[num_ids + 1] = PADDING, UNKNOWN
        places[rows[new[order]]] = torch.arange(len(order), device=self._device)
        return DistinctIds(distinct[order], counts.reshape(-1, num_tables), places[rows])


class _SeenIds:
    """The ids of one table that a lookup has met, as a table that index ops know."""

    def __init__(self, device: torch.device) -> None:
        self.header = Header(device, backend.is_async(device))
        self._entries = self._empty_entry = torch.empty(0, 2, dtype=torch.int64, device=device)
        self._capacity = 0

    def start(self, num_ids: int, first_number: int) -> None:
        """Forget all ids, and make room for ``num_ids``; numbers begin at ``first_number``."""
        capacity = hash_index.capacity_for(num_ids)
        if capacity <= self._capacity <= 8 * capacity:
            self._entries.copy_(self._empty_entry)
        else:
            self._entries = hash_index.empty_entries(self.header, capacity)
            self._empty_entry = self._entries[-1].clone()
            self._capacity = capacity
        self.header.fields[[NUM_IDS, NUM_FREE, NEXT_ROW]] = 0, 0, first_number
        self.header.publish_counts()

    def reserve_ids(self, num_new: int) -> None:
        """``start`` has made room for all."""

    def larger_index(self, num_new: int) -> None:
        """``start`` has made room for all."""

    def take_index(self, entries: Tensor) -> None:
        """There is no larger one."""

    def reserve_rows(self, num_new: int) -> None:
        """Rows are numbers only."""

    def sure_room(self) -> int:
        """``start`` has made room for all."""
        return sys.maxsize

    def reserve_ahead(self, num_new: int, num_ids: int) -> None:
        """The next ``start`` makes room for all."""

    def read_clock(self) -> None:
        """No times are kept."""

    def rebuild_index(self) -> None:
        """The next ``start`` empties the index."""

    def begin_screening(self) -> None:
        """No segment asks for it."""

    def reserve_sightings(self, at_most: int, count: Callable[[], int] | None = None) -> None:
        """No segment asks for it."""


def _stable_order(keys: Tensor, num_keys: int) -> Tensor:
    """Return the positions of ``keys``, each in ``[0, num_keys)``, by key and then position."""
    if num_keys <= 1 << 15:
        # NumPy sorts 16 bits by radix: ten times as fast as 64 bits by comparison.
        return torch.from_numpy(np.argsort(keys.numpy().astype(np.int16), kind="stable"))
    return torch.argsort(keys, stable=True)


__all__ = ["DistinctIdFinder", "DistinctIds"]
