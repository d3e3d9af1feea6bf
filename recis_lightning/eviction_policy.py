"""Base of eviction policies, and what they decide by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from recis_lightning.row_ranking import count_marked, lowest

KEPT_COLUMNS = ("last_seen", "counts", "last_time")  # those that training lookups write
COLUMNS = (*KEPT_COLUMNS, "ids", "norms")

_EMPTY = torch.empty(0, dtype=torch.int64, device="cpu")


def _sum_of_one_rank(tensor: Tensor) -> Tensor:
    return tensor


class RowColumns(NamedTuple):
    """Columns of a table's rows; a column is empty unless ``Eviction.columns`` names it.

    Free and pinned rows, and rows with a pending gradient, are included; ``evictable`` marks the
    others.

    Attributes:
        step: The table's step.
        last_seen: int64 [rows], the step of each row's last training lookup.
        counts: int64 [rows], occurrences of the id in training lookups since it got its row.
        last_time: float64 [rows], the time of the last training lookup, by the policy's clock.
        ids: int64 [rows].
        norms: float32 [rows], L2 norms of the weights.
        now: Time of the policy's clock; 0.0 unless ``Eviction.columns`` names "last_time".
        occupied: bool [rows], whether the row has an id.
        evictable: bool [rows], whether the row is occupied and may be evicted.
        sum_over_ranks: Function that sums an int64 tensor over the ranks that share the table.
    """

    step: int
    last_seen: Tensor = _EMPTY
    counts: Tensor = _EMPTY
    last_time: Tensor = _EMPTY
    ids: Tensor = _EMPTY
    norms: Tensor = _EMPTY
    now: float = 0.0
    occupied: Tensor = _EMPTY
    evictable: Tensor = _EMPTY
    sum_over_ranks: Callable[[Tensor], Tensor] = _sum_of_one_rank


class Eviction(ABC):
    """Policy that decides from columns of a table's rows which of them to evict.

    Attributes:
        columns: Names of the ``RowColumns`` that it needs: "last_seen", "counts", "last_time",
            "ids", "norms".
    """

    columns: ClassVar[frozenset[str]] = frozenset()

    @property
    def time_source(self) -> Callable[[], float] | None:
        """Clock in seconds for "last_time"; None means ``time.time``."""
        return None

    @property
    def max_jump(self) -> float | None:
        """Largest advance of the clock between two readings, in seconds; see ``TimeToLive``."""
        return None

    @property
    def halving_steps(self) -> int | None:
        """Steps of the table after which its "counts" are halved; see ``MaxRows``."""
        return None

    @property
    def lookup_limit(self) -> RowLimit | None:
        """Limit that training lookups keep; see ``MaxRows(when="lookup")``."""
        return None

    @abstractmethod
    def expired(self, rows: RowColumns) -> Tensor:
        """Return bool [rows], true where a row is to be evicted.

        The values of rows that are not evictable are ignored.
        """

    def name_rows(self, rows: RowColumns, tally: dict[str, int]) -> Tensor:
        """Return the evictable rows to evict, bool [rows], and add their number to ``tally``.

        Args:
            rows: Columns of the table's rows.
            tally: Policy's ``repr`` -> number of rows; policies of which this one is composed have
                entries of their own.

        Raises:
            ValueError: ``expired`` returned something else than bool [rows].
        """
        expired = self.expired(rows)
        if expired.dtype is not torch.bool or expired.shape != rows.evictable.shape:
            raise ValueError(
                f"{type(self).__name__}.expired: expected bool {list(rows.evictable.shape)}, "
                f"got {expired.dtype} {list(expired.shape)}"
            )
        expired = expired & rows.evictable
        tally[repr(self)] = tally.get(repr(self), 0) + count_marked(expired)
        return expired


class RowLimit(Eviction):
    """Policy that evicts down to a number of rows, those first that come first by its keys.

    Exact, over all ranks together. Rows that must not be evicted (pinned, or with a pending
    gradient) count among the rows that are kept.
    """

    @property
    @abstractmethod
    def max_rows(self) -> int:
        """Number of rows to keep."""

    @abstractmethod
    def keys(self, rows: RowColumns) -> list[Tensor]:
        """Return int64 [rows] each, by which rows are ranked; no two rows have the same last."""

    @override
    def expired(self, rows: RowColumns) -> Tensor:
        num_rows, num_evictable = self.count(rows)
        return self.first(rows, min(num_rows - self.max_rows, num_evictable))

    def count(self, rows: RowColumns) -> tuple[int, int]:
        """Return how many rows of all ranks are occupied, and how many of these evictable."""
        sizes = torch.tensor(
            [count_marked(rows.occupied), count_marked(rows.evictable)], device="cpu"
        )
        num_rows, num_evictable = rows.sum_over_ranks(sizes).tolist()
        return num_rows, num_evictable

    def first(self, rows: RowColumns, count: int) -> Tensor:
        """Mark the ``count`` evictable rows of all ranks that go first, bool [rows]."""
        return lowest(self.keys(rows), rows.evictable, count, rows.sum_over_ranks)


__all__ = ["COLUMNS", "KEPT_COLUMNS", "Eviction", "RowColumns", "RowLimit"]
