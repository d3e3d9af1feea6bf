"""Memory that a table keeps on its device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_FREE_ON_CPU = 1 << 30


def empty(shape: int | Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised memory that may be changed in place from anywhere.

    What is made in inference mode nothing outside may change, so it is left for the allocation.

    Args:
        shape: Of the tensor.
        dtype: Of the tensor.
        device: Where it is.

    Raises:
        MemoryError: The device has no room for it; names the bytes and the device.

    Example:
        >>> with torch.inference_mode():
        ...     cells = empty(2, torch.int64, torch.device("cpu"))
        >>> cells.zero_().tolist()
        [0, 0]
    """
    with torch.inference_mode(False):
        try:
            return torch.empty(shape, dtype=dtype, device=device)
        except torch.OutOfMemoryError as error:
            size = torch.Size([shape] if isinstance(shape, int) else shape)
            raise MemoryError(f"{size.numel() * dtype.itemsize} bytes on {device}") from error


def zeros(shape: int | Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``empty`` memory that is filled with zeros."""
    return empty(shape, dtype, device).zero_()


def free_bytes(device: torch.device) -> int:
    """Return how much memory is free on a device, what torch keeps for later included.

    On a CPU, whose memory nobody asks for in advance, it is what the tests of GPU tables may take.
    """
    if device.type == "cpu":
        return _FREE_ON_CPU
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + kept


__all__ = ["empty", "free_bytes", "zeros"]
