"""Rows and gradients as they travel between ranks, of fewer bytes where a table asks for it."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_rows(rows: Tensor, exchange_dtype: torch.dtype | None) -> Tensor:
    """Return rows, [n, dim], as they travel; ``.to`` the tables' dtype unpacks them."""
    return rows if exchange_dtype is None else rows.to(exchange_dtype)


def pack_gradients(gradients: Tensor, exchange_dtype: torch.dtype | None) -> Tensor:
    """Return gradients as they travel.

    Args:
        gradients: float32 [n, dim + 1]; the last column says of how many ids each is, or whether
            it is one, and travels as it is.
        exchange_dtype: Of the rest, torch.bfloat16; None for float32.

    Returns:
        float32 [n, dim + 1] or bfloat16 [n, dim + 2].

    Example:
        >>> pack_gradients(torch.ones(3, 5), torch.bfloat16).shape
        torch.Size([3, 6])
    """
    if exchange_dtype is None:
        return gradients
    packed = gradients.new_empty(len(gradients), gradients.shape[1] + 1, dtype=exchange_dtype)
    packed[:, :-2] = gradients[:, :-1]
    packed[:, -2:] = _cloned(gradients[:, -1:]).view(exchange_dtype)
    return packed


def unpack_gradients(packed: Tensor, exchange_dtype: torch.dtype | None) -> Tensor:
    """Return what ``pack_gradients`` was given, with rounded gradients."""
    if exchange_dtype is None:
        return packed
    gradients = packed.new_empty(len(packed), packed.shape[1] - 1, dtype=torch.float32)
    gradients[:, :-1] = packed[:, :-2]
    gradients[:, -1:] = _cloned(packed[:, -2:]).view(torch.float32)
    return gradients


def _cloned(columns: Tensor) -> Tensor:
    """Return a copy that may be viewed as another dtype: ``contiguous`` copies no single row."""
    return columns.clone(memory_format=torch.contiguous_format)


__all__ = ["pack_gradients", "pack_rows", "unpack_gradients"]
