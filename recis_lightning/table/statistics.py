"""Statistics of a table, and the memory of evicted ids by which it counts readmissions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

_FLUSH_IDS = 1 << 16  # new ids kept until they are compared, all at once


class TableStatistics(NamedTuple):
    """Sizes now, and counts since the table was made (loading a state is not counted).

    Attributes:
        rows: Ids that have a row.
        capacity: Entries of the index.
        load: Share of them that is filled.
        index_bytes: Of the index.
        weight_bytes: Of the weights that there is room for, and of the lists of blocks and rows.
        state_bytes: Of the optimizer state that there is room for.
        column_bytes: Of what policies keep: columns, admission counts, pins, evicted ids.
        admitted: Ids given a row, by a training lookup or ``insert``.
        refused: Occurrences in training lookups that read zeros because the admission policy
            rejected their id.
        evicted: Rows removed by ``evict``.
        readmitted: Ids given a row after an eviction; 0 without ``track_readmissions``.
    """

    rows: int
    capacity: int
    load: float
    index_bytes: int
    weight_bytes: int
    state_bytes: int
    column_bytes: int
    admitted: int
    refused: int
    evicted: int
    readmitted: int

    @property
    def rejected(self) -> int:
        """Alias of ``refused``."""
        return self.refused


class Forgotten(NamedTuple):
    """Result of ``HashTable.forget``.

    Attributes:
        rows: Rows that it removed, on this rank.
        sketch_counts_them: Whether the ids still count in a sketch of admission counts: it holds no
            id, and cannot take the counts of one out.
    """

    rows: int
    sketch_counts_them: bool


class ReadmissionTracker:
    """Bounded memory of the ids evicted last, and how many of them have come back.

    Args:
        capacity: Evicted ids remembered; of more, those evicted first are forgotten.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._count = 0
        self._ids = np.empty(0, np.int64)  # ascending
        self._evictions = np.empty(0, np.int64)  # number of the eviction of each
        self._away = np.empty(0, np.bool_)  # whether each is still without a row
        self._num_evictions = 0
        self._new: list[npt.NDArray[np.int64]] = []  # not compared yet

    def note_new(self, ids: Tensor) -> None:
        """Note distinct ids, int64 [n], that were given a row."""
        if not len(self._ids) or not ids.numel():
            return
        self._new.append(ids.numpy())
        if sum(map(len, self._new)) > _FLUSH_IDS:
            self._flush()

    def note_evicted(self, ids: Tensor) -> None:
        """Remember distinct ids, int64 [n], that were evicted; the table undoes it if it fails."""
        self._flush()
        self._num_evictions += 1
        kept, new = self._away, np.sort(ids.numpy())
        old, when = self._ids[kept], self._evictions[kept]
        places = np.searchsorted(old, new)
        self._ids = np.insert(old, places, new)
        self._evictions = np.insert(when, places, self._num_evictions)
        surplus = len(self._ids) - self.capacity
        if surplus > 0:
            stays = np.sort(np.argsort(self._evictions, kind="stable")[surplus:])
            self._ids, self._evictions = self._ids[stays], self._evictions[stays]
        self._away = np.ones(len(self._ids), np.bool_)

    def forget(self, ids: Tensor) -> None:
        """Forget ids, int64 [n] on the CPU, as if they had never been evicted."""
        self._flush()
        kept = ~np.isin(self._ids, ids.numpy())
        self._ids, self._evictions = self._ids[kept], self._evictions[kept]
        self._away = self._away[kept]

    def _flush(self) -> None:
        if not self._new:
            return
        # An id may be there twice: deleted and given a row again since it came back.
        new = np.unique(np.concatenate(self._new))
        self._new = []
        places = np.minimum(np.searchsorted(self._ids, new), len(self._ids) - 1)
        back = places[(self._ids[places] == new) & self._away[places]]
        away = self._away.copy()  # arrays are replaced, never changed: see note_evicted
        away[back] = False
        self._away = away
        self._count += len(back)

    @property
    def count(self) -> int:
        """Ids that came back so far."""
        self._flush()
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of the ids remembered."""
        return self._ids.nbytes + self._evictions.nbytes + self._away.nbytes


__all__ = ["Forgotten", "ReadmissionTracker", "TableStatistics"]
