"""Checks of arguments that several public classes and functions take."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


MAX_INT = 2**63 - 1  # of an int64


def check_int(name: str, value: int, least: int, alternative: str = "", most: int = MAX_INT) -> int:
    """Return ``value`` if it is an int in [least, most], else raise.

    Args:
        name: Of the argument.
        value: Of the argument.
        least: Smallest valid value.
        alternative: Other valid values, named in the error; the caller accepts them itself.
        most: Largest valid value.

    Raises:
        TypeError: ``value`` is no int.
        ValueError: ``value`` is out of range.

    Example:
        >>> check_int("filter_interval", 0, least=1, alternative=" or None")
        Traceback (most recent call last):
        ValueError: filter_interval: expected an int >= 1 or None, got 0
    """
    message = f"{name}: expected an int >= {least}{alternative}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(message)
    if value < least:
        raise ValueError(message)
    if value > most:
        bound = "2**63 - 1" if most == MAX_INT else str(most)
        raise ValueError(f"{name}: expected an int <= {bound}{alternative}, got {value!r}")
    return value


def check_seed(seed: int) -> int:
    """Return ``seed`` if it is an int in [-2**63, 2**64), as torch takes it, else raise."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected int, got {seed!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an int in [-2**63, 2**64), got {seed!r}")
    return seed


def check_str(name: str, value: str) -> str:
    """Return ``value`` if it is a str, else raise a TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__} ({value!r})")
    return value


def check_embedding_dim(embedding_dim: int) -> int:
    """Return ``embedding_dim`` if it is an int >= 1, else raise."""
    return check_int("embedding_dim", embedding_dim, 1)


def check_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a valid dtype of rows (given as a dtype, or by name as in YAML), else raise."""
    checked = _DTYPES.get(str(dtype).removeprefix("torch."))
    if checked is None:
        raise ValueError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype!r}")
    return checked


def check_ids(ids: Tensor, name: str = "ids") -> Tensor:
    """Return ``ids``, with its sign resolved, if it is an int64 tensor, else raise."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: expected an int64 Tensor, got {type(ids).__name__}")
    if ids.dtype is not torch.int64:
        raise TypeError(f"{name}: expected dtype torch.int64, got {ids.dtype}")
    return ids.resolve_neg()


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
    "MAX_INT",
    "check_bound",
    "check_dtype",
    "check_embedding_dim",
    "check_ids",
    "check_int",
    "check_padding_idx",
    "check_seed",
    "check_str",
]
