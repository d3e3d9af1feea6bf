"""Which rows are thrown out when a table evicts.

A policy is a class with two parts: ``columns`` names what it wants to know of each row, and
``expired(rows)`` returns a mask over the rows. Tables keep a column only where a policy asks.

Example:
    >>> import torch
    >>> from recis_lightning import HashTable
    >>> class OddIds(Eviction):
    ...     columns = frozenset({"ids"})
    ...
    ...     def expired(self, rows):
    ...         return rows.ids % 2 == 1
    >>> table = HashTable(2, eviction=OddIds())
    >>> table.insert(torch.arange(5), torch.ones(5, 2))
    >>> table.pin(torch.tensor([3]))
    >>> int(table.evict()), table.ids().tolist()
    (1, [0, 2, 3, 4])
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recis_lightning.arguments import check_bound, check_int

KEPT_COLUMNS = ("last_seen", "counts", "last_time")  # those that training lookups write
COLUMNS = (*KEPT_COLUMNS, "ids", "norms")

_EMPTY = torch.empty(0, dtype=torch.int64)


def _alone(tensor: Tensor) -> Tensor:
    return tensor


class RowColumns(NamedTuple):
    """What a policy may ask of a table; a column is empty unless ``Eviction.columns`` names it.

    Rows that are free, pinned or waiting for the optimizer are among them: ``evictable`` tells.

    Attributes:
        step: The table's step.
        last_seen: int64 [rows], the step of each row's last training lookup.
        counts: int64 [rows], occurrences of the id in training lookups since it got its row.
        last_time: float64 [rows], when the last training lookup was, by the policy's clock.
        ids: int64 [rows].
        norms: float32 [rows], L2 norms of the weights.
        now: What the policy's clock says; 0.0 unless "last_time" is asked for.
        occupied: bool [rows], whether an id has the row.
        evictable: bool [rows], whether it is occupied and may go.
        sum_over_ranks: Adds up an int64 tensor over the ranks that share the table.
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
    sum_over_ranks: Callable[[Tensor], Tensor] = _alone


class Eviction(ABC):
    """A policy: given columns of a table's rows, says which of them go.

    Attributes:
        columns: Names of ``RowColumns`` that it wants: "last_seen", "counts", "last_time", "ids",
            "norms".
    """

    columns: ClassVar[frozenset[str]] = frozenset()

    @property
    def time_source(self) -> Callable[[], float] | None:
        """What tells the time in seconds for "last_time"; None means ``time.time``."""
        return None

    @abstractmethod
    def expired(self, rows: RowColumns) -> Tensor:
        """Return bool [rows], true where a row is to be evicted.

        What it says of rows that are not evictable does not matter.
        """

    def name_rows(self, rows: RowColumns, tally: dict[str, int]) -> Tensor:
        """Return which evictable rows go, bool [rows], and add to ``tally`` how many that is."""
        named = self.expired(rows)
        if named.dtype is not torch.bool or named.shape != rows.evictable.shape:
            raise ValueError(
                f"{type(self).__name__}.expired: expected bool {list(rows.evictable.shape)}, "
                f"got {named.dtype} {list(named.shape)}"
            )
        named = named & rows.evictable
        tally[repr(self)] = tally.get(repr(self), 0) + count_marked(named)
        return named


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


@dataclass(frozen=True)
class TimeToLive(Eviction):
    """Evict what no training lookup has asked for in the last ``seconds``.

    A training lookup stamps a row with the time, and eviction removes rows whose stamp is older
    than ``seconds``. A saved table holds ages, not times: a row has the same age when a run is
    resumed as when it was saved, however long that took.

    Args:
        seconds: Age that a row may reach, a number > 0.
        clock: Tells the time in seconds.

    Raises:
        ValueError: ``seconds`` is not above 0.
    """

    columns: ClassVar[frozenset[str]] = frozenset({"last_time"})
    seconds: float
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        check_bound("seconds", self.seconds)
        if not self.seconds > 0:
            raise ValueError(f"seconds: expected a number > 0, got {self.seconds!r}")

    def __repr__(self) -> str:
        return f"TimeToLive(seconds={self.seconds!r})"

    @property
    def time_source(self) -> Callable[[], float] | None:
        """See ``Eviction``."""
        return self.clock

    def expired(self, rows: RowColumns) -> Tensor:
        """See ``Eviction``."""
        return rows.now - rows.last_time > self.seconds


@dataclass(frozen=True)
class MaxRows(Eviction):
    """Evict down to ``n`` rows: the least recently, or least frequently, used go first.

    Exact, over all ranks together. ``by="last_seen"`` ranks rows by the step of their last training
    lookup, ``by="count"`` by the number of occurrences in training lookups, and then by that step;
    of rows that are still alike, those with the lower ids go first. Rows that may not go (pinned,
    or waiting for the optimizer) count among the ``n``.

    Args:
        n: Rows that may stay, an int >= 0.
        by: "last_seen" or "count".

    Raises:
        TypeError, ValueError: An argument is not what it should be.
    """

    n: int
    by: str = "last_seen"

    def __post_init__(self) -> None:
        check_int("n", self.n, least=0)
        if self.by not in ("last_seen", "count"):
            raise ValueError(f"by: expected 'last_seen' or 'count', got {self.by!r}")

    @property
    def columns(self) -> frozenset[str]:  # type: ignore[override]
        """See ``Eviction``."""
        return frozenset({"last_seen", "ids"} | ({"counts"} if self.by == "count" else set()))

    def expired(self, rows: RowColumns) -> Tensor:
        """See ``Eviction``."""
        sizes = torch.tensor([count_marked(rows.occupied), count_marked(rows.evictable)])
        num_rows, num_evictable = rows.sum_over_ranks(sizes).tolist()
        keys = [rows.last_seen, rows.ids]
        if self.by == "count":
            keys.insert(0, rows.counts)
        num_gone = min(num_rows - self.n, num_evictable)
        return _lowest(keys, rows.evictable, num_gone, rows.sum_over_ranks)


@dataclass(frozen=True)
class MinNorm(Eviction):
    """Evict rows whose weights have an L2 norm below ``threshold``.

    Optimizer state has no part in the norm. A row whose norm is NaN stays.

    Args:
        threshold: A number >= 0.

    Raises:
        ValueError: ``threshold`` is negative.
    """

    columns: ClassVar[frozenset[str]] = frozenset({"norms"})
    threshold: float

    def __post_init__(self) -> None:
        check_bound("threshold", self.threshold)

    def expired(self, rows: RowColumns) -> Tensor:
        """See ``Eviction``."""
        return rows.norms < self.threshold


@dataclass(frozen=True)
class _Composed(Eviction):
    policies: Sequence[Eviction]

    def __post_init__(self) -> None:
        members = tuple(self.policies)
        if not members:
            raise ValueError("policies: expected at least one policy, got none")
        for policy in members:
            if not isinstance(policy, Eviction):
                raise TypeError(f"policies: expected Eviction, got {policy!r}")
        object.__setattr__(self, "policies", members)
        if len({policy.time_source for policy in members} - {None}) > 1:
            raise ValueError(f"policies: expected one clock in all of {list(members)}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.policies)!r})"

    @property
    def columns(self) -> frozenset[str]:  # type: ignore[override]
        """See ``Eviction``."""
        return frozenset().union(*(policy.columns for policy in self.policies))

    @property
    def time_source(self) -> Callable[[], float] | None:
        """See ``Eviction``."""
        return next((p.time_source for p in self.policies if p.time_source is not None), None)

    def expired(self, rows: RowColumns) -> Tensor:
        """See ``Eviction``."""
        return self.name_rows(rows, {})


@dataclass(frozen=True, repr=False)
class AnyOf(_Composed):
    """Evict what any of several policies evicts.

    They are asked one after the other, each of what those before it leave: a row is counted for the
    first policy that names it, and a ``MaxRows`` behind a ``TimeToLive`` evicts no more than what
    is still too many.

    Args:
        policies: At least one; others of this kind among them are fine.

    Raises:
        TypeError, ValueError: ``policies`` is empty or holds something else.
    """

    def name_rows(self, rows: RowColumns, tally: dict[str, int]) -> Tensor:
        """See ``Eviction``."""
        gone = torch.zeros_like(rows.evictable)
        for policy in self.policies:
            left = rows._replace(occupied=rows.occupied & ~gone, evictable=rows.evictable & ~gone)
            gone |= policy.name_rows(left, tally)
        return gone


@dataclass(frozen=True, repr=False)
class AllOf(_Composed):
    """Evict what every one of several policies evicts.

    Each is asked of all rows, and counts those that it names itself.

    Args:
        policies: At least one; others of this kind among them are fine.

    Raises:
        TypeError, ValueError: ``policies`` is empty or holds something else.
    """

    def name_rows(self, rows: RowColumns, tally: dict[str, int]) -> Tensor:
        """See ``Eviction``."""
        gone = rows.evictable.clone()
        for policy in self.policies:
            gone &= policy.name_rows(rows, tally)
        return gone


def count_marked(mask: Tensor) -> int:
    """Return how many items of a bool tensor are true; NumPy is many times as fast as ``sum``."""
    if mask.device.type == "cpu":
        return int(np.count_nonzero(mask.numpy()))
    return int(torch.count_nonzero(mask))


_DIGIT_BITS = 16


def _lowest(
    keys: Sequence[Tensor],
    candidates: Tensor,
    count: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> Tensor:
    """Mark the ``count`` rows that come first by ``keys``, over all ranks.

    A radix selection: ranks add up how many candidates have each value of a digit, the highest one
    first, and keep as candidates those with the value at which ``count`` is reached. No rank sees
    another one's rows.

    Args:
        keys: int64 [rows] each; the last one tells any two rows of all ranks apart.
        candidates: bool [rows].
        count: How many to mark, at most as many as there are candidates.
        sum_over_ranks: See ``RowColumns``.

    Returns:
        bool [rows].
    """
    marked = torch.zeros_like(candidates)
    if count <= 0:
        return marked
    left = candidates.nonzero().squeeze(1)
    for key in keys:
        for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
            digits = (key[left] >> shift) & ((1 << _DIGIT_BITS) - 1)
            if shift == 64 - _DIGIT_BITS:  # the sign bit: negative numbers come first
                digits ^= 1 << (_DIGIT_BITS - 1)
            reached = sum_over_ranks(torch.bincount(digits, minlength=1 << _DIGIT_BITS)).cumsum(0)
            at = int(torch.searchsorted(reached, count))
            marked[left[digits < at]] = True
            count -= int(reached[at - 1]) if at else 0
            left = left[digits == at]
            if count == int(reached[at]) - (int(reached[at - 1]) if at else 0):
                marked[left] = True
                return marked
    return marked


__all__ = [
    "AllOf",
    "AnyOf",
    "Eviction",
    "GlobalStepFilter",
    "MaxRows",
    "MinNorm",
    "RowColumns",
    "TimeToLive",
]
