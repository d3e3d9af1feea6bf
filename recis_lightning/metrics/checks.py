"""Checks of what metrics are updated with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["check_tensors", "is_finite_weight"]


def check_tensors(preds: Any, **others: Any) -> None:
    """Raise unless the scores are floating point, and everything else a tensor or None.

    Raises:
        TypeError: Names the argument.
    """
    for name, value in {"preds": preds, **others}.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if preds is None or not preds.is_floating_point():
        got = None if preds is None else preds.dtype
        raise TypeError(f"preds: expected a floating point dtype, got {got}")


def is_finite_weight(weights: Tensor) -> bool:
    """Return whether all weights are finite and at least 0."""
    return bool(((weights >= 0) & weights.isfinite()).all())
