"""Checks of arguments that several public classes and functions take."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_int(name: str, value: int, least: int, alternative: str = "") -> int:
    """Return ``value`` if it is an int >= ``least``, else raise.

    Args:
        name: Of the argument.
        value: Of the argument.
        least: Smallest valid value.
        alternative: Other valid values, named in the error; the caller accepts them itself.

    Raises:
        TypeError: ``value`` is no int.
        ValueError: ``value`` is below ``least``.

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
    return value


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
    """Return ``ids`` as int64 if it is a strided tensor of int64 or int32, else raise.

    Example:
        >>> check_ids(torch.tensor([7], dtype=torch.int32))
        tensor([7])
        >>> check_ids(torch.tensor([0.5]), "item")
        Traceback (most recent call last):
        TypeError: item: expected dtype torch.int64 or torch.int32, got torch.float32
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: expected an int64 Tensor, got {type(ids).__name__}")
    if ids.dtype is not torch.int64:
        if ids.dtype is not torch.int32:
            raise TypeError(f"{name}: expected dtype torch.int64 or torch.int32, got {ids.dtype}")
        check_strided(ids, name)
        ids = ids.long()
    if type(ids) is not Tensor or ids.layout is not torch.strided:
        check_strided(ids, name)
    return ids


def check_strided(tensor: Tensor, name: str) -> None:
    """Raise a TypeError unless ``tensor`` is a dense one that has data: kernels read its memory."""
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense Tensor, got one of layout {tensor.layout}")
    if type(tensor) is not Tensor and (
        is_traceable_wrapper_subclass(tensor)
        or tensor.untyped_storage().device.type != tensor.device.type
    ):
        raise TypeError(
            f"{name}: expected a Tensor with data, got a {type(tensor).__name__}, which has none"
        )


def check_kernels_may_run() -> None:
    """Raise where torch's tensors have no data: kernels are given addresses, and nothing else.

    Raises:
        RuntimeError: A transform of torch.func, or FakeTensorMode, is active.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "a table cannot be used under torch.func (vmap, grad, jvp, ...); look up outside, and "
            "transform what is done with the embeddings"
        )
    if torch._C._len_torch_dispatch_stack() and _is_fake_mode_active():
        raise RuntimeError(
            "a table cannot be used or made under FakeTensorMode, where tensors have no data; do "
            "it outside"
        )


def _is_fake_mode_active() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


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
    "check_kernels_may_run",
    "check_padding_idx",
    "check_str",
    "check_strided",
]
