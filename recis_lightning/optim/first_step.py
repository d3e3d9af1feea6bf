"""Registration of a listener that hears when tables begin to train."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from recis_lightning.table.hash_table import HashTable

__all__ = ["announce_first_step", "on_first_step"]

Listener = Callable[[Sequence[HashTable]], None]

_listeners: list[Listener] = []


def on_first_step(listener: Listener) -> None:
    """Have ``listener`` called with an optimizer's tables before its first step."""
    if listener not in _listeners:
        _listeners.append(listener)


def announce_first_step(tables: Sequence[HashTable]) -> None:
    """Call the listeners.

    Args:
        tables: Of the optimizer that is about to step.
    """
    for listener in _listeners:
        listener(tables)
