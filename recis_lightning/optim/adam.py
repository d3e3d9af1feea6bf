"""Adam, AdamW and row-wise Adam of tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from typing_extensions import override

from recis_lightning.arguments import (
    OPTIMIZER_HINTS,
    check_betas,
    check_bound,
    explain_arguments,
)
from recis_lightning.ops import layout as fields
from recis_lightning.optim.sparse_optimizer import SparseOptimizer
from recis_lightning.optim.table_updater import make_updater
from recis_lightning.table.hash_table import HashTable


@explain_arguments(OPTIMIZER_HINTS)
class SparseAdam(SparseOptimizer):
    """Adam on the rows with a gradient, as ``torch.optim.SparseAdam``.

    Rows without a gradient keep weights and moments. The bias correction counts the table's
    updates, and ``eps`` is added before it, as torch has it.

    Args:
        tables: Tables (``hash_tables(module)``), or dicts ``{"params": tables, "lr": ...}`` with
            their own hyperparameters.
        lr: Learning rate.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        clip_grad_norm: Scale all gradients of this optimizer down so that the norm of them
            together is at most this; None leaves them. Gradients of a row are summed first.
        clip_grad_value: Clamp every element of a row's gradient to at most this; None leaves them.
        cow_clip: CowClip's r and zeta, such as ``(1.0, 1e-5)``: a row's gradient has at most
            the norm ``num_ids * max(r * norm(row), zeta)``; ids of the step count as often as they
            occur. After ``clip_grad_norm``, before ``clip_grad_value``; None leaves gradients.

    Source: Kingma and Ba, 2015.
    """

    def __init__(
        self,
        tables: Iterable[HashTable] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        cow_clip: Sequence[float] | None = None,
    ) -> None:
        defaults = adam_defaults(lr, betas, eps)
        self._updater, groups = make_updater(tables, lr, clip_grad_norm, clip_grad_value, cow_clip)
        super().__init__(groups, defaults)
        self._own_tables()

    @property
    @override
    def rule(self) -> int:
        return fields.ADAM

    @override
    def slots(self, embedding_dim: int) -> dict[str, int]:
        return adam_slots(embedding_dim)

    @override
    def state_fill(self) -> float:
        return 0.0

    @override
    def hyperparameters(self, group: dict[str, Any], num_updates: int) -> dict[int, float]:
        shared, root = adam_fields(group, num_updates)
        return {**shared, fields.HYPER_EPS: group["eps"] / root}


@explain_arguments(OPTIMIZER_HINTS)
class SparseAdamW(SparseOptimizer):
    """AdamW on the rows with a gradient, as ``torch.optim.AdamW`` where every row has one.

    Weight decay touches the rows of the step only; ``eps`` is added after the bias correction,
    unless ``eps_before_correction`` asks for it before, as RecIS's ``SparseAdamW`` has it.

    Args:
        tables: Tables (``hash_tables(module)``), or dicts ``{"params": tables, "lr": ...}`` with
            their own hyperparameters.
        lr: Learning rate.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Weights are multiplied by ``1 - lr * weight_decay`` first.
        clip_grad_norm: Scale all gradients of this optimizer down so that the norm of them
            together is at most this; None leaves them. Gradients of a row are summed first.
        clip_grad_value: Clamp every element of a row's gradient to at most this; None leaves them.
        cow_clip: CowClip's r and zeta, such as ``(1.0, 1e-5)``: a row's gradient has at most
            the norm ``num_ids * max(r * norm(row), zeta)``; ids of the step count as often as they
            occur. After ``clip_grad_norm``, before ``clip_grad_value``; None leaves gradients.
        eps_before_correction: Add ``eps`` to the root before its bias correction: then it weighs
            ``1 / sqrt(1 - betas[1] ** n)`` times as much in update number n.

    Source: Loshchilov and Hutter, 2019.
    """

    def __init__(
        self,
        tables: Iterable[HashTable] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        cow_clip: Sequence[float] | None = None,
        eps_before_correction: bool = False,
    ) -> None:
        check_bound("weight_decay", weight_decay)
        if not isinstance(eps_before_correction, bool):
            raise TypeError(
                f"eps_before_correction: expected a bool, got {eps_before_correction!r}"
            )
        defaults = {
            **adam_defaults(lr, betas, eps),
            "weight_decay": weight_decay,
            "eps_before_correction": eps_before_correction,
        }
        self._updater, groups = make_updater(tables, lr, clip_grad_norm, clip_grad_value, cow_clip)
        super().__init__(groups, defaults)
        self._own_tables()

    @property
    @override
    def rule(self) -> int:
        return fields.ADAM

    @override
    def slots(self, embedding_dim: int) -> dict[str, int]:
        return adam_slots(embedding_dim)

    @override
    def state_fill(self) -> float:
        return 0.0

    @override
    def hyperparameters(self, group: dict[str, Any], num_updates: int) -> dict[int, float]:
        shared, root = adam_fields(group, num_updates)
        decay = 1 - group["lr"] * group["weight_decay"]
        is_before = group.get("eps_before_correction", False)  # older pickles do not have it
        eps = group["eps"] / root if is_before else group["eps"]
        return {**shared, fields.HYPER_EPS: eps, fields.HYPER_DECAY: decay}


@explain_arguments(OPTIMIZER_HINTS)
class SparseRowwiseAdam(SparseOptimizer):
    """Adam with one second moment a row: it averages the mean square of the row's gradient.

    Its state is ``4 * embedding_dim + 4`` bytes a row, half of Adam's. Weight decay is AdamW's,
    on the rows of the step, and ``eps`` is added after the bias correction.

    Args:
        tables: Tables (``hash_tables(module)``), or dicts ``{"params": tables, "lr": ...}`` with
            their own hyperparameters.
        lr: Learning rate.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Weights are multiplied by ``1 - lr * weight_decay`` first.
        clip_grad_norm: Scale all gradients of this optimizer down so that the norm of them
            together is at most this; None leaves them. Gradients of a row are summed first.
        clip_grad_value: Clamp every element of a row's gradient to at most this; None leaves them.
        cow_clip: CowClip's r and zeta, such as ``(1.0, 1e-5)``: a row's gradient has at most
            the norm ``num_ids * max(r * norm(row), zeta)``; ids of the step count as often as they
            occur. After ``clip_grad_norm``, before ``clip_grad_value``; None leaves gradients.

    Source: FBGEMM's ``PARTIAL_ROWWISE_ADAM``.
    """

    def __init__(
        self,
        tables: Iterable[HashTable] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        cow_clip: Sequence[float] | None = None,
    ) -> None:
        check_bound("weight_decay", weight_decay)
        defaults = {**adam_defaults(lr, betas, eps), "weight_decay": weight_decay}
        self._updater, groups = make_updater(tables, lr, clip_grad_norm, clip_grad_value, cow_clip)
        super().__init__(groups, defaults)
        self._own_tables()

    @property
    @override
    def rule(self) -> int:
        return fields.ROWWISE_ADAM

    @override
    def slots(self, embedding_dim: int) -> dict[str, int]:
        return {"exp_avg": embedding_dim, "exp_avg_sq": 1}

    @override
    def state_fill(self) -> float:
        return 0.0

    @override
    def hyperparameters(self, group: dict[str, Any], num_updates: int) -> dict[int, float]:
        shared, _ = adam_fields(group, num_updates)
        decay = 1 - group["lr"] * group["weight_decay"]
        return {**shared, fields.HYPER_EPS: group["eps"], fields.HYPER_DECAY: decay}


def adam_defaults(lr: float, betas: Sequence[float], eps: float) -> dict[str, Any]:
    """Return what Adam's relatives have in a parameter group, checked."""
    check_betas(betas)
    check_bound("eps", eps)
    return {"lr": lr, "betas": (betas[0], betas[1]), "eps": eps}


def adam_slots(embedding_dim: int) -> dict[str, int]:
    """Return the state of a row: two moments, of its size each."""
    return {"exp_avg": embedding_dim, "exp_avg_sq": embedding_dim}


def adam_fields(group: dict[str, Any], num_updates: int) -> tuple[dict[int, float], float]:
    """Return the fields that Adam's relatives share, and the root of ``1 - beta2 ** n``."""
    beta1, beta2 = group["betas"]
    root = math.sqrt(1 - beta2**num_updates)
    shared = {
        fields.HYPER_LR: group["lr"] / (1 - beta1**num_updates),
        fields.HYPER_ONE_MINUS_BETA1: 1 - beta1,
        fields.HYPER_ONE_MINUS_BETA2: 1 - beta2,
        fields.HYPER_INV_SQRT_BIAS2: 1 / root,
    }
    return shared, root


__all__ = [
    "SparseAdam",
    "SparseAdamW",
    "SparseRowwiseAdam",
    "adam_defaults",
    "adam_fields",
    "adam_slots",
]
