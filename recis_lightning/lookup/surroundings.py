"""Surroundings of a sharded lookup: the loop that runs it, if it is not written by hand.

The core knows no Trainer. It asks the one object that is registered here, which
``recis_lightning.trainer_bridge`` provides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from recis_lightning.table.hash_table import HashTable


class Runner(Protocol):
    """Loop that runs the lookups of some tables."""

    def join_evaluation(self) -> None:
        """Keep ranks that finish an evaluation early serving the lookups of the others."""


class Surroundings(Protocol):
    """Finds the loop that runs the lookups of tables."""

    def runner_of(self, tables: Sequence[HashTable]) -> Runner:
        """Return the loop that runs the lookups of ``tables``; asked once for each group.

        Raises:
            RuntimeError: It cannot train sharded tables.
        """


class NoRunner:
    """Loop written by hand, of which nothing can be asked."""

    def join_evaluation(self) -> None:
        """Do nothing: such a loop calls ``finish_evaluation`` itself."""


_registered: Surroundings | None = None


def register(surroundings: Surroundings | None) -> None:
    """Ask ``surroundings`` from now on; None asks nobody."""
    global _registered
    _registered = surroundings


def runner_of(tables: Sequence[HashTable]) -> Runner:
    """Return the loop that runs the lookups of ``tables``, as the registered object says."""
    return NoRunner() if _registered is None else _registered.runner_of(tables)


__all__ = ["NoRunner", "Runner", "Surroundings", "register", "runner_of"]
