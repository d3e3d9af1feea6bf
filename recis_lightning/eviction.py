"""Which rows are thrown out when a table evicts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from recis_lightning.arguments import check_int


class RowColumns(NamedTuple):
    """What a policy may ask of a table; a column is empty unless ``Eviction.columns`` names it.

    Attributes:
        step: The table's step.
        last_seen: int64 [rows], the step of each row's last training lookup.
    """

    step: int
    last_seen: Tensor


@dataclass(frozen=True)
class Eviction(ABC):
    """A policy: given columns of a table's rows, says which of them go."""

    columns: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def expired(self, rows: RowColumns) -> Tensor:
        """Return bool [rows], true where a row is to be evicted; free rows may say anything."""


@dataclass(frozen=True)
class GlobalStepFilter(Eviction):
    """Evict what no training lookup has asked for lately.

    A training lookup stamps a row with the table's step; eviction removes rows with
    ``last_seen < step - filter_step``. With an eviction after every batch (RecIS's
    ``filter_interval=1``) an id goes after the ``filter_step``-th batch in a row that missed it.

    Args:
        filter_step: Steps a row may stay unseen, an int >= 1.

    Raises:
        TypeError: ``filter_step`` is no int.
        ValueError: ``filter_step`` is below 1.

    Source: RecIS, ``GlobalStepFilter``.
    """

    columns: ClassVar[frozenset[str]] = frozenset({"last_seen"})
    filter_step: int

    def __post_init__(self) -> None:
        check_int("filter_step", self.filter_step, least=1)

    def expired(self, rows: RowColumns) -> Tensor:
        """See ``Eviction``."""
        return rows.last_seen < rows.step - self.filter_step


__all__ = ["Eviction", "GlobalStepFilter", "RowColumns"]
