"""Clipping of the norm of all gradients together, of dense parameters and of tables' rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from recis_lightning.arguments import check_bound
from recis_lightning.distributed import collectives
from recis_lightning.optim.sparse_optimizer import SparseOptimizer
from recis_lightning.table.anchor import Anchor

__all__ = ["check_clipping", "clip_grad_norm_"]


def check_clipping(max_norm: float, norm_type: float, error_if_nonfinite: bool) -> None:
    """Raise if an argument of ``clip_grad_norm_`` is wrong.

    Raises:
        TypeError: One is of another type.
        ValueError: ``max_norm`` is negative or no number, or ``norm_type`` is not above 0.
    """
    if max_norm != math.inf:
        check_bound("max_norm", max_norm)
    if isinstance(norm_type, bool) or not isinstance(norm_type, int | float):
        raise TypeError(f"norm_type: expected a number > 0 or inf, got {norm_type!r}")
    if not norm_type > 0:
        raise ValueError(f"norm_type: expected a number > 0 or inf, got {norm_type!r}")
    if not isinstance(error_if_nonfinite, bool):
        raise TypeError(f"error_if_nonfinite: expected a bool, got {error_if_nonfinite!r}")


def clip_grad_norm_(
    optimizers: Optimizer | Sequence[Optimizer],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale all gradients of some optimizers down, so that their norm is at most ``max_norm``.

    There is one norm, over the gradients of all dense parameters and of all rows of all tables, on
    all ranks: that of ``torch.nn.utils.clip_grad_norm_`` over the same model with ``nn.Embedding``.
    To be called once for each step, after its last backward pass. Rows' gradients are scaled when
    the step uses them. The host waits for a GPU only with ``error_if_nonfinite``, or another norm
    than 2 on several ranks.

    Args:
        optimizers: One or several, dense, sparse or joined; Lightning's wrappers too.
        max_norm: Bound of the norm; ``inf`` only computes it.
        norm_type: The p of the p-norm; ``inf`` for the largest element. Only 2 for tables on a GPU.
        error_if_nonfinite: Raise if the norm is NaN or infinite.

    Returns:
        float32 [], the norm before clipping, the same on all ranks.

    Raises:
        RuntimeError: The norm is not finite and ``error_if_nonfinite`` is set; or tables got
            gradients since theirs were clipped. Nothing was changed.
        TypeError: An argument is of another type.
        ValueError: A number is out of range.

    Example:
        >>> from recis_lightning import DynamicEmbedding, hash_tables
        >>> from recis_lightning.optim import SparseSGD
        >>> user = DynamicEmbedding(4, name="user")
        >>> optimizer = SparseSGD(hash_tables(user))
        >>> user(torch.tensor([7, 7, 9])).sum().backward()  # 2 four times, and 1 four times
        >>> clip_grad_norm_(optimizer, max_norm=1.0)
        tensor(4.4721)
    """
    check_clipping(max_norm, norm_type, error_if_nonfinite)
    dense, sparse = _parts(optimizers)
    gradients = [parameter.grad for parameter in dense if parameter.grad is not None]
    total = get_total_norm(gradients, norm_type).double() if gradients else None
    if sparse:
        of_tables = _norm_of_tables(sparse, norm_type)
        device = of_tables.device if total is None else total.device
        both = [of_tables.to(device)] if total is None else [total, of_tables.to(device)]
        total = torch.linalg.vector_norm(torch.stack(both), norm_type)
    if total is None:
        return torch.tensor(0.0, device="cpu")
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"the gradients' norm of order {norm_type} is {total.item()}, which clipping cannot "
            "mend; error_if_nonfinite=False lets such gradients pass"
        )
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for optimizer in sparse:
        optimizer.scale_pending_(scale)
    if gradients:
        clip_grads_with_norm_(dense, max_norm, total.float())
    return total.float()


def _norm_of_tables(sparse: Sequence[SparseOptimizer], norm_type: float) -> Tensor:
    """Return the norm of all rows' gradients on all ranks, float64 []."""
    powers = [optimizer.norm_power(norm_type) for optimizer in sparse]
    stacked = torch.stack([power.to(powers[0].device) for power in powers])
    if not math.isinf(norm_type):
        groups = [optimizer.tables[0].process_group for optimizer in sparse]
        total = stacked.new_zeros(())
        for process_group in dict.fromkeys(groups):
            own = torch.stack(
                [p for p, g in zip(stacked, groups, strict=True) if g is process_group]
            )
            total = total + collectives.sum_over_ranks(own.sum(), process_group)
        return total ** (1 / norm_type)
    largest = stacked.max()
    if collectives.world_size() > 1:
        of_ranks = torch.tensor(
            collectives.gather_numbers([largest.item()]), dtype=torch.float64, device="cpu"
        )
        largest = of_ranks.max().to(largest.device)
    return largest


def _parts(optimizers: Any) -> tuple[list[Tensor], list[SparseOptimizer]]:
    """Return the dense parameters and the sparse optimizers, each once."""
    given = list(optimizers) if isinstance(optimizers, Sequence) else [optimizers]
    dense: dict[int, Tensor] = {}
    sparse: dict[int, SparseOptimizer] = {}
    for wrapped in given:
        optimizer = getattr(wrapped, "optimizer", wrapped)  # LightningOptimizer has one
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizers: expected torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        for part in getattr(optimizer, "sparse", [optimizer]):
            if isinstance(part, SparseOptimizer):
                sparse[id(part)] = part
        for group in optimizer.param_groups:
            dense |= {id(p): p for p in group["params"] if not isinstance(p, Anchor)}
    return list(dense.values()), list(sparse.values())
