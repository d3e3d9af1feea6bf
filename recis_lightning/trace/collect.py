"""``add_to_trace``: collection of selected tensors of a step.

Unlike the registries of ``recis_lightning.metrics``, which keep every value until someone reads it,
a trace costs nothing unless a collection is open, several may be open at once, and each gets
copies, since it is read after the step. So the three share no store.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from recis_lightning.arguments import check_str
from recis_lightning.jagged import Jagged
from recis_lightning.nested_jagged import NestedJagged
from recis_lightning.trace.files import check_scalar

__all__ = ["TraceCollection", "add_to_trace", "collect_trace"]

_collections: list[TraceCollection] = []
_lock = threading.Lock()


class TraceCollection(dict[str, Any]):
    """Values added to the trace while this is open: name -> a copy of the value.

    Args:
        names: Names to collect; None collects all.

    Attributes:
        passed_over: Names that were added and are not collected.
    """

    def __init__(self, names: Collection[str] | None) -> None:
        super().__init__()
        self.names = names
        self.passed_over: set[str] = set()

    def open(self) -> TraceCollection:
        """Collect values that are added from now on."""
        with _lock:
            _collections.append(self)
        return self

    def close(self) -> TraceCollection:
        """Stop collecting."""
        with _lock:
            _collections[:] = [other for other in _collections if other is not self]
        return self


def add_to_trace(name: str, tensor: Any) -> None:
    """Add a value to the trace of this step, if a ``TraceHook`` or ``collect_trace`` collects it.

    A copy is kept, on the value's device; a name that nobody collects costs nothing. If a name is
    added twice in a step, the last value is kept.

    Args:
        name: The column's name.
        tensor: A row for each example: a tensor or NumPy array [B, ...], a jagged NestedTensor
            [B, j, ...], a ``Jagged`` or ``NestedJagged``, without weights, or a list of B. A
            number, a string or a 0-d tensor is repeated for every example of its step.

    Raises:
        TypeError: ``name`` is no str, or ``tensor`` is none of these.

    Example:
        >>> import torch
        >>> with collect_trace() as collected:
        ...     add_to_trace("score", torch.tensor([0.5, 0.25]))
        >>> collected["score"]
        tensor([0.5000, 0.2500])
    """
    check_str("name", name)
    for collection in _collections:
        if collection.names is None or name in collection.names:
            collection[name] = _copy(name, tensor)
        else:
            collection.passed_over.add(name)


@contextmanager
def collect_trace(names: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """Collect the values of ``add_to_trace`` within a ``with`` block: name -> value.

    Args:
        names: Names to collect; None collects all.
    """
    collection = TraceCollection(names).open()
    try:
        yield collection
    finally:
        collection.close()


def _copy(name: str, value: Any) -> Any:
    """Return a copy of a value, on its device: the original may change before it is written."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Jagged | NestedJagged):
        parts = [None if part is None else part.detach().clone() for part in value]
        return type(value)(*parts[:-1])  # type: ignore[arg-type]
    if isinstance(value, np.ndarray | np.generic):
        return np.array(value)
    if isinstance(value, list):
        return list(value)
    return check_scalar(name, value)
