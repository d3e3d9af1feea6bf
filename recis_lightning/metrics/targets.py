"""Checks of targets."""

from __future__ import annotations

from torch import Tensor

__all__ = ["check_binary"]

_SHOWN = 3


def check_binary(target: Tensor) -> None:
    """Raise a ValueError that counts the values that are neither 0 nor 1.

    Args:
        target: Of any shape and dtype.

    Example:
        >>> import torch
        >>> check_binary(torch.tensor([0.0, 1.0, 4.0, torch.nan]))
        Traceback (most recent call last):
        ...
        ValueError: target: expected 0 or 1 everywhere, got 2 of 4 others: 1 NaN, 1 such as 4.0
    """
    is_other = (target != 0) & (target != 1)
    if not is_other.any():
        return
    others = target[is_other]
    is_nan = others != others
    numbers, num_nan = others[~is_nan].unique(), int(is_nan.sum())
    parts = [f"{num_nan} NaN"] if num_nan else []
    if numbers.numel():
        shown = ", ".join(str(number) for number in numbers[:_SHOWN].tolist())
        parts.append(f"{others.numel() - num_nan} such as {shown}")
    raise ValueError(
        f"target: expected 0 or 1 everywhere, got {others.numel()} of {target.numel()} others: "
        f"{', '.join(parts)}"
    )
