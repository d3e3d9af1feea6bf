"""What a look at a table's rows finds: ages, norms, and rows that training has ruined."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Bins [edge, next edge). Ages in steps: 0, 1, 2-3, 4-7, ... Norms: two bins for each doubling.
AGE_EDGES = (0.0, *(2.0**power for power in range(32)), math.inf)
NORM_EDGES = (0.0, *(2.0 ** (half / 2) for half in range(-32, 33)), math.inf)
_AGE_BOUNDARIES, _NORM_BOUNDARIES = np.array(AGE_EDGES[1:-1]), np.array(NORM_EDGES[1:-1])

Counts = npt.NDArray[np.int64]
Norms = npt.NDArray[np.float32] | npt.NDArray[np.float64]


class RowSurvey(NamedTuple):
    """What a look at some or all rows of a table found.

    Attributes:
        num_rows: Rows looked at, each with an id.
        nonfinite_rows: int64 [n], those with NaN or Inf among weights or optimizer state.
        norms: For each bin of ``NORM_EDGES`` the rows whose weights have such an L2 norm; rows with
            NaN or Inf among their weights are in none.
        norm_sum, norm_max: Over the same rows.
        ages: For each bin of ``AGE_EDGES`` the rows last seen so many steps ago; None where no
            policy keeps stamps.
        age_sum, age_max: In steps; 0 where no policy keeps stamps.
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
    def norm_mean(self) -> float:
        """Mean norm; 0 if no row was looked at."""
        return self.norm_sum / max(sum(self.norms), 1)

    @property
    def age_mean(self) -> float:
        """Mean age in steps; 0 if no row was looked at."""
        return self.age_sum / max(self.num_rows, 1)


class Rows(NamedTuple):
    """A piece of a table's rows.

    Attributes:
        rows: int64 [n], where they are.
        weights: [n, dim], on the CPU.
        slots: Optimizer state, [n, words] each, on the CPU.
        ages: int64 [n], steps since they were seen, or None.
    """

    rows: Tensor
    weights: Tensor
    slots: list[Tensor]
    ages: Tensor | None


def survey(pieces: Iterator[Rows]) -> RowSurvey:
    """Look at rows, a piece at a time.

    Args:
        pieces: At least one; all with ages or none.

    Returns:
        What they are like.
    """
    num_rows, norm_sum, norm_max, age_sum, age_max = 0, 0.0, 0.0, 0, 0
    bad: list[Tensor] = []
    norms = np.zeros(len(NORM_EDGES) - 1, np.int64)
    ages: Counts | None = None
    for piece in pieces:
        num_rows += piece.rows.numel()
        norm, finite = _norms(piece.weights)
        counted = norm if finite.all() else norm[finite]
        norms += _bin_counts(counted, _NORM_BOUNDARIES)
        if len(counted):
            norm_sum += float(counted.sum(dtype=np.float64))
            norm_max = max(norm_max, float(counted.max()))
        for slot in piece.slots:
            # As a rule one look at all of it tells.
            words = np.isfinite(slot.numpy())
            if not words.all():
                finite &= words.all(1)
        if not finite.all():
            bad.append(piece.rows.cpu()[torch.from_numpy(~finite)])
        if piece.ages is not None:
            age = piece.ages.cpu().numpy()
            ages = np.zeros(len(AGE_EDGES) - 1, np.int64) if ages is None else ages
            ages += _bin_counts(age, _AGE_BOUNDARIES)
            if len(age):
                age_sum += int(age.sum())
                age_max = max(age_max, int(age.max()))
    nonfinite = torch.cat(bad) if bad else torch.empty(0, dtype=torch.int64)
    counts = None if ages is None else ages.tolist()
    return RowSurvey(
        num_rows, nonfinite, norms.tolist(), norm_sum, norm_max, counts, age_sum, age_max
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


__all__ = ["AGE_EDGES", "NORM_EDGES", "RowSurvey", "Rows", "survey"]
