"""Dispatch of ops to the kernels of the tensors' device, or to the plain-torch reference."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any, Protocol

import torch

_KERNELS = {"cpu": "cpu", "cuda": "triton"}  # device -> backend
_FOLDERS = {"cpu": "cpu", "triton": "gpu", "reference": "reference"}
Recorder = Callable[[str], AbstractContextManager[object] | None]  # of the region of that name


class Meter(Protocol):
    """Follower of the regions of one step: which begin and end, and what memory they move."""

    def begin_op(self, name: str) -> None:
        """Note that the region of that name begins, on the thread that calls."""

    def end_op(self, name: str, num_bytes: int) -> None:
        """Note that the innermost region ends.

        Args:
            name: Of the region.
            num_bytes: That its op moved, by ``ops.traffic``; 0 of a failed one.
        """


def no_bytes() -> int:
    """Return 0: the region is no op that moves memory by itself."""
    return 0


_forced: str | None = None
_recorder: Recorder | None = None
_meters: tuple[Meter, ...] = ()
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


_NOTHING: AbstractContextManager[object] = nullcontext()


def set_recorder(recorder: Recorder | None) -> None:
    """Have ``recorder`` asked for each region from now on, beside torch's profiler; None: nobody.

    It answers None where it does not record, and does so quickly: every op asks.
    """
    global _recorder
    _recorder = recorder


def add_meter(meter: Meter) -> None:
    """Have ``meter`` told of each region from now on."""
    global _meters
    _meters = (*_meters, meter)


def remove_meter(meter: Meter) -> None:
    """Tell ``meter`` of no more regions; of one that is open it is told the end."""
    global _meters
    _meters = tuple(other for other in _meters if other is not meter)


def has_meters() -> bool:
    """Return whether anybody is told of regions."""
    return bool(_meters)


def region(name: str, num_bytes: Callable[[], int] = no_bytes) -> AbstractContextManager[object]:
    """Return a context that names its block in a trace; nearly free while nobody looks.

    Args:
        name: Of the region.
        num_bytes: Returns the bytes that the block moved; called after it, if a meter asks.
    """
    recorded = None if _recorder is None else _recorder(name)
    if not torch._C._autograd._profiler_enabled():
        if recorded is None and not _meters:
            return _NOTHING
        found = _NOTHING if recorded is None else recorded
    else:
        traced: AbstractContextManager[object] = torch.profiler.record_function(name)
        found = traced if recorded is None else _both(recorded, traced)
    return _metered(_meters, name, num_bytes, found) if _meters else found


@contextmanager
def _both(
    outer: AbstractContextManager[object], inner: AbstractContextManager[object]
) -> Iterator[None]:
    with outer, inner:
        yield


@contextmanager
def _metered(
    meters: tuple[Meter, ...],
    name: str,
    num_bytes: Callable[[], int],
    inner: AbstractContextManager[object],
) -> Iterator[None]:
    for meter in meters:
        meter.begin_op(name)
    size, is_done = 0, False
    try:
        with inner:
            yield
        is_done = True
    finally:
        try:
            size = num_bytes() if is_done else 0
        finally:
            for meter in reversed(meters):
                meter.end_op(name, size)
