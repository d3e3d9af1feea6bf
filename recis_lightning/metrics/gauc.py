"""GAUC: AUC by user."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from recis_lightning.metrics.checks import check_tensors, is_finite_weight
from recis_lightning.metrics.targets import check_binary

__all__ = ["GAUC"]


class GAUC(Metric):
    """AUC within each group (usually a user), averaged with each group's samples as weights.

    With weights of samples, a pair of a positive and a negative counts the product of their
    weights, and a group the sum of its weights.

    A group with only positive or only negative samples has no AUC and is left out. Equal
    scores share their average rank, so a tie between a positive and a negative counts one
    half, as in the ordinary AUC. Scores may be probabilities or logits: only their order
    matters. The result is NaN when a score is NaN and, with a warning, when no group has both
    classes. ``num_groups()`` says how many have, and how many are left out.

    Args:
        group_weight: "samples", or "equal": every group that has an AUC counts the same.
        **kwargs: Passed to ``torchmetrics.Metric``.

    Raises:
        ValueError: ``group_weight`` is another.

    Example:
        User 7 is ranked perfectly (AUC 1, three samples), user 9 wrongly (AUC 0, two
        samples), and user 5 has positives only: 3 / 5.

        >>> gauc = GAUC()
        >>> gauc.update(
        ...     preds=torch.tensor([0.9, 0.2, 0.1, 0.3, 0.6, 0.5]),
        ...     target=torch.tensor([1, 0, 0, 1, 0, 1]),
        ...     group_ids=torch.tensor([7, 7, 7, 9, 9, 5]),
        ... )
        >>> gauc.compute()
        tensor(0.6000)
        >>> gauc.num_groups()
        (2, 1)

    Source: Zhu et al., "Optimized Cost per Click in Taobao Display Advertising", KDD 2017;
    AUC from average ranks after Mann and Whitney (1947).
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    preds: list[Tensor]
    target: list[Tensor]
    group_ids: list[Tensor]
    weights: list[Tensor]

    def __init__(self, *, group_weight: str = "samples", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if group_weight not in ("samples", "equal"):
            raise ValueError(f"group_weight: expected 'samples' or 'equal', got {group_weight!r}")
        self.group_weight = group_weight
        self.add_state("preds", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")
        self.add_state("group_ids", default=[], dist_reduce_fx="cat")
        self.add_state("weights", default=[], dist_reduce_fx="cat")

    @override
    def update(
        self,
        preds: Tensor,
        target: Tensor,
        group_ids: Tensor,
        weights: Tensor | None = None,
    ) -> None:
        """Add samples.

        Args:
            preds: Floating point scores, any shape.
            target: 0 or 1 (any dtype) for each score.
            group_ids: The group of each score, integers.
            weights: Finite and at least 0, for each score; None: 1.

        Raises:
            TypeError: ``preds`` is not floating point, ``group_ids`` are not integers, or an
                argument is no tensor.
            ValueError: They differ in their number of elements, or a weight is out of range.
        """
        check_tensors(preds, target=target, group_ids=group_ids, weights=weights)
        if group_ids.is_floating_point() or group_ids.is_complex():
            raise TypeError(f"group_ids: expected an integer dtype, got {group_ids.dtype}")
        if not preds.numel() == target.numel() == group_ids.numel():
            raise ValueError(
                "expected as many targets and group_ids as preds, got "
                f"{target.numel()} and {group_ids.numel()} for {preds.numel()} preds"
            )
        if weights is None:
            flat = torch.ones((), device=preds.device).expand(preds.numel())  # takes no memory
        else:
            flat = _checked_weights(weights, preds.numel())
        self.weights.append(flat)
        self.preds.append(preds.detach().reshape(-1))
        self.target.append(target.detach().reshape(-1))
        self.group_ids.append(group_ids.detach().reshape(-1).to(torch.int64))

    @override
    def compute(self) -> Tensor:
        """Return GAUC over everything added so far.

        Returns:
            A 0-d tensor of torch's default dtype.

        Raises:
            ValueError: A target is neither 0 nor 1.
        """
        if not _num_samples(self.preds):
            return _no_group(self.device)
        target = dim_zero_cat(self.target)
        check_binary(target)
        preds = dim_zero_cat(self.preds)
        if preds.isnan().any():
            return torch.tensor(torch.nan, device=preds.device)
        ids, equal = dim_zero_cat(self.group_ids), self.group_weight == "equal"
        weights = dim_zero_cat(self.weights)
        if (weights == 1).all():
            return _grouped_auc(preds, target == 1, ids, equal)
        return _weighted_auc(preds, target == 1, ids, weights.double(), equal)

    def num_groups(self) -> tuple[int, int]:
        """Return how many groups of this rank's samples have an AUC, and how many are left out."""
        if not _num_samples(self.preds):
            return 0, 0
        _, group = torch.unique(dim_zero_cat(self.group_ids), return_inverse=True)
        weighs = dim_zero_cat(self.weights) > 0
        positive = dim_zero_cat(self.target) == 1
        has = torch.zeros(2, int(group.max()) + 1, dtype=torch.bool, device=group.device)
        has[0, group[weighs & positive]] = has[1, group[weighs & ~positive]] = True
        num_with = int(has.all(0).sum())
        return num_with, has.size(1) - num_with


def _checked_weights(weights: Tensor, count: int) -> Tensor:
    if weights.numel() != count:
        raise ValueError(f"weights: expected {count} elements, got {weights.numel()}")
    flat = weights.detach().reshape(-1)
    if not is_finite_weight(flat):
        raise ValueError("weights: expected finite numbers >= 0, got others")
    return flat if flat.is_floating_point() else flat.double()


def _num_samples(preds: list[Tensor] | Tensor) -> int:
    return preds.numel() if isinstance(preds, Tensor) else sum(part.numel() for part in preds)


def _no_group(device: torch.device) -> Tensor:
    warnings.warn("GAUC: no group has both classes, the result is NaN", UserWarning, stacklevel=3)
    return torch.tensor(torch.nan, device=device)


def _grouped_auc(preds: Tensor, positive: Tensor, group_ids: Tensor, equal: bool) -> Tensor:
    """Return the weighted mean of the groups' AUCs, from twice their rank sums in int64.

    Args:
        preds: [n] scores.
        positive: bool [n].
        group_ids: int64 [n].
        equal: Whether groups count the same.
    """
    order = torch.argsort(preds, stable=True)
    order = order[torch.argsort(group_ids[order], stable=True)]
    preds, positive = preds[order], positive[order].to(torch.int64)
    _, group, num_samples = torch.unique_consecutive(
        group_ids[order], return_inverse=True, return_counts=True
    )
    index = torch.arange(preds.numel(), device=preds.device)

    # A run is a sequence of equal scores within a group; its members share their mean rank.
    starts = torch.ones_like(positive, dtype=torch.bool)
    starts[1:] = (preds[1:] != preds[:-1]) | (group[1:] != group[:-1])
    run = starts.cumsum(0) - 1
    run_first = index[starts]
    run_last = torch.cat((run_first[1:], index.new_tensor([preds.numel()]))) - 1
    group_first = num_samples.cumsum(0) - num_samples
    twice_rank = (run_first + run_last)[run] - 2 * group_first[group] + 2

    zeros = torch.zeros_like(num_samples)
    num_positive = zeros.index_add(0, group, positive)
    num_negative = num_samples - num_positive
    twice_rank_sum = zeros.index_add(0, group, twice_rank * positive)
    qualifies = (num_positive > 0) & (num_negative > 0)
    if not qualifies.any():
        return _no_group(preds.device)

    wins = (twice_rank_sum - num_positive * (num_positive + 1))[qualifies].double()
    pairs = (2 * num_positive * num_negative)[qualifies].double()
    weight = num_samples[qualifies].double()
    return _mean_auc(wins / pairs, torch.ones_like(weight) if equal else weight)


def _weighted_auc(
    preds: Tensor, positive: Tensor, group_ids: Tensor, weights: Tensor, equal: bool
) -> Tensor:
    """Return the weighted mean of the groups' AUCs, with weights of samples, float64 [n]."""
    order = torch.argsort(preds, stable=True)
    order = order[torch.argsort(group_ids[order], stable=True)]
    preds, weights = preds[order], weights[order]
    is_positive = positive[order]
    _, group = torch.unique_consecutive(group_ids[order], return_inverse=True)
    starts = torch.ones_like(is_positive)
    starts[1:] = (preds[1:] != preds[:-1]) | (group[1:] != group[:-1])
    run = starts.cumsum(0) - 1
    group_of_run = group[starts]

    def by_run(values: Tensor) -> Tensor:
        return values.new_zeros(int(run[-1]) + 1).index_add(0, run, values)

    def by_group(values: Tensor) -> Tensor:
        return values.new_zeros(int(group[-1]) + 1).index_add(0, group_of_run, values)

    won, lost = by_run(weights * is_positive), by_run(weights * ~is_positive)
    total_won, total_lost = by_group(won), by_group(lost)
    # As parts of their group's: beside another group's large weights, sums would lose them.
    lost = lost / torch.where(total_lost > 0, total_lost, 1)[group_of_run]
    all_lost = by_group(lost)
    before_group = all_lost.cumsum(0) - all_lost
    below = lost.cumsum(0) - lost - before_group[group_of_run]
    qualifies = (total_won > 0) & (total_lost > 0)
    if not qualifies.any():
        return _no_group(preds.device)
    areas = (by_group(won * (below + lost / 2)) / total_won)[qualifies]
    weight = (total_won + total_lost)[qualifies]
    return _mean_auc(areas, torch.ones_like(weight) if equal else weight)


def _mean_auc(areas: Tensor, weight: Tensor) -> Tensor:
    mean: Tensor = (areas * weight).sum() / weight.sum()
    return mean.to(torch.get_default_dtype())
