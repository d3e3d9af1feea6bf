"""Adagrad of tables, with a sum a weight or one a row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from recis_lightning.arguments import check_bound
from recis_lightning.ops import row_update
from recis_lightning.optim.sparse_optimizer import SparseOptimizer
from recis_lightning.table.hash_table import HashTable


class SparseAdagrad(SparseOptimizer):
    """Adagrad on the rows with a gradient, as ``torch.optim.Adagrad`` on sparse gradients.

    Args:
        tables: ``hash_tables(module)``, or dicts with their own hyperparameters.
        lr: Learning rate.
        lr_decay: The rate of update number n is ``lr / (1 + (n - 1) * lr_decay)``.
        initial_accumulator_value: What the sum of squares starts from.
        eps: Added to its root.
        clip_grad_norm: See ``SparseOptimizer``.
        clip_grad_value: See ``SparseOptimizer``.

    Source: Duchi, Hazan and Singer, 2011.
    """

    rule = row_update.ADAGRAD

    def __init__(
        self,
        tables: Iterable[HashTable] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
    ) -> None:
        check_bound("lr_decay", lr_decay)
        check_bound("initial_accumulator_value", initial_accumulator_value)
        check_bound("eps", eps)
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        super().__init__(tables, defaults, clip_grad_norm, clip_grad_value)

    def slots(self, embedding_dim: int) -> dict[str, int]:
        """See ``SparseOptimizer``."""
        return {"sum": embedding_dim}

    def state_fill(self) -> float:
        """See ``SparseOptimizer``."""
        return float(self.defaults["initial_accumulator_value"])

    def hyperparameters(self, group: dict[str, Any], num_updates: int) -> dict[int, float]:
        """See ``SparseOptimizer``."""
        lr = group["lr"] / (1 + (num_updates - 1) * group["lr_decay"])
        return {row_update.LR: lr, row_update.EPS: group["eps"]}


class SparseRowwiseAdagrad(SparseAdagrad):
    """Adagrad with one sum a row: it adds up the mean square of the row's gradient.

    Arguments are those of ``SparseAdagrad``. Its state is 4 bytes a row, whatever the dim.

    Source: FBGEMM's ``EXACT_ROWWISE_ADAGRAD``.
    """

    rule = row_update.ROWWISE_ADAGRAD

    def slots(self, embedding_dim: int) -> dict[str, int]:
        """See ``SparseOptimizer``."""
        return {"sum": 1}


__all__ = ["SparseAdagrad", "SparseRowwiseAdagrad"]
