"""Which module runs an op: the kernels of the tensors' device, or the plain-torch reference."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch

_KERNELS = {"cpu": "cpu"}
_forced: str | None = None
_loaded: dict[tuple[str, str], ModuleType] = {}


def check_device(device: torch.device) -> torch.device:
    """Return ``device`` if tables can live there.

    Raises:
        ValueError: No kernels for the device.
    """
    if device.type not in _KERNELS:
        raise ValueError(
            f"device: tables have kernels for {sorted(_KERNELS)} in this version, got "
            f"{str(device)!r}; keep the table on device='cpu'"
        )
    return device


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run ops with backend ``name``, ``"cpu"`` or ``"reference"``, whatever the device."""
    global _forced
    if name not in (*_KERNELS.values(), "reference"):
        raise ValueError(f"name: expected one of 'cpu', 'reference', got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def module(op: str, device: torch.device) -> Any:
    """Return the module that implements ``op`` (an op file's name) on ``device``."""
    name = _forced or _KERNELS[device.type]
    found = _loaded.get((op, name))
    if found is None:
        path = "reference" if name == "reference" else f"{op}_{name}"
        found = importlib.import_module(f"recis_lightning.ops.{path}")
        _loaded[op, name] = found
    return found


def region(name: str) -> AbstractContextManager[object]:
    """Name what runs inside in a trace; costs next to nothing while no profiler runs."""
    if torch._C._autograd._profiler_enabled():
        return torch.profiler.record_function(name)
    return nullcontext()
