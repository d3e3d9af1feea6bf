"""Asynchronous copies from host to device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_device_async(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device in the order of its stream, without waiting for it.

    Args:
        values: Read before this returns, so the caller may change it afterwards.
        device: Target device, which may be the CPU.

    Returns:
        A tensor of its shape and dtype.
    """
    return _pinned(values, device).to(device, non_blocking=True)


def copy_async_(target: Tensor, values: npt.NDArray[Any]) -> None:
    """Overwrite a tensor with an array, in the order of its device's stream, without waiting.

    Args:
        target: Tensor of the array's shape and dtype.
        values: Read before this returns, so the caller may change it afterwards.
    """
    target.copy_(_pinned(values, target.device), non_blocking=True)


def _pinned(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return a copy of values in pinned memory, from which a device copies asynchronously."""
    if device.type == "cpu":
        copied = torch.from_numpy(values.copy())
    else:
        copied = torch.from_numpy(np.ascontiguousarray(values)).pin_memory()
    if is_captured(device):
        _captured.append(copied)
    return copied


# What CUDA graphs copy from whenever they are replayed: a few KB each, for as long as the process.
_captured: list[Tensor] = []


def is_captured(device: torch.device) -> bool:
    """Return whether what is launched on a device is recorded for a CUDA graph, and not run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


__all__ = ["copy_async_", "is_captured", "to_device_async"]
