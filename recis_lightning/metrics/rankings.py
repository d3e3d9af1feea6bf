"""Metrics of the ranking within each group (usually a user), averaged over groups."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from recis_lightning.arguments import check_bool, check_int
from recis_lightning.metrics.checks import check_tensors
from recis_lightning.metrics.targets import check_binary

__all__ = ["NDCG", "MeanReciprocalRank", "RecallAtK"]

_MAX_EXPONENT = 1000  # sums of powers of 2 stay in float64


class RecallAtK(Metric):
    """Share of a group's positives among its ``k`` highest scores, averaged over groups.

    All groups weigh the same; those without a positive are left out, and the result is NaN, with
    a warning, if all are. Of equal scores, negatives come first, so that a constant score earns
    nothing and the order of samples does not matter. NaN if a score is NaN. Samples are kept until
    ``reset``, and ranks gather each other's.

    Args:
        k: Length of the top, at least 1.
        **kwargs: Passed to ``torchmetrics.Metric``.

    Raises:
        TypeError: ``k`` is not an int.
        ValueError: ``k`` is below 1.

    Example:
        User 7 has one of two positives in the top 2, user 9 the only one.

        >>> recall = RecallAtK(k=2)
        >>> recall.update(
        ...     preds=torch.tensor([0.9, 0.5, 0.1, 0.8, 0.3]),
        ...     target=torch.tensor([1, 0, 1, 0, 1]),
        ...     group_ids=torch.tensor([7, 7, 7, 9, 9]),
        ... )
        >>> recall.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    preds: list[Tensor]
    target: list[Tensor]
    group_ids: list[Tensor]

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = check_int("k", k, least=1)
        _add_states(self)

    @override
    def update(self, preds: Tensor, target: Tensor, group_ids: Tensor) -> None:
        """Add samples.

        Args:
            preds: Floating point scores, any shape; only their order matters.
            target: 0 or 1 for each.
            group_ids: The group of each, integers.

        Raises:
            TypeError: ``preds`` is not floating point, ``group_ids`` are not integers, or an
                argument is no tensor.
            ValueError: Numbers of elements differ, or a target is neither 0 nor 1.
        """
        _append(self, preds, target, group_ids, binary=True)

    @override
    def compute(self) -> Tensor:
        """Return the mean recall, float64 []."""
        target, group, rank, num_groups = _ranked(self)
        zeros = target.new_zeros(num_groups)
        positives = zeros.index_add(0, group, target)
        found = zeros.index_add(0, group, target * (rank <= self.k))
        return _mean_of_groups(self, found, positives)


class NDCG(Metric):
    """Discounted cumulative gain of a group's ranking, relative to the best, averaged over groups.

    A sample at rank r earns its target, or ``2 ** target - 1``, divided by ``log2(r + 1)``. All
    groups weigh the same; those whose targets are all 0 are left out, and the result is NaN, with
    a warning, if all are. Of equal scores, smaller targets come first. NaN if a score is NaN.
    Samples are kept until ``reset``, and ranks gather each other's.

    Args:
        k: Only the k highest scores, and the k highest targets, count; None: all.
        exponential: Earn ``2 ** target - 1``.
        **kwargs: Passed to ``torchmetrics.Metric``.

    Raises:
        TypeError: ``k`` is neither an int nor None, or ``exponential`` is not a bool.
        ValueError: ``k`` is below 1.

    Example:
        >>> ndcg = NDCG(k=2)
        >>> ndcg.update(
        ...     preds=torch.tensor([0.9, 0.5, 0.1]),
        ...     target=torch.tensor([0, 3, 0]),
        ...     group_ids=torch.tensor([7, 7, 7]),
        ... )
        >>> ndcg.compute()
        tensor(0.6309, dtype=torch.float64)

    Source: Järvelin and Kekäläinen, 2002.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    preds: list[Tensor]
    target: list[Tensor]
    group_ids: list[Tensor]

    def __init__(self, k: int | None = None, exponential: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = None if k is None else check_int("k", k, least=1)
        self.exponential = check_bool("exponential", exponential)
        _add_states(self)

    @override
    def update(self, preds: Tensor, target: Tensor, group_ids: Tensor) -> None:
        """Add samples.

        Args:
            preds: Floating point scores, any shape; only their order matters.
            target: Relevance of each, finite and at least 0; at most 1000 if ``exponential``.
            group_ids: The group of each, integers.

        Raises:
            TypeError: ``preds`` is not floating point, ``group_ids`` are not integers, or an
                argument is no tensor.
            ValueError: Numbers of elements differ, or a target is out of range.
        """
        _append(self, preds, target, group_ids, binary=False)

    @override
    def compute(self) -> Tensor:
        """Return the mean NDCG, float64 []."""
        target, group, rank, num_groups = _ranked(self)
        best_first = torch.argsort(target, descending=True, stable=True)
        best_first = best_first[torch.argsort(group[best_first], stable=True)]
        gained, best = (
            self._gain(part, group, rank, num_groups) for part in (target, target[best_first])
        )
        return _mean_of_groups(self, gained, best)

    def _gain(self, target: Tensor, group: Tensor, rank: Tensor, num_groups: int) -> Tensor:
        gain = target.exp2() - 1 if self.exponential else target
        gain = gain / (rank + 1).double().log2()
        if self.k is not None:
            gain = gain * (rank <= self.k)
        return target.new_zeros(num_groups).index_add(0, group, gain)


class MeanReciprocalRank(Metric):
    """One divided by the rank of a group's first positive, averaged over groups.

    All groups weigh the same; those without a positive are left out, and the result is NaN, with
    a warning, if all are. Of equal scores, negatives come first. NaN if a score is NaN. Samples
    are kept until ``reset``, and ranks gather each other's.

    Args:
        k: A first positive behind the k highest scores counts as 0; None: none does.
        **kwargs: Passed to ``torchmetrics.Metric``.

    Raises:
        TypeError: ``k`` is neither an int nor None.
        ValueError: ``k`` is below 1.

    Example:
        >>> mrr = MeanReciprocalRank()
        >>> mrr.update(
        ...     preds=torch.tensor([0.9, 0.5, 0.1, 0.8, 0.3]),
        ...     target=torch.tensor([0, 1, 1, 1, 0]),
        ...     group_ids=torch.tensor([7, 7, 7, 9, 9]),
        ... )
        >>> mrr.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    preds: list[Tensor]
    target: list[Tensor]
    group_ids: list[Tensor]

    def __init__(self, k: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = None if k is None else check_int("k", k, least=1)
        _add_states(self)

    @override
    def update(self, preds: Tensor, target: Tensor, group_ids: Tensor) -> None:
        """Add samples, as ``RecallAtK.update``."""
        _append(self, preds, target, group_ids, binary=True)

    @override
    def compute(self) -> Tensor:
        """Return the mean reciprocal rank, float64 []."""
        target, group, rank, num_groups = _ranked(self)
        counts = rank if self.k is None else torch.where(rank <= self.k, rank, torch.inf)
        reciprocal = target / counts
        best = target.new_zeros(num_groups).scatter_reduce(0, group, reciprocal, "amax")
        positives = target.new_zeros(num_groups).index_add(0, group, target)
        return _mean_of_groups(self, best, (positives > 0).double())


def _add_states(metric: Metric) -> None:
    for name in ("preds", "target", "group_ids"):
        metric.add_state(name, default=[], dist_reduce_fx="cat")


def _append(
    metric: RecallAtK | NDCG | MeanReciprocalRank,
    preds: Tensor,
    target: Tensor,
    group_ids: Tensor,
    binary: bool,
) -> None:
    """Check samples and add them to a metric's states."""
    check_tensors(preds, target=target, group_ids=group_ids)
    if group_ids.is_floating_point() or group_ids.is_complex():
        raise TypeError(f"group_ids: expected an integer dtype, got {group_ids.dtype}")
    for name, part in (("target", target), ("group_ids", group_ids)):
        if part.numel() != preds.numel():
            raise ValueError(f"{name}: expected {preds.numel()} elements, got {part.numel()}")
    flat = target.detach().reshape(-1).double()
    if binary:
        check_binary(flat)
    if not ((flat >= 0) & flat.isfinite()).all():
        raise ValueError("target: expected finite numbers >= 0, got others")
    if getattr(metric, "exponential", False) and (flat > _MAX_EXPONENT).any():
        raise ValueError(
            f"target: expected numbers <= {_MAX_EXPONENT} for exponential=True, got "
            f"{float(flat.max())}"
        )
    metric.preds.append(preds.detach().reshape(-1))
    metric.target.append(flat.float() if binary else flat)
    metric.group_ids.append(group_ids.detach().reshape(-1).to(torch.int64))


def _ranked(
    metric: RecallAtK | NDCG | MeanReciprocalRank,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return all samples, group by group and best score first.

    Returns:
        Targets, float64 [n], indices of their groups, int64 [n], ranks from 1 within them,
        float64 [n], and the number of groups.
    """
    if not len(metric.preds):
        empty = torch.empty(0, dtype=torch.float64, device=metric.device)
        return empty, empty.long(), empty, 0
    preds, target = dim_zero_cat(metric.preds), dim_zero_cat(metric.target)
    group_ids = dim_zero_cat(metric.group_ids)
    order = torch.argsort(target, stable=True)
    order = order[torch.argsort(preds[order], descending=True, stable=True)]
    order = order[torch.argsort(group_ids[order], stable=True)]
    _, group, sizes = torch.unique_consecutive(
        group_ids[order], return_inverse=True, return_counts=True
    )
    first = sizes.cumsum(0) - sizes
    rank = torch.arange(len(order), device=order.device) - first[group] + 1
    return target[order].double(), group, rank.double(), len(sizes)


def _mean_of_groups(
    metric: RecallAtK | NDCG | MeanReciprocalRank, earned: Tensor, possible: Tensor
) -> Tensor:
    """Return the mean of ``earned / possible``, over groups where something was possible."""
    qualifies = possible > 0
    if not qualifies.any():
        name = type(metric).__name__
        warnings.warn(
            f"{name}: no group has a positive target, the result is NaN", UserWarning, stacklevel=3
        )
        return torch.tensor(torch.nan, dtype=torch.float64, device=metric.device)
    if dim_zero_cat(metric.preds).isnan().any():
        return torch.tensor(torch.nan, dtype=torch.float64, device=metric.device)
    return (earned[qualifies] / possible[qualifies]).mean()
