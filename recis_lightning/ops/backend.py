"""Dispatch of ops to the kernels of the tensors' device, or to the plain-torch reference."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch

_KERNELS = {"cpu": "cpu", "cuda": "triton"}  # device -> backend
_FOLDERS = {"cpu": "cpu", "triton": "gpu", "reference": "reference"}
Recorder = Callable[[str], AbstractContextManager[object] | None]  # of the region of that name

_forced: str | None = None
_recorder: Recorder | None = None
_loaded: dict[tuple[str, str], ModuleType] = {}


def check_device(device: torch.device) -> torch.device:
    """Return ``device``, with its index if it is a GPU, if tables can live there.

    Raises:
        ValueError: No kernels for the device, no such device here, or no Triton.
    """
    if device.type not in _KERNELS:
        raise ValueError(
            f"device: tables have kernels for {sorted(_KERNELS)}, got {str(device)!r}; keep the "
            "table on device='cpu'"
        )
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"device: torch finds no GPU here, got {str(device)!r}; expected 'cpu'")
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            f"device: tables on a GPU need Triton, got {str(device)!r}; pip install triton"
        )
    return torch.device(
        "cuda", torch.cuda.current_device() if device.index is None else device.index
    )


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run ops with backend ``name``, ``"cpu"``, ``"triton"`` or ``"reference"``, on any device.

    ``"triton"`` runs over the CPU's memory where kernels are interpreted; see ``ops.gpu.runtime``.
    """
    global _forced
    if name not in _FOLDERS:
        raise ValueError(f"name: expected one of {sorted(_FOLDERS)}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def module(
    op: str, device: torch.device, backend: str | None = None, small: str | None = None
) -> Any:
    """Return the module that implements ``op`` (an op file's name) on ``device``.

    Args:
        op: Name of the op's file.
        device: Of its tensors.
        backend: As for ``use``; None: the device's, or the one in use.
        small: Backend to take while the device's is not loaded, for work that is too small to load
            it for; None: that work is not small.
    """
    name = backend or _forced or _KERNELS[device.type]
    loaded = _loaded.get((op, name))
    if loaded is None and small is not None and not (backend or _forced):
        return module(op, device, small)
    if loaded is None:
        loaded = importlib.import_module(f"recis_lightning.ops.{_FOLDERS[name]}.{op}")
        _loaded[op, name] = loaded
    return loaded


def is_async(device: torch.device) -> bool:
    """Return whether kernels of tables on ``device`` run asynchronously to the host."""
    return (_forced or _KERNELS[device.type]) == "triton"


def set_recorder(recorder: Recorder | None) -> None:
    """Have ``recorder`` asked for each region from now on, beside torch's profiler; None: nobody.

    It answers None where it does not record, and does so quickly: every op asks.
    """
    global _recorder
    _recorder = recorder


def region(name: str) -> AbstractContextManager[object]:
    """Return a context that names its block in a trace; nearly free while no profiler runs."""
    recorded = None if _recorder is None else _recorder(name)
    if not torch._C._autograd._profiler_enabled():
        return nullcontext() if recorded is None else recorded
    traced: AbstractContextManager[object] = torch.profiler.record_function(name)
    return traced if recorded is None else _both(recorded, traced)


@contextmanager
def _both(
    outer: AbstractContextManager[object], inner: AbstractContextManager[object]
) -> Iterator[None]:
    with outer, inner:
        yield
