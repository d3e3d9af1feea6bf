"""Scan of a table's rows: their norms, their ages, and rows with NaN or Inf."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops.layout import CAPACITY, NO_ROW
from recis_lightning.table.storage import Storage

# Bins [edge, next edge). Ages in steps: 0, 1, 2-3, 4-7, ... Norms: two bins for each doubling.
AGE_EDGES = (0.0, *(2.0**power for power in range(32)), math.inf)
NORM_EDGES = (0.0, *(2.0 ** (half / 2) for half in range(-32, 33)), math.inf)
_AGE_BOUNDARIES, _NORM_BOUNDARIES = np.array(AGE_EDGES[1:-1]), np.array(NORM_EDGES[1:-1])
_CHUNK_ENTRIES = 1 << 16  # entries of the index scanned together

Counts = npt.NDArray[np.int64]
Norms = npt.NDArray[np.float32] | npt.NDArray[np.float64]


class RowSurvey(NamedTuple):
    """Result of a scan of some or all rows of a table.

    Attributes:
        num_rows: Rows scanned, each with an id.
        nonfinite_rows: int64 [n], those with NaN or Inf among weights or optimizer state; -1 for
            each of another rank.
        norms: For each bin of ``NORM_EDGES`` the rows whose weights have such an L2 norm; rows with
            NaN or Inf among their weights are in none.
        norm_sum, norm_max: Over the same rows.
        ages: For each bin of ``AGE_EDGES`` the rows last seen so many steps ago; None where no
            policy keeps the step.
        age_sum, age_max: In steps; 0 where no policy keeps the step.
    """

    num_rows: int
    nonfinite_rows: Tensor
    norms: list[int]
    norm_sum: float
    norm_max: float
    ages: list[int] | None
    age_sum: int
    age_max: int

    @property
    def num_nonfinite(self) -> int:
        """Rows with NaN or Inf."""
        return self.nonfinite_rows.numel()

    @property
    def norm_mean(self) -> float:
        """Mean norm; 0 if no row was scanned."""
        return self.norm_sum / max(sum(self.norms), 1)

    @property
    def age_mean(self) -> float:
        """Mean age in steps; 0 if no row was scanned."""
        return self.age_sum / max(self.num_rows, 1)

    def to_numbers(self) -> list[float]:
        """Return the scan as numbers that ranks exchange, ``NUM_SCAN_NUMBERS`` of them."""
        return [
            *(self.num_rows, self.num_nonfinite, self.norm_sum, self.norm_max),
            *(self.age_sum, self.age_max),
            *self.norms,
            *([-1] * (len(AGE_EDGES) - 1) if self.ages is None else self.ages),
        ]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> RowSurvey:
        """Return the scan of another rank from its ``to_numbers``."""
        num_rows, num_nonfinite, norm_sum, norm_max, age_sum, age_max = numbers[:_NUM_SCALARS]
        bins = [int(count) for count in numbers[_NUM_SCALARS:]]
        norms, ages = bins[: len(NORM_EDGES) - 1], bins[len(NORM_EDGES) - 1 :]
        return cls(
            num_rows=int(num_rows),
            nonfinite_rows=torch.full((int(num_nonfinite),), -1, device="cpu"),
            norms=norms,
            norm_sum=norm_sum,
            norm_max=norm_max,
            ages=None if ages[0] < 0 else ages,
            age_sum=int(age_sum),
            age_max=int(age_max),
        )

    @classmethod
    def merge(cls, parts: Sequence[RowSurvey]) -> RowSurvey:
        """Return one scan of all rows of several, which have all ages or none.

        Args:
            parts: At least one; of parts of a table, or of a table's shards on several ranks.
        """
        ages = [part.ages for part in parts if part.ages is not None]
        return cls(
            num_rows=sum(part.num_rows for part in parts),
            nonfinite_rows=torch.cat([part.nonfinite_rows for part in parts]),
            norms=[sum(bins) for bins in zip(*(part.norms for part in parts), strict=True)],
            norm_sum=sum(part.norm_sum for part in parts),
            norm_max=max(part.norm_max for part in parts),
            ages=[sum(bins) for bins in zip(*ages, strict=True)] if ages else None,
            age_sum=sum(part.age_sum for part in parts),
            age_max=max(part.age_max for part in parts),
        )


_NUM_SCALARS = 6
NUM_SCAN_NUMBERS = _NUM_SCALARS + len(NORM_EDGES) + len(AGE_EDGES) - 2


class RowChunk(NamedTuple):
    """Some rows of a table.

    Attributes:
        rows: int64 [n], their numbers.
        weights: [n, dim], on the CPU.
        slots: Optimizer state, [n, words] each, on the CPU.
        ages: int64 [n], steps since they were seen, or None.
    """

    rows: Tensor
    weights: Tensor
    slots: list[Tensor]
    ages: Tensor | None


def scan(
    storage: Storage, start: float = 0.0, stop: float = 1.0, rows: Tensor | None = None
) -> RowSurvey:
    """Scan all rows of a table, or some; ``HashTable.survey`` describes it in full.

    Args:
        storage: The table's.
        start: Where in the index to begin, in [0, 1].
        stop: Where to end, in [start, 1].
        rows: int64 [n], scan these rows instead; negative ones are passed over.

    Raises:
        ValueError: ``start`` and ``stop`` are out of range.
    """
    if not 0 <= start <= stop <= 1:
        raise ValueError(f"expected 0 <= start <= stop <= 1, got start={start}, stop={stop}")
    return scan_chunks(_chunks(storage, start, stop, rows))


def _chunks(storage: Storage, start: float, stop: float, rows: Tensor | None) -> Iterator[RowChunk]:
    capacity, step = int(storage.header.fields[CAPACITY]), storage.step
    # The entry behind the last slot is one id's own.
    end = capacity + 1 if stop == 1 else int(stop * capacity)
    first, end = (int(start * capacity), end) if rows is None else (0, rows.numel())
    column = storage.columns["last_seen"] if storage.keeps_last_seen else None
    for index in range(first, max(end, first + 1), _CHUNK_ENTRIES):
        part = slice(index, min(index + _CHUNK_ENTRIES, end))
        chosen = (storage.entries[part, 1] if rows is None else rows[part]).cpu().numpy()
        chosen = chosen[chosen.view(np.uint64) < NO_ROW]  # neither negative nor empty
        known = torch.from_numpy(chosen).to(storage.header.device)
        weights, state = storage.rows.read_whole(known)
        ages = None
        if column is not None:
            ages = (step - column.index_select(0, known)).clamp_(min=0)
        yield RowChunk(known, weights, [state], ages)


def scan_chunks(chunks: Iterable[RowChunk]) -> RowSurvey:
    """Scan rows, a chunk at a time.

    Args:
        chunks: At least one; all with ages or none.
    """
    num_rows, norm_sum, norm_max, age_sum, age_max = 0, 0.0, 0.0, 0, 0
    nonfinite: list[Tensor] = []
    norms = np.zeros(len(NORM_EDGES) - 1, np.int64)
    ages: Counts | None = None
    for chunk in chunks:
        num_rows += chunk.rows.numel()
        norm, finite = _norms(chunk.weights)
        counted = norm if finite.all() else norm[finite]
        norms += _bin_counts(counted, _NORM_BOUNDARIES)
        if len(counted):
            norm_sum += float(counted.sum(dtype=np.float64))
            norm_max = max(norm_max, float(counted.max()))
        for slot in chunk.slots:
            # As a rule all words are finite, and one pass over them tells.
            words = np.isfinite(slot.numpy())
            if not words.all():
                finite &= words.all(1)
        if not finite.all():
            nonfinite.append(chunk.rows.cpu()[torch.from_numpy(~finite)])
        if chunk.ages is not None:
            age = chunk.ages.cpu().numpy()
            ages = np.zeros(len(AGE_EDGES) - 1, np.int64) if ages is None else ages
            ages += _bin_counts(age, _AGE_BOUNDARIES)
            if len(age):
                age_sum += int(age.sum())
                age_max = max(age_max, int(age.max()))
    rows = torch.cat(nonfinite) if nonfinite else torch.empty(0, dtype=torch.int64, device="cpu")
    age_counts = None if ages is None else ages.tolist()
    return RowSurvey(
        num_rows, rows, norms.tolist(), norm_sum, norm_max, age_counts, age_sum, age_max
    )


def _norms(weights: Tensor) -> tuple[Norms, npt.NDArray[np.bool_]]:
    """Return the rows' norms, and which rows are finite."""
    words = weights.float().numpy()
    norms: Norms = np.sqrt(np.einsum("ij,ij->i", words, words))
    finite = np.isfinite(norms)
    # A large norm may overflow where no weight is infinite.
    if not finite.all():
        suspects = np.flatnonzero(~finite)
        exact = words[suspects].astype(np.float64)
        norms = norms.astype(np.float64)
        norms[suspects] = np.sqrt(np.einsum("ij,ij->i", exact, exact))
        finite = np.isfinite(norms)
    return norms, finite


def _bin_counts(values: npt.NDArray[Any], boundaries: npt.NDArray[np.float64]) -> Counts:
    bins = np.searchsorted(boundaries, values, side="right")
    return np.bincount(bins, minlength=len(boundaries) + 1)


__all__ = [
    "AGE_EDGES",
    "NORM_EDGES",
    "NUM_SCAN_NUMBERS",
    "RowChunk",
    "RowSurvey",
    "scan",
    "scan_chunks",
]
