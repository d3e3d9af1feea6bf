"""Moment at which gradients of sharded rows go to the ranks that own them.

Backward passes leave gradients on the rank that ran them, for another rank may have run others.
They travel where all ranks are level: before a step, a norm, an eviction. Who sends them is
registered here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class GradientExchange(Protocol):
    """Sends gradients to the ranks that own their rows."""

    def __call__(
        self, tables: Sequence[Any], purpose: Callable[[], str], is_due: bool
    ) -> list[bool] | None:
        """Send all gradients that have not travelled; a collective operation.

        Args:
            tables: Tables that are to have theirs, of one process group.
            purpose: Returns what the rank does next, the same on all: "steps SparseSGD".
            is_due: Whether to ask the other ranks though no lookup of ``tables`` may have left any.

        Returns:
            For each of ``tables``, whether any rank has a gradient for it; None if the ranks were
            not asked.

        Raises:
            RuntimeError: Another rank does something else; says which rank does what.
        """


_exchange: GradientExchange | None = None


def set_gradient_exchange(exchange: GradientExchange) -> None:
    """Register who sends gradients."""
    global _exchange
    _exchange = exchange


def exchange_gradients(
    tables: Sequence[Any], purpose: Callable[[], str], is_due: bool
) -> list[bool] | None:
    """Have gradients of sharded rows sent to their owners; as ``GradientExchange``."""
    return None if _exchange is None else _exchange(tables, purpose, is_due)


__all__ = ["GradientExchange", "exchange_gradients", "set_gradient_exchange"]
