"""AdamAR of tables: Adam that shrinks rows by the updates that they missed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from typing_extensions import override

from recis_lightning.arguments import OPTIMIZER_HINTS, check_bound, explain_arguments
from recis_lightning.ops import layout as fields
from recis_lightning.optim.adam import adam_defaults, adam_fields, adam_slots
from recis_lightning.optim.sparse_optimizer import SparseOptimizer
from recis_lightning.optim.table_updater import make_updater
from recis_lightning.table.hash_table import HashTable

_NUMBERS = 2**24 - 1  # of updates that float32 tells apart; then they begin again


@explain_arguments(OPTIMIZER_HINTS)
class SparseAdamAR(SparseOptimizer):
    """AdamAR on the rows with a gradient: rows of rare ids shrink towards zero.

    The authors shrink all parameters in every step, before Adam's update:
    ``w -= min(1, alpha * interval) * w``, where ``interval`` counts the steps since the row's last
    gradient, the present one not counted. So a row that has a gradient in every step never shrinks,
    and the longer one stays away, the faster it does.

    Here a row catches up when it has its next gradient: it is multiplied by
    ``(1 - alpha) * (1 - 2 * alpha) * ... * (1 - n * alpha)``, no factor below 0, where n counts the
    updates of its table that it missed since its last one. Then comes ``SparseAdamW``'s update
    without weight decay. Two things differ from the authors' dense algorithm: until its next
    gradient a row is read as its last one left it, and its moments wait, as ``SparseAdam``'s do. A
    new row's first update shrinks nothing.

    Args:
        tables: Tables (``hash_tables(module)``), or dicts ``{"params": tables, "lr": ...}`` with
            their own hyperparameters.
        lr: Learning rate.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment, after its bias correction.
        alpha: Base rate, in [0, 1); the authors search it between 3e-7 and 0.1, in powers of ten.
            A row is worth little after ``sqrt(2 / alpha)`` missed updates. 0 shrinks nothing.
        clip_grad_norm: Scale all gradients of this optimizer down so that the norm of them
            together is at most this; None leaves them. Gradients of a row are summed first.
        clip_grad_value: Clamp every element of a row's gradient to at most this; None leaves them.
        cow_clip: CowClip's r and zeta, such as ``(1.0, 1e-5)``: a row's gradient has at most
            the norm ``num_ids * max(r * norm(row), zeta)``; ids of the step count as often as they
            occur. After ``clip_grad_norm``, before ``clip_grad_value``; None leaves gradients.

    Example:
        >>> from recis_lightning import DynamicEmbedding, hash_tables
        >>> user = DynamicEmbedding(4)
        >>> optimizer = SparseAdamAR(hash_tables(user), lr=1e-3, alpha=1e-4)
        >>> optimizer.slots(4)
        {'exp_avg': 4, 'exp_avg_sq': 4, 'last_update': 1}

    Source: Li and Lyu, Adaptive Regularization for Large-Scale Sparse Feature Embedding Models,
    2026 (arXiv 2511.06374), Algorithm 1.
    """

    def __init__(
        self,
        tables: Iterable[HashTable] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        alpha: float = 1e-4,
        *,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        cow_clip: Sequence[float] | None = None,
    ) -> None:
        check_bound("alpha", alpha)
        if not alpha < 1:
            raise ValueError(f"alpha: expected a number in [0, 1), got {alpha!r}")
        defaults = {**adam_defaults(lr, betas, eps), "alpha": alpha}
        self._updater, groups = make_updater(tables, lr, clip_grad_norm, clip_grad_value, cow_clip)
        super().__init__(groups, defaults)
        self._own_tables()

    @property
    @override
    def rule(self) -> int:
        return fields.ADAM_AR

    @override
    def slots(self, embedding_dim: int) -> dict[str, int]:
        return {**adam_slots(embedding_dim), "last_update": 1}

    @override
    def state_fill(self) -> float:
        return 0.0

    @override
    def hyperparameters(self, group: dict[str, Any], num_updates: int) -> dict[int, float]:
        shared, _ = adam_fields(group, num_updates)
        return {
            **shared,
            fields.HYPER_EPS: group["eps"],
            fields.HYPER_ALPHA: group["alpha"],
            fields.HYPER_UPDATE: (num_updates - 1) % _NUMBERS + 1,
        }


__all__ = ["SparseAdamAR"]
