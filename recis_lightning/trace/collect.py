"""``add_to_trace``: collect chosen tensors of a step."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from recis_lightning.jagged import Jagged
from recis_lightning.trace.files import (
    check_kind,
)

__all__ = ["TraceCollection", "add_to_trace", "collect_trace"]

_collections: list[TraceCollection] = []
_lock = threading.Lock()


class TraceCollection(dict[str, Any]):
    """What is added to the trace while this is open: name -> a copy of the value."""

    def __init__(self, names: Collection[str] | None) -> None:
        super().__init__()
        self.names = names

    def open(self) -> TraceCollection:
        """Take up what is added from now on."""
        with _lock:
            _collections.append(self)
        return self

    def close(self) -> TraceCollection:
        """Take up no more."""
        with _lock:
            _collections[:] = [other for other in _collections if other is not self]
        return self


def add_to_trace(name: str, tensor: Any) -> None:
    """Add a value to the trace of this step, if a ``TraceHook`` or ``collect_trace`` wants it.

    A copy is kept, on the value's device; where nobody wants it, nothing is done. Of a name that
    is added twice in a step, the last value counts.

    Args:
        name: The column's name.
        tensor: A row for each example: a tensor or NumPy array [B, ...], a jagged NestedTensor
            [B, j, ...], a ``Jagged`` or a list of B. A number, a string or a 0-d tensor stands for
            every example of its step.

    Raises:
        TypeError: ``name`` is no str, or ``tensor`` is none of these.

    Example:
        >>> import torch
        >>> with collect_trace() as found:
        ...     add_to_trace("score", torch.tensor([0.5, 0.25]))
        >>> found["score"]
        tensor([0.5000, 0.2500])
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {type(name).__name__} ({name!r})")
    for collection in _collections:
        if collection.names is None or name in collection.names:
            collection[name] = _copied(name, tensor)


@contextmanager
def collect_trace(names: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """Collect what ``add_to_trace`` is given within a ``with`` block: name -> value.

    Args:
        names: Which names; None takes all.
    """
    collection = TraceCollection(names).open()
    try:
        yield collection
    finally:
        collection.close()


def _copied(name: str, value: Any) -> Any:
    """Copy a value, on its device: what it was made from may change before it is written."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Jagged):
        return Jagged(value.values.detach().clone(), value.offsets.detach().clone())
    if isinstance(value, np.ndarray | np.generic):
        return np.array(value)
    if isinstance(value, list):
        return list(value)
    return check_kind(name, value)
