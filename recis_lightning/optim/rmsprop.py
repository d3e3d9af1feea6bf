"""RMSprop of tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from typing_extensions import override

from recis_lightning.arguments import OPTIMIZER_HINTS, check_bound, explain_arguments
from recis_lightning.ops import layout as fields
from recis_lightning.optim.sparse_optimizer import SparseOptimizer, with_decay
from recis_lightning.optim.table_updater import make_updater
from recis_lightning.table.hash_table import HashTable


@explain_arguments(OPTIMIZER_HINTS)
class SparseRMSprop(SparseOptimizer):
    """RMSprop on the rows with a gradient, as ``torch.optim.RMSprop`` where every row has one.

    Rows without a gradient keep weights and averages. torch's ``momentum`` and ``centered`` do not
    exist here.

    Args:
        tables: Tables (``hash_tables(module)``), or dicts ``{"params": tables, "lr": ...}`` with
            their own hyperparameters.
        lr: Learning rate.
        alpha: Decay of the average of squares.
        eps: Added to its root.
        weight_decay: This times the weights is added to the gradients of the rows that have one.
        clip_grad_norm: Scale all gradients of this optimizer down so that the norm of them
            together is at most this; None leaves them. Gradients of a row are summed first.
        clip_grad_value: Clamp every element of a row's gradient to at most this; None leaves them.
        cow_clip: CowClip's r and zeta, such as ``(1.0, 1e-5)``: a row's gradient has at most
            the norm ``num_ids * max(r * norm(row), zeta)``; ids of the step count as often as they
            occur. After ``clip_grad_norm``, before ``clip_grad_value``; None leaves gradients.

    Source: Hinton, Neural Networks for Machine Learning, lecture 6e, 2012.
    """

    def __init__(
        self,
        tables: Iterable[HashTable] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        cow_clip: Sequence[float] | None = None,
    ) -> None:
        check_bound("alpha", alpha, high=1.0)
        check_bound("eps", eps)
        check_bound("weight_decay", weight_decay)
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        self._updater, groups = make_updater(tables, lr, clip_grad_norm, clip_grad_value, cow_clip)
        super().__init__(groups, defaults)
        self._own_tables()

    @property
    @override
    def rule(self) -> int:
        return with_decay(fields.RMSPROP, self.param_groups)

    @override
    def slots(self, embedding_dim: int) -> dict[str, int]:
        return {"square_avg": embedding_dim}

    @override
    def state_fill(self) -> float:
        return 0.0

    @override
    def hyperparameters(self, group: dict[str, Any], num_updates: int) -> dict[int, float]:
        return {
            fields.HYPER_LR: group["lr"],
            fields.HYPER_EPS: group["eps"],
            fields.HYPER_ONE_MINUS_BETA2: 1 - group["alpha"],
            fields.HYPER_WEIGHT_DECAY: group["weight_decay"],
        }


__all__ = ["SparseRMSprop"]
