"""SGD of tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from recis_lightning.ops import row_update
from recis_lightning.optim.sparse_optimizer import SparseOptimizer
from recis_lightning.table.hash_table import HashTable


class SparseSGD(SparseOptimizer):
    """``w = w - lr * g`` on the rows with a gradient, as ``torch.optim.SGD``.

    Args:
        tables: ``hash_tables(module)``, or dicts with their own ``lr``.
        lr: Learning rate.
        clip_grad_norm: See ``SparseOptimizer``.
        clip_grad_value: See ``SparseOptimizer``.
    """

    rule = row_update.SGD

    def __init__(
        self,
        tables: Iterable[HashTable] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
    ) -> None:
        super().__init__(tables, {"lr": lr}, clip_grad_norm, clip_grad_value)

    def slots(self, embedding_dim: int) -> dict[str, int]:
        """See ``SparseOptimizer``."""
        return {}

    def hyperparameters(self, group: dict[str, Any], num_updates: int) -> dict[int, float]:
        """See ``SparseOptimizer``."""
        return {row_update.LR: group["lr"]}


__all__ = ["SparseSGD"]
