"""FTRL-Proximal of tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from typing_extensions import override

from recis_lightning.arguments import OPTIMIZER_HINTS, check_bound, explain_arguments
from recis_lightning.ops import layout as fields
from recis_lightning.optim.sparse_optimizer import SparseOptimizer
from recis_lightning.optim.table_updater import make_updater
from recis_lightning.table.hash_table import HashTable


@explain_arguments(OPTIMIZER_HINTS)
class SparseFTRL(SparseOptimizer):
    """FTRL-Proximal on the rows with a gradient: weights whose evidence is below ``l1`` are 0.

    A weight is a function of the sums of its gradients and of their squares, so that its initial
    value fades in its first updates: ``initializer=Constant(0.0)`` is usual.

    Args:
        tables: Tables (``hash_tables(module)``), or dicts ``{"params": tables, "lr": ...}`` with
            their own hyperparameters.
        lr: Learning rate, the paper's alpha; it must be above 0 in every step.
        l1: Bound of the sum of gradients below which a weight is 0.
        l2: Pull towards 0 that grows with the weight.
        beta: Added to the root of the sum of squares, above 0; small values make first steps large.
        clip_grad_norm: Scale all gradients of this optimizer down so that the norm of them
            together is at most this; None leaves them. Gradients of a row are summed first.
        clip_grad_value: Clamp every element of a row's gradient to at most this; None leaves them.
        cow_clip: CowClip's r and zeta, such as ``(1.0, 1e-5)``: a row's gradient has at most
            the norm ``num_ids * max(r * norm(row), zeta)``; ids of the step count as often as they
            occur. After ``clip_grad_norm``, before ``clip_grad_value``; None leaves gradients.

    Source: McMahan et al., Ad Click Prediction: a View from the Trenches, 2013, algorithm 1.
    """

    def __init__(
        self,
        tables: Iterable[HashTable] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        l1: float = 0.0,
        l2: float = 0.0,
        beta: float = 1.0,
        *,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        cow_clip: Sequence[float] | None = None,
    ) -> None:
        check_bound("l1", l1)
        check_bound("l2", l2)
        check_bound("beta", beta)
        if not beta:
            raise ValueError(f"beta: expected a number > 0, got {beta!r}")
        self._updater, groups = make_updater(tables, lr, clip_grad_norm, clip_grad_value, cow_clip)
        for value in (lr, *(group["lr"] for group in groups if "lr" in group)):
            _check_rate(value)
        super().__init__(groups, {"lr": lr, "l1": l1, "l2": l2, "beta": beta})
        self._own_tables()

    @property
    @override
    def rule(self) -> int:
        return fields.FTRL

    @override
    def slots(self, embedding_dim: int) -> dict[str, int]:
        return {"sum": embedding_dim, "linear": embedding_dim}

    @override
    def state_fill(self) -> float:
        return 0.0

    @override
    def hyperparameters(self, group: dict[str, Any], num_updates: int) -> dict[int, float]:
        _check_rate(group["lr"])
        return {
            fields.HYPER_LR: group["lr"],
            fields.HYPER_L1: group["l1"],
            fields.HYPER_L2: group["l2"],
            fields.HYPER_BETA: group["beta"],
        }


def _check_rate(lr: float) -> None:
    if not lr > 0:
        raise ValueError(f"lr: expected a number > 0 for SparseFTRL, got {lr!r}")


__all__ = ["SparseFTRL"]
