"""Checks of arguments that several public classes and functions take."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NoReturn

import torch
from torch import Tensor

# torch's own flags that a program is being recorded; asked in every lookup, so without wrappers.
_tracing_state = torch._C._get_tracing_state
_dispatch_mode = torch._C._get_dispatch_mode
_FAKE = torch._C._TorchDispatchModeKey.FAKE
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_functorch_interpreter = torch._C._functorch.peek_interpreter_stack
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

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
    """Return ``ids`` if it is an int64 tensor, else raise."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: expected an int64 Tensor, got {type(ids).__name__}")
    if ids.dtype is not torch.int64:
        raise TypeError(f"{name}: expected dtype torch.int64, got {ids.dtype}")
    return ids


def check_not_traced(what: str, tensors: Iterable[Tensor]) -> None:
    """Raise where torch records or transforms a program, which cannot follow a table's kernels.

    Args:
        what: Is looked up, for the error.
        tensors: Ids; those that ``torch.func`` wraps have no memory.

    Raises:
        RuntimeError: torch traces, exports or transforms what runs.
    """
    if _tracing_state() is not None:
        kind = "torch.jit.trace (and torch.onnx.export over it)"
    elif _dispatch_mode(_FAKE) is not None or _dispatch_mode(_PROXY) is not None:
        kind = "torch.export, torch.onnx.export, make_fx and FakeTensorMode"
    elif _functorch_interpreter() is not None and any(map(_is_wrapped, tensors)):
        kind = "torch.func (vmap, grad, jvp)"
    else:
        return
    refuse_recording(what, kind)


def refuse_recording(what: str, kind: str) -> NoReturn:
    """Raise because a program is recorded.

    Args:
        what: Is looked up.
        kind: What records the program.
    """
    raise RuntimeError(
        f"{what}: {kind} cannot follow a lookup, whose kernels read and change memory behind "
        "torch's back; leave the lookup outside, and trace or export the module that takes "
        "embeddings"
    )


def refuse_script(what: str) -> NoReturn:
    """Raise where ``torch.jit.script`` asks a module to prepare itself."""
    refuse_recording(what, "torch.jit.script")


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
    "check_not_traced",
    "check_padding_idx",
    "check_str",
    "refuse_recording",
    "refuse_script",
]
