"""Which new ids had been evicted before: a bounded memory, for a table that is asked to track."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

_FLUSH_IDS = 1 << 16  # new ids kept until they are compared, all at once


class Readmissions:
    """The ids evicted last, and how many of them have come back.

    Args:
        capacity: Evicted ids remembered; of more, those evicted first are forgotten.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._count = 0
        self._ids = np.empty(0, np.int64)  # ascending
        self._evictions = np.empty(0, np.int64)  # when each of them went
        self._away = np.empty(0, np.bool_)  # whether it has not come back since
        self._num_evictions = 0
        self._new: list[npt.NDArray[np.int64]] = []

    def note_new(self, ids: Tensor) -> None:
        """Take note of distinct ids, int64 [n], that were given a row."""
        if not len(self._ids) or not ids.numel():
            return
        self._new.append(ids.numpy())
        if sum(map(len, self._new)) > _FLUSH_IDS:
            self._flush()

    def note_evicted(self, ids: Tensor) -> None:
        """Remember distinct ids, int64 [n], that were evicted."""
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

    def _flush(self) -> None:
        if not self._new:
            return
        # An id may be there twice: deleted and given a row again since it came back.
        new = np.unique(np.concatenate(self._new))
        self._new = []
        places = np.minimum(np.searchsorted(self._ids, new), len(self._ids) - 1)
        back = places[(self._ids[places] == new) & self._away[places]]
        self._away[back] = False
        self._count += len(back)

    @property
    def count(self) -> int:
        """Ids that came back so far."""
        self._flush()
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of what is remembered."""
        return self._ids.nbytes + self._evictions.nbytes + self._away.nbytes


__all__ = ["Readmissions"]
