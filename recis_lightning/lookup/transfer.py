"""Host-device transfer for a model on a GPU whose tables are on the CPU, by pinned memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recis_lightning.jagged import FeatureBags
from recis_lightning.lookup.held_gradients import once_differentiable


def bags_from_device(bags: FeatureBags, device: torch.device) -> FeatureBags:
    """Copy bags to the CPU, all at once, and wait for them once."""
    ids = list(map(_to_pinned, bags.ids))
    details = [
        bag._replace(
            ids=copy,
            offsets=None if bag.offsets is None else _to_pinned(bag.offsets),
            weights=None if bag.weights is None else _weights_to_pinned(bag.weights),
        )
        for bag, copy in zip(bags.details, ids, strict=False)  # no details if all are plain
    ]
    _wait_for(device)
    return FeatureBags(ids, details)


def outputs_to_device(outputs: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Send outputs to the device without waiting; their gradients come back the same way."""
    return list(_ToDevice.apply(device, *outputs))  # type: ignore[no-untyped-call]


def _to_pinned(tensor: Tensor) -> Tensor:
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)


def _weights_to_pinned(weights: Tensor) -> Tensor:
    return weights.cpu() if weights.requires_grad else _to_pinned(weights)


class _ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, device: torch.device, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.device = device
        pins = device.type == "cuda"
        return tuple(
            (out.pin_memory() if pins else out).to(device, non_blocking=pins, copy=True)
            for out in outputs
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        copies = [None if gradient is None else _to_pinned(gradient) for gradient in gradients]
        _wait_for(ctx.device)
        return (None, *copies)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


__all__ = ["bags_from_device", "outputs_to_device"]
