"""SGD of tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typing_extensions import override

from recis_lightning.arguments import OPTIMIZER_HINTS, explain_arguments
from recis_lightning.ops import layout as fields
from recis_lightning.optim.sparse_optimizer import SparseOptimizer
from recis_lightning.optim.table_updater import make_updater
from recis_lightning.table.hash_table import HashTable


@explain_arguments(OPTIMIZER_HINTS)
class SparseSGD(SparseOptimizer):
    """``w = w - lr * g`` on the rows with a gradient, as ``torch.optim.SGD``.

    Args:
        tables: Tables (``hash_tables(module)``), or dicts ``{"params": tables, "lr": ...}`` with
            their own ``lr``.
        lr: Learning rate.
        clip_grad_norm: Scale all gradients of this optimizer down so that the norm of them
            together is at most this; None leaves them. Gradients of a row are summed first.
        clip_grad_value: Clamp every element of a row's gradient to at most this; None leaves them.
    """

    rule = fields.SGD

    def __init__(
        self,
        tables: Iterable[HashTable] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
    ) -> None:
        self._updater, groups = make_updater(tables, lr, clip_grad_norm, clip_grad_value)
        super().__init__(groups, {"lr": lr})
        self._own_tables()

    @override
    def slots(self, embedding_dim: int) -> dict[str, int]:
        return {}

    @override
    def state_fill(self) -> float:
        return 0.0

    @override
    def hyperparameters(self, group: dict[str, Any], num_updates: int) -> dict[int, float]:
        return {fields.HYPER_LR: group["lr"]}


__all__ = ["SparseSGD"]
