"""Refusal of torch's ``GradScaler``, which sees no gradients of tables and cannot unscale them."""

from __future__ import annotations

import sys
from typing import Any

_SCALER = "torch.amp.grad_scaler"


def _supports_amp_scaling(optimizer: Any) -> bool:
    """Say that a step cannot unscale; to a scaler that is about to take one, by an error.

    Its ``step`` asks first, before it has changed anything. Others ask too, as Lightning does
    where it clips gradients, and are told.

    Raises:
        RuntimeError: A ``GradScaler`` that is enabled asks.
    """
    if sys._getframe(1).f_globals.get("__name__") == _SCALER:
        raise RuntimeError(
            f"{type(optimizer).__name__}: a GradScaler cannot unscale the gradients of tables, "
            "which would move by them times its scale; use bfloat16, which needs no scaler"
        )
    return False


REFUSES_SCALER: Any = property(_supports_amp_scaling)  # as torch's _step_supports_amp_scaling

__all__ = ["REFUSES_SCALER"]
