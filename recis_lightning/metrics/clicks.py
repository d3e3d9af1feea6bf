"""Metrics of predicted probabilities whose memory does not grow with the samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from recis_lightning.arguments import check_int
from recis_lightning.metrics.checks import check_tensors, is_finite_weight
from recis_lightning.metrics.targets import check_binary

__all__ = ["BinnedAUROC", "Calibration", "NormalizedEntropy"]


class NormalizedEntropy(Metric):
    """Cross entropy of predicted probabilities, relative to that of the mean label.

    1 is as good as always predicting the share of positives, 0 is perfect. NaN where all labels are
    alike. States are float64 sums: memory does not grow, and ranks add theirs up.

    Args:
        eps: Probabilities are kept this far from 0 and 1.
        **kwargs: Passed to ``torchmetrics.Metric``.

    Example:
        >>> entropy = NormalizedEntropy()
        >>> entropy.update(torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([1, 0, 1, 0]))
        >>> entropy.compute()
        tensor(1., dtype=torch.float64)

    Source: He et al., "Practical Lessons from Predicting Clicks on Ads at Facebook", ADKDD 2014.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    cross_entropy: Tensor
    positive: Tensor
    total: Tensor

    def __init__(self, eps: float = 1e-12, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < eps < 0.5:
            raise ValueError(f"eps: expected a number in (0, 0.5), got {eps!r}")
        self.eps = eps
        for name in ("cross_entropy", "positive", "total"):
            self.add_state(
                name,
                torch.zeros((), dtype=torch.float64, device=torch.get_default_device()),
                dist_reduce_fx="sum",
            )

    @override
    def update(self, preds: Tensor, target: Tensor, weights: Tensor | None = None) -> None:
        """Add samples.

        Args:
            preds: Probabilities, floating point, any shape.
            target: 0 or 1 for each.
            weights: Finite and at least 0, for each; None: 1.

        Raises:
            TypeError: ``preds`` is not floating point, or an argument no tensor.
            ValueError: Numbers of elements differ, or a value is out of range.
        """
        p, y, w = _flat(preds, target, weights)
        p = p.clamp(self.eps, 1 - self.eps)
        self.cross_entropy += -(w * (y * p.log() + (1 - y) * (1 - p).log())).sum()
        self.positive += (w * y).sum()
        self.total += w.sum()

    @override
    def compute(self) -> Tensor:
        """Return the normalized entropy, float64 []."""
        share = self.positive / self.total
        entropy = -(torch.special.xlogy(share, share) + torch.special.xlogy(1 - share, 1 - share))
        return torch.where(entropy > 0, self.cross_entropy / self.total / entropy, torch.nan)


class Calibration(Metric):
    """Sum of predicted probabilities, divided by the number of positives; 1 is calibrated.

    NaN or inf without a positive. States are float64 sums, and ranks add theirs up.

    Args:
        **kwargs: Passed to ``torchmetrics.Metric``.

    Example:
        >>> calibration = Calibration()
        >>> calibration.update(torch.tensor([0.75, 0.75]), torch.tensor([1, 0]))
        >>> calibration.compute()
        tensor(1.5000, dtype=torch.float64)
    """

    is_differentiable = False
    full_state_update = False

    predicted: Tensor
    positive: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("predicted", "positive"):
            self.add_state(
                name,
                torch.zeros((), dtype=torch.float64, device=torch.get_default_device()),
                dist_reduce_fx="sum",
            )

    @override
    def update(self, preds: Tensor, target: Tensor, weights: Tensor | None = None) -> None:
        """Add samples, as ``NormalizedEntropy.update``."""
        p, y, w = _flat(preds, target, weights)
        self.predicted += (w * p).sum()
        self.positive += (w * y).sum()

    @override
    def compute(self) -> Tensor:
        """Return the calibration, float64 []."""
        return self.predicted / self.positive


class BinnedAUROC(Metric):
    """Area under the ROC curve from counts in equal bins of [0, 1]: constant memory.

    Scores of one bin count as ties. The exact area differs from it by at most ``max_error()``,
    half the share of pairs of a positive and a negative that fall into one bin. NaN without both
    classes.

    Args:
        num_bins: Bins of the probabilities, 16 bytes each.
        **kwargs: Passed to ``torchmetrics.Metric``.

    Raises:
        TypeError: ``num_bins`` is not an int.
        ValueError: ``num_bins`` is below 1.

    Example:
        >>> auroc = BinnedAUROC()
        >>> auroc.update(torch.tensor([0.9, 0.2, 0.6, 0.6]), torch.tensor([1, 0, 1, 0]))
        >>> auroc.compute(), auroc.max_error()
        (tensor(0.8750, dtype=torch.float64), tensor(0.1250, dtype=torch.float64))
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    counts: Tensor

    def __init__(self, num_bins: int = 10_000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_bins = check_int("num_bins", num_bins, least=1)
        zeros = torch.zeros(
            2, num_bins, dtype=torch.float64, device=torch.get_default_device()
        )  # negatives, positives
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    @override
    def update(self, preds: Tensor, target: Tensor, weights: Tensor | None = None) -> None:
        """Add samples, as ``NormalizedEntropy.update``."""
        p, y, w = _flat(preds, target, weights)
        place = (p * self.num_bins).long().clamp(max=self.num_bins - 1)
        w = w.to(self.counts.dtype)  # which ``set_dtype`` changes
        self.counts.view(-1).index_add_(0, place + self.num_bins * y.long(), w)

    @override
    def compute(self) -> Tensor:
        """Return the area, float64 []."""
        negative, positive = self.counts
        below = negative.cumsum(0) - negative
        num_pairs = positive.sum() * negative.sum()
        area: Tensor = (positive * (below + negative / 2)).sum() / num_pairs
        return area

    def max_error(self) -> Tensor:
        """Return a bound of the difference to the exact area of this rank's samples, float64 []."""
        negative, positive = self.counts
        bound: Tensor = (positive * negative).sum() / 2 / (positive.sum() * negative.sum())
        return bound


def _flat(preds: Tensor, target: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return checked probabilities, targets and weights, float64 [n]; the weights 1 where None."""
    check_tensors(preds, target=target, weights=weights)
    if target.numel() != preds.numel():
        raise ValueError(f"target: expected {preds.numel()} elements, got {target.numel()}")
    if weights is not None and weights.numel() != preds.numel():
        raise ValueError(f"weights: expected {preds.numel()} elements, got {weights.numel()}")
    p, y = (part.detach().reshape(-1).double() for part in (preds, target))
    w = torch.ones_like(p) if weights is None else weights.detach().reshape(-1).double()
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("preds: expected probabilities in [0, 1]; apply sigmoid to logits")
    check_binary(y)
    if not is_finite_weight(w):  # an infinite one would leave NaN in the sums until a reset
        raise ValueError("weights: expected finite numbers >= 0, got others")
    return p, y, w
