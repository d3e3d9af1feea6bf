"""Registries of named values, which hooks report: ``add_metric`` and ``add_to_ml_tracker``."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar, final

import numpy as np
import torch
from torch import Tensor

from recis_lightning.arguments import check_str

__all__ = [
    "add_metric",
    "add_to_ml_tracker",
    "clear_metrics",
    "get_metrics",
    "take_tracked",
]

_Value = TypeVar("_Value")


@final
class StepValues(Generic[_Value]):
    """Values that a model names in its steps, for a hook to collect; usable from any thread."""

    def __init__(self) -> None:
        self._values: dict[str, _Value] = {}
        self._lock = threading.Lock()

    def add(self, name: str, value: _Value) -> None:
        """Add a value, or replace the one of that name."""
        with self._lock:
            self._values[name] = value

    def copy(self) -> dict[str, _Value]:
        """Return all values, in the order in which their names were first added."""
        with self._lock:
            return dict(self._values)

    def take(self) -> dict[str, _Value]:
        """Return all values and remove them."""
        with self._lock:
            taken, self._values = self._values, {}
        return taken


_metrics: StepValues[object] = StepValues()
_tracked: StepValues[float | Tensor] = StepValues()


def add_metric(name: str, metric: object) -> None:
    """Add a value to the process-wide registry that ``LoggerHook`` reports, or replace it.

    Cheap enough for every training step: nothing is copied to the host here.

    Args:
        name: The name in log lines, progress bar and loggers.
        metric: A number, a tensor (detached from its graph), a ``torchmetrics.Metric`` or
            ``MetricCollection`` (computed at each report, never reset), a callable without
            arguments (called at each report), or anything else (appears in the line only).

    Raises:
        TypeError: ``name`` is not a ``str``.

    Example:
        >>> add_metric("accuracy", 0.95)
        >>> get_metrics()["accuracy"]
        0.95
        >>> clear_metrics()
    """
    check_str("name", name)
    _metrics.add(name, metric.detach() if isinstance(metric, Tensor) else metric)


def get_metrics() -> dict[str, object]:
    """Return a copy of the registry, in the order in which names were first added.

    Example:
        >>> add_metric("loss", 0.5)
        >>> get_metrics()["loss"]
        0.5
        >>> clear_metrics()
    """
    return _metrics.copy()


def clear_metrics() -> None:
    """Remove every registered value.

    Example:
        >>> add_metric("loss", 0.5)
        >>> clear_metrics()
        >>> get_metrics()
        {}
    """
    _metrics.take()


def add_to_ml_tracker(name: str, data: object) -> None:
    """Add a value that ``MLTrackerHook`` writes to the Trainer's loggers once.

    Cheap enough for every training step: nothing is copied to the host here. If a name is added
    twice before the hook writes, it writes the last value.

    Args:
        name: The name in the loggers.
        data: A number, or numbers as a tensor (detached from its graph), NumPy array or list.

    Raises:
        TypeError: ``name`` is not a ``str``, or ``data`` is none of these.

    Example:
        >>> add_to_ml_tracker("learning_rate", 0.01)
        >>> take_tracked()
        {'learning_rate': 0.01}
    """
    check_str("name", name)
    value: float | Tensor
    if isinstance(data, Tensor):
        value = data.detach()
    elif isinstance(data, bool | int | float):
        value = data
    elif isinstance(data, np.ndarray | np.generic | list | tuple):
        array = np.asarray(data)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"data: expected numbers for {name!r}, got dtype {array.dtype}")
        value = torch.tensor(array, device="cpu")
    else:
        raise TypeError(
            f"data: expected a number, tensor, array or list for {name!r}, "
            f"got {type(data).__name__}"
        )
    _tracked.add(name, value)


def take_tracked() -> dict[str, float | Tensor]:
    """Return the values added by ``add_to_ml_tracker`` since the last call, and remove them."""
    return _tracked.take()
