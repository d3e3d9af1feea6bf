"""What a look at a table's rows finds: ages, norms, and rows that training has ruined."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Bins [edge, next edge). Ages in steps: 0, 1, 2-3, 4-7, ... Norms: two bins for each doubling.
AGE_EDGES = (0.0, *(2.0**power for power in range(32)), math.inf)
NORM_EDGES = (0.0, *(2.0 ** (half / 2) for half in range(-32, 33)), math.inf)


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
        weights: [n, dim].
        slots: Optimizer state, [n, words] each.
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
    norms = [0] * (len(NORM_EDGES) - 1)
    ages: list[int] | None = None
    for piece in pieces:
        num_rows += piece.rows.numel()
        norm, finite = _norms(piece.weights)
        counted = norm[finite]
        norms = _added(norms, _bin_counts(counted, NORM_EDGES))
        if counted.numel():
            norm_sum += float(counted.sum(dtype=torch.float64))
            norm_max = max(norm_max, float(counted.max()))
        for slot in piece.slots:
            finite &= _finite(slot)
        if not bool(finite.all()):
            bad.append(piece.rows[~finite])
        if piece.ages is not None:
            ages = _added(ages, _bin_counts(piece.ages, AGE_EDGES))
            if piece.ages.numel():
                age_sum += int(piece.ages.sum())
                age_max = max(age_max, int(piece.ages.max()))
    nonfinite = torch.cat(bad).cpu() if bad else torch.empty(0, dtype=torch.int64)
    return RowSurvey(num_rows, nonfinite, norms, norm_sum, norm_max, ages, age_sum, age_max)


def _norms(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows' norms, and which rows are finite."""
    norms = torch.linalg.vector_norm(weights.float(), dim=1)
    finite = norms.isfinite()
    # A large norm may overflow where no weight is infinite.
    suspects = (~finite).nonzero().squeeze(1)
    if suspects.numel():
        exact = torch.linalg.vector_norm(weights[suspects].double(), dim=1)
        norms = norms.double().index_copy_(0, suspects, exact)
        finite = norms.isfinite()
    return norms, finite


def _finite(slot: Tensor) -> Tensor:
    # One sum a row is cheaper than a look at each word; only what it cannot tell is looked at.
    finite = slot.sum(1).isfinite()
    suspects = (~finite).nonzero().squeeze(1)
    if suspects.numel():
        finite[suspects] = slot[suspects].isfinite().all(1)
    return finite


def _bin_counts(values: Tensor, edges: tuple[float, ...]) -> list[int]:
    bins = torch.bucketize(values.double(), _boundaries(edges, values.device), right=True)
    counts: list[int] = torch.bincount(bins, minlength=len(edges) - 1).tolist()
    return counts


@functools.cache
def _boundaries(edges: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(edges[1:-1], dtype=torch.float64, device=device)


def _added(counts: list[int] | None, more: list[int]) -> list[int]:
    return more if counts is None else [a + b for a, b in zip(counts, more, strict=True)]


__all__ = ["AGE_EDGES", "NORM_EDGES", "RowSurvey", "Rows", "survey"]
