"""Asynchronous copies from host to device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_PART_BYTES, _NUM_PARTS = 1 << 19, 4  # of a ring
_ALIGNMENT = 64


def to_device_async(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device in the order of its stream, without waiting for it.

    Args:
        values: Read before this returns, so the caller may change it afterwards.
        device: Target device, which may be the CPU.

    Returns:
        A tensor of its shape and dtype.
    """
    return _send(values, device, None)


def copy_async_(target: Tensor, values: npt.NDArray[Any]) -> None:
    """Overwrite a tensor with an array, in the order of its device's stream, without waiting.

    Args:
        target: Tensor of the array's shape and dtype.
        values: Read before this returns, so the caller may change it afterwards.
    """
    _send(values, target.device, target)


def _send(values: npt.NDArray[Any], device: torch.device, target: Tensor | None) -> Tensor:
    """Copy an array to ``target``, or to a new tensor on ``device``; return that."""
    if device.type == "cpu":
        if target is not None and values.flags.writeable:
            return target.copy_(torch.from_numpy(values))
        copied = torch.from_numpy(values.copy())
    elif values.nbytes <= _PART_BYTES and not is_captured(device):
        return _ring_of(device).send(values, device, target)
    else:
        copied = torch.from_numpy(np.ascontiguousarray(values)).pin_memory()
    if is_captured(device):
        _captured.append(copied)
    if target is None and device.type == "cpu":
        return copied
    return _copy(copied, device, target)


def _copy(source: Tensor, device: torch.device, target: Tensor | None) -> Tensor:
    if target is None:
        return source.to(device, non_blocking=True)
    return target.copy_(source, non_blocking=True)


# What CUDA graphs copy from whenever they are replayed: a few KB each, for as long as the process.
_captured: list[Tensor] = []


def is_captured(device: torch.device) -> bool:
    """Return whether what is launched on a device is recorded for a CUDA graph, and not run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Event(Protocol):
    """Point of a stream, as of torch."""

    def synchronize(self) -> Any:
        """Wait until the device has done that."""


class Ring:
    """Memory from which small arrays are copied to one stream of a device, used again and again.

    It has a few parts. When one is full, an event is recorded behind its copies, and before it is
    written again the host waits for that event: by then the host has run ahead by all other parts,
    which is hundreds of steps. So a copy needs no allocation and no event of its own.

    Args:
        part_bytes: Bytes of a part; the most that is sent at once.
        num_parts: Number of parts, at least 2.
        record_event: Returns an event behind all that the stream was given.
        is_pinned: Whether a device reads the memory while the host goes on.

    Example:
        >>> ring = Ring(64, 2, torch.cuda.Event, is_pinned=False)  # none is made yet
        >>> target = torch.zeros(3, dtype=torch.int64)
        >>> ring.send(np.arange(3), target.device, target)
        tensor([0, 1, 2])
    """

    def __init__(
        self, part_bytes: int, num_parts: int, record_event: Callable[[], Event], is_pinned: bool
    ) -> None:
        size = part_bytes * num_parts
        self._memory = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=is_pinned)
        self._bytes = self._memory.numpy()
        self._part_bytes, self._record_event = part_bytes, record_event
        self._events: list[Event | None] = [None] * num_parts
        self._part = self._next = 0
        self._lock = threading.Lock()  # several threads may launch on one stream

    def send(self, values: npt.NDArray[Any], device: torch.device, target: Tensor | None) -> Tensor:
        """Copy an array on the current stream, which is always the same.

        Args:
            values: At most ``part_bytes``.
            device: Where it goes.
            target: Tensor to overwrite; None: a new one.
        """
        with self._lock:
            return _copy(self._put(values), device, target)

    def _put(self, values: npt.NDArray[Any]) -> Tensor:
        """Return a copy of an array in the ring."""
        size = values.nbytes
        if self._next + size > self._part_bytes:
            self._turn()
        first = self._part * self._part_bytes + self._next
        self._next += -(-size // _ALIGNMENT) * _ALIGNMENT
        cells = self._bytes[first : first + size].view(values.dtype).reshape(values.shape)
        cells[...] = values
        return torch.from_numpy(cells)

    def _turn(self) -> None:
        """Go on to the next part, once the device has copied what that holds."""
        self._events[self._part] = self._record_event()
        following = (self._part + 1) % len(self._events)
        waited = self._events[following]
        if waited is not None:
            waited.synchronize()
        self._part, self._next = following, 0


# By device and stream, as long as the process: a device may read their memory at any time.
_rings: dict[tuple[int, int], Ring] = {}


def _ring_of(device: torch.device) -> Ring:
    index = torch.cuda.current_device() if device.index is None else device.index
    key = index, torch._C._cuda_getCurrentRawStream(index)
    ring = _rings.get(key)
    if ring is None:
        stream = torch.cuda.current_stream(index)
        made = Ring(_PART_BYTES, _NUM_PARTS, stream.record_event, is_pinned=True)
        ring = _rings.setdefault(key, made)
    return ring


__all__ = ["Event", "Ring", "copy_async_", "is_captured", "to_device_async"]
