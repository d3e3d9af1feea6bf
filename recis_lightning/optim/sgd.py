"""SGD of tables, with momentum or without."""

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
class SparseSGD(SparseOptimizer):
    """``w = w - lr * g`` on the rows with a gradient, as ``torch.optim.SGD``.

    With momentum it is ``m = momentum * m + g; w = w - lr * m``, or with Nesterov's
    ``w = w - lr * (g + momentum * m)``. The momentum of a row without a gradient waits: it neither
    decays nor moves the row.

    Args:
        tables: Tables (``hash_tables(module)``), or dicts ``{"params": tables, "lr": ...}`` with
            their own hyperparameters.
        lr: Learning rate.
        momentum: Share of the momentum that stays. If it is 0 in all groups when the optimizer is
            made, rows have no momentum, and it must stay 0.
        weight_decay: This times the weights is added to the gradients of the rows that have one.
        nesterov: Whether the step looks ahead along the momentum; it needs a momentum.
        clip_grad_norm: Scale all gradients of this optimizer down so that the norm of them
            together is at most this; None leaves them. Gradients of a row are summed first.
        clip_grad_value: Clamp every element of a row's gradient to at most this; None leaves them.
        cow_clip: CowClip's r and zeta, such as ``(1.0, 1e-5)``: a row's gradient has at most
            the norm ``num_ids * max(r * norm(row), zeta)``; ids of the step count as often as they
            occur. After ``clip_grad_norm``, before ``clip_grad_value``; None leaves gradients.

    Source: Sutskever, Martens, Dahl and Hinton, 2013.
    """

    def __init__(
        self,
        tables: Iterable[HashTable] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        cow_clip: Sequence[float] | None = None,
    ) -> None:
        check_bound("momentum", momentum)
        check_bound("weight_decay", weight_decay)
        if not isinstance(nesterov, bool):
            raise TypeError(f"nesterov: expected a bool, got {nesterov!r}")
        if nesterov and not momentum:
            raise ValueError("nesterov: expected False without a momentum, got True")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        self._updater, groups = make_updater(tables, lr, clip_grad_norm, clip_grad_value, cow_clip)
        super().__init__(groups, defaults)
        self._own_tables()

    @property
    @override
    def rule(self) -> int:
        if not self._has_momentum():
            return fields.SGD
        return with_decay(fields.MOMENTUM, self.param_groups)

    @override
    def slots(self, embedding_dim: int) -> dict[str, int]:
        groups = [self.defaults, *self.param_groups]
        has_momentum = any(group.get("momentum", 0) for group in groups)
        return {"momentum_buffer": embedding_dim} if has_momentum else {}

    @override
    def state_fill(self) -> float:
        return 0.0

    @override
    def hyperparameters(self, group: dict[str, Any], num_updates: int) -> dict[int, float]:
        lr, momentum = group["lr"], group.get("momentum", 0.0)  # older pickles have lr alone
        weight_decay = group.get("weight_decay", 0.0)
        if not self._has_momentum():
            if momentum:
                raise ValueError(
                    f"momentum: expected 0, got {momentum!r}; it was 0 when this SparseSGD was "
                    "made, so that rows have none"
                )
            return {fields.HYPER_LR: lr, fields.HYPER_DECAY: 1 - lr * weight_decay}
        is_nesterov = group["nesterov"]
        return {
            fields.HYPER_LR: lr,
            fields.HYPER_MOMENTUM: momentum,
            fields.HYPER_OF_BUFFER: momentum if is_nesterov else 1.0,
            fields.HYPER_OF_GRADIENT: 1.0 if is_nesterov else 0.0,
            fields.HYPER_WEIGHT_DECAY: weight_decay,
        }

    def _has_momentum(self) -> bool:
        """Return whether the rows of its tables, not given to another since, have a momentum."""
        own = next((table for table in self._updater.tables if table.optimizer is self), None)
        return own is not None and "momentum_buffer" in own.storage.rows.slots


__all__ = ["SparseSGD"]
