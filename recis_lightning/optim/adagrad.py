"""Adagrad of tables, with a sum a weight or one a row."""

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
class SparseAdagrad(SparseOptimizer):
    """Adagrad on the rows with a gradient, as ``torch.optim.Adagrad`` on sparse gradients.

    Args:
        tables: Tables (``hash_tables(module)``), or dicts ``{"params": tables, "lr": ...}`` with
            their own hyperparameters.
        lr: Learning rate.
        lr_decay: The rate of update number n is ``lr / (1 + (n - 1) * lr_decay)``.
        initial_accumulator_value: Initial value of the sum of squares.
        eps: Added to its root.
        weight_decay: This times the weights is added to the gradients of the rows that have one.
        clip_grad_norm: Scale all gradients of this optimizer down so that the norm of them
            together is at most this; None leaves them. Gradients of a row are summed first.
        clip_grad_value: Clamp every element of a row's gradient to at most this; None leaves them.
        cow_clip: CowClip's r and zeta, such as ``(1.0, 1e-5)``: a row's gradient has at most
            the norm ``num_ids * max(r * norm(row), zeta)``; ids of the step count as often as they
            occur. After ``clip_grad_norm``, before ``clip_grad_value``; None leaves gradients.

    Source: Duchi, Hazan and Singer, 2011.
    """

    def __init__(
        self,
        tables: Iterable[HashTable] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        weight_decay: float = 0.0,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        cow_clip: Sequence[float] | None = None,
    ) -> None:
        defaults = _adagrad_defaults(lr, lr_decay, initial_accumulator_value, eps, weight_decay)
        self._updater, groups = make_updater(tables, lr, clip_grad_norm, clip_grad_value, cow_clip)
        super().__init__(groups, defaults)
        self._own_tables()

    @property
    @override
    def rule(self) -> int:
        return with_decay(fields.ADAGRAD, self.param_groups)

    @override
    def slots(self, embedding_dim: int) -> dict[str, int]:
        return {"sum": embedding_dim}

    @override
    def state_fill(self) -> float:
        return float(self.defaults["initial_accumulator_value"])

    @override
    def hyperparameters(self, group: dict[str, Any], num_updates: int) -> dict[int, float]:
        return _adagrad_fields(group, num_updates)


@explain_arguments(OPTIMIZER_HINTS)
class SparseRowwiseAdagrad(SparseOptimizer):
    """Adagrad with one sum a row: it adds up the mean square of the row's gradient.

    Arguments are those of ``SparseAdagrad``. Its state is 4 bytes a row, whatever the dim.

    Source: FBGEMM's ``EXACT_ROWWISE_ADAGRAD``.
    """

    def __init__(
        self,
        tables: Iterable[HashTable] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        weight_decay: float = 0.0,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        cow_clip: Sequence[float] | None = None,
    ) -> None:
        defaults = _adagrad_defaults(lr, lr_decay, initial_accumulator_value, eps, weight_decay)
        self._updater, groups = make_updater(tables, lr, clip_grad_norm, clip_grad_value, cow_clip)
        super().__init__(groups, defaults)
        self._own_tables()

    @property
    @override
    def rule(self) -> int:
        return with_decay(fields.ROWWISE_ADAGRAD, self.param_groups)

    @override
    def slots(self, embedding_dim: int) -> dict[str, int]:
        return {"sum": 1}

    @override
    def state_fill(self) -> float:
        return float(self.defaults["initial_accumulator_value"])

    @override
    def hyperparameters(self, group: dict[str, Any], num_updates: int) -> dict[int, float]:
        return _adagrad_fields(group, num_updates)


def _adagrad_defaults(
    lr: float, lr_decay: float, initial_accumulator_value: float, eps: float, weight_decay: float
) -> dict[str, Any]:
    check_bound("lr_decay", lr_decay)
    check_bound("initial_accumulator_value", initial_accumulator_value)
    check_bound("eps", eps)
    check_bound("weight_decay", weight_decay)
    return {
        "lr": lr,
        "lr_decay": lr_decay,
        "initial_accumulator_value": initial_accumulator_value,
        "eps": eps,
        "weight_decay": weight_decay,
    }


def _adagrad_fields(group: dict[str, Any], num_updates: int) -> dict[int, float]:
    lr = group["lr"] / (1 + (num_updates - 1) * group["lr_decay"])
    decay = group.get("weight_decay", 0.0)  # older pickles do not have it
    return {
        fields.HYPER_LR: lr,
        fields.HYPER_EPS: group["eps"],
        fields.HYPER_WEIGHT_DECAY: decay,
    }


__all__ = ["SparseAdagrad", "SparseRowwiseAdagrad"]
