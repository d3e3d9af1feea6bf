"""Lion of tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from typing_extensions import override

from recis_lightning.arguments import OPTIMIZER_HINTS, check_betas, check_bound, explain_arguments
from recis_lightning.ops import layout as fields
from recis_lightning.optim.sparse_optimizer import SparseOptimizer
from recis_lightning.optim.table_updater import make_updater
from recis_lightning.table.hash_table import HashTable


@explain_arguments(OPTIMIZER_HINTS)
class SparseLion(SparseOptimizer):
    """Lion on the rows with a gradient: every weight moves by ``lr``, along the sign of a momentum.

    ``w = w * (1 - lr * weight_decay) - lr * sign(betas[0] * m + (1 - betas[0]) * g)``, and then
    ``m = betas[1] * m + (1 - betas[1]) * g``. Rows without a gradient keep weights and momentum.

    Args:
        tables: Tables (``hash_tables(module)``), or dicts ``{"params": tables, "lr": ...}`` with
            their own hyperparameters.
        lr: Learning rate; a third to a tenth of Adam's is usual.
        betas: Share of the momentum in the step, and in the next momentum.
        weight_decay: Weights are multiplied by ``1 - lr * weight_decay`` first.
        clip_grad_norm: Scale all gradients of this optimizer down so that the norm of them
            together is at most this; None leaves them. Gradients of a row are summed first.
        clip_grad_value: Clamp every element of a row's gradient to at most this; None leaves them.
        cow_clip: CowClip's r and zeta, such as ``(1.0, 1e-5)``: a row's gradient has at most
            the norm ``num_ids * max(r * norm(row), zeta)``; ids of the step count as often as they
            occur. After ``clip_grad_norm``, before ``clip_grad_value``; None leaves gradients.

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, 2023.
    """

    def __init__(
        self,
        tables: Iterable[HashTable] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        cow_clip: Sequence[float] | None = None,
    ) -> None:
        check_betas(betas)
        check_bound("weight_decay", weight_decay)
        defaults = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay}
        self._updater, groups = make_updater(tables, lr, clip_grad_norm, clip_grad_value, cow_clip)
        super().__init__(groups, defaults)
        self._own_tables()

    @property
    @override
    def rule(self) -> int:
        return fields.LION

    @override
    def slots(self, embedding_dim: int) -> dict[str, int]:
        return {"exp_avg": embedding_dim}

    @override
    def state_fill(self) -> float:
        return 0.0

    @override
    def hyperparameters(self, group: dict[str, Any], num_updates: int) -> dict[int, float]:
        beta1, beta2 = group["betas"]
        return {
            fields.HYPER_LR: group["lr"],
            fields.HYPER_ONE_MINUS_BETA1: 1 - beta1,
            fields.HYPER_ONE_MINUS_BETA2: 1 - beta2,
            fields.HYPER_DECAY: 1 - group["lr"] * group["weight_decay"],
        }


__all__ = ["SparseLion"]
