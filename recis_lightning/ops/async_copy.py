"""Copies from the host that never make it wait for a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_device_async(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device in the order of its stream, without waiting for it.

    Args:
        values: Read before this returns: the caller may change it then.
        device: Where to; the CPU too.

    Returns:
        A tensor of its shape and dtype.
    """
    return _pinned(values, device).to(device, non_blocking=True)


def copy_async_(target: Tensor, values: npt.NDArray[Any]) -> None:
    """Overwrite a tensor on a device with an array as ``to_device_async`` copies one."""
    target.copy_(_pinned(values, target.device), non_blocking=True)


def _pinned(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return values copied to where a device can take them without the host waiting."""
    if device.type == "cpu":
        return torch.from_numpy(values.copy())
    return torch.from_numpy(np.ascontiguousarray(values)).pin_memory()


__all__ = ["copy_async_", "to_device_async"]
