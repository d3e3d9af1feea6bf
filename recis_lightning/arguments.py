"""Arguments that several parts of the public face take, and what is said of wrong ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_int(name: str, value: int, least: int, alternative: str = "") -> int:
    """Return ``value`` if it is an int >= ``least``, else raise.

    Args:
        name: The argument's.
        value: What it got.
        least: The smallest that it may be.
        alternative: What else it may be, for the error; such values are not for this function.

    Example:
        >>> check_int("filter_interval", 0, least=1, alternative=" or None")
        Traceback (most recent call last):
        ValueError: filter_interval: expected an int >= 1 or None, got 0
    """
    wanted = f"{name}: expected an int >= {least}{alternative}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(wanted)
    if value < least:
        raise ValueError(wanted)
    return value


def check_embedding_dim(embedding_dim: int) -> int:
    """Return ``embedding_dim`` if it is an int >= 1, else raise."""
    return check_int("embedding_dim", embedding_dim, 1)


def check_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a dtype that rows can have (also by name, as YAML writes it), else raise."""
    found = _DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype!r}")
    return found


def check_ids(ids: Tensor, name: str = "ids") -> Tensor:
    """Return ``ids`` if it is an int64 tensor, else raise."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: expected an int64 Tensor, got {type(ids).__name__}")
    if ids.dtype is not torch.int64:
        raise TypeError(f"{name}: expected dtype torch.int64, got {ids.dtype}")
    return ids


def check_padding_idx(padding_idx: int | None) -> int | None:
    """Return ``padding_idx`` if it is an int64 or None, else raise."""
    if padding_idx is None:
        return None
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, int):
        raise TypeError(f"padding_idx: expected an int or None, got {padding_idx!r}")
    if not -(2**63) <= padding_idx < 2**63:
        raise ValueError(f"padding_idx: expected an int64, got {padding_idx!r}")
    return padding_idx


def check_bound(name: str, value: float, low: float = 0.0, high: float = math.inf) -> None:
    """Raise unless ``low <= value < high``."""
    if not low <= value < high:
        wanted = f">= {low}" if high == math.inf else f"in [{low}, {high})"
        raise ValueError(f"{name}: expected a number {wanted}, got {value!r}")


__all__ = [
    "check_bound",
    "check_dtype",
    "check_embedding_dim",
    "check_ids",
    "check_int",
    "check_padding_idx",
]
