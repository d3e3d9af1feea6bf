"""Eviction policies: they decide which rows are removed when a table evicts.

A policy is a class with two parts: ``columns`` names the columns of rows that it needs, and
``expired(rows)`` returns a mask over the rows. Tables keep a column only if their policy needs it.

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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from recis_lightning.arguments import check_bound, check_int, check_kinds, explain_arguments

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


@explain_arguments()
@dataclass(frozen=True)
class GlobalStepFilter(Eviction):
    """Evict rows that no recent training lookup had.

    A training lookup sets a row's last-seen step to the table's step; eviction removes rows with
    ``last_seen < step - filter_step``. With an eviction after every batch (RecIS's
    ``filter_interval=1``) an id is evicted after ``filter_step`` batches in a row without it.

    Args:
        filter_step: Steps after which an unseen row is evicted, an int >= 1.

    Raises:
        TypeError: ``filter_step`` is no int.
        ValueError: ``filter_step`` is below 1.

    Source: RecIS, ``GlobalStepFilter``.
    """

    columns: ClassVar[frozenset[str]] = frozenset({"last_seen"})
    filter_step: int

    def __post_init__(self) -> None:
        check_int("filter_step", self.filter_step, least=1)

    @override
    def expired(self, rows: RowColumns) -> Tensor:
        return rows.last_seen < rows.step - self.filter_step


@explain_arguments()
@dataclass(frozen=True)
class TimeToLive(Eviction):
    """Evict rows that no training lookup had in the last ``seconds``.

    A training lookup writes the time into its rows, and eviction removes rows whose time is more
    than ``seconds`` ago. A saved table holds ages, not times: when a run is resumed, a row has the
    age that it had when it was saved.

    A table reads the clock in every training lookup and every eviction. If it jumps forward from
    one reading to the next, all rows would be too old at once: so ``max_jump`` bounds what counts,
    and a warning is logged once. Without it ``time.time`` is bounded by what ``time.monotonic``
    shows (a clock that is set, or a machine that slept, ages nothing), and other clocks are not.

    Args:
        seconds: Largest age of a row, a number > 0.
        clock: Function that returns the time in seconds.
        max_jump: Largest advance of the clock between two readings, in seconds, a number > 0.

    Raises:
        TypeError, ValueError: An argument is of a wrong type or out of range.
    """

    columns: ClassVar[frozenset[str]] = frozenset({"last_time"})
    seconds: float
    clock: Callable[[], float] = time.time
    max_jump: float | None = None

    def __post_init__(self) -> None:
        for name in ("seconds", "max_jump"):
            value = getattr(self, name)
            if name == "max_jump" and value is None:
                continue
            check_bound(name, value)
            if not value > 0:
                raise ValueError(f"{name}: expected a number > 0, got {value!r}")
        if not callable(self.clock):
            raise TypeError(f"clock: expected a function without arguments, got {self.clock!r}")

    def __repr__(self) -> str:
        bound = "" if self.max_jump is None else f", max_jump={self.max_jump!r}"
        return f"TimeToLive(seconds={self.seconds!r}{bound})"

    @property
    @override
    def time_source(self) -> Callable[[], float] | None:
        return self.clock

    @override
    def expired(self, rows: RowColumns) -> Tensor:
        return rows.now - rows.last_time > self.seconds


@explain_arguments()
@dataclass(frozen=True)
class MaxRows(Eviction):
    """Evict down to ``n`` rows: the least recently, or least frequently, used are evicted first.

    Exact, over all ranks together. ``by="last_seen"`` ranks rows by the step of their last training
    lookup, ``by="count"`` by the number of occurrences in training lookups, and then by that step;
    of rows that are still equal, those with the lower ids are evicted first. Rows that must not be
    evicted (pinned, or with a pending gradient) count among the ``n``.

    Args:
        n: Number of rows to keep, an int >= 0.
        by: "last_seen" or "count".

    Raises:
        TypeError, ValueError: An argument is of a wrong type or out of range.
    """

    n: int
    by: str = "last_seen"

    def __post_init__(self) -> None:
        check_int("n", self.n, least=0)
        if self.by not in ("last_seen", "count"):
            raise ValueError(f"by: expected 'last_seen' or 'count', got {self.by!r}")

    @property
    @override
    def columns(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"last_seen", "ids"} | ({"counts"} if self.by == "count" else set()))

    @override
    def expired(self, rows: RowColumns) -> Tensor:
        sizes = torch.tensor(
            [count_marked(rows.occupied), count_marked(rows.evictable)], device="cpu"
        )
        num_rows, num_evictable = rows.sum_over_ranks(sizes).tolist()
        keys = [rows.last_seen, rows.ids]
        if self.by == "count":
            keys.insert(0, rows.counts)
        num_expired = min(num_rows - self.n, num_evictable)
        return _lowest(keys, rows.evictable, num_expired, rows.sum_over_ranks)


@explain_arguments()
@dataclass(frozen=True)
class MinNorm(Eviction):
    """Evict rows whose weights have an L2 norm below ``threshold``.

    Optimizer state has no part in the norm. A row whose norm is NaN is kept.

    Args:
        threshold: A number >= 0.

    Raises:
        ValueError: ``threshold`` is negative.
    """

    columns: ClassVar[frozenset[str]] = frozenset({"norms"})
    threshold: float

    def __post_init__(self) -> None:
        check_bound("threshold", self.threshold)

    @override
    def expired(self, rows: RowColumns) -> Tensor:
        return rows.norms < self.threshold


class _Composition(Eviction):
    """Policy composed of others, without fields of its own."""

    @property
    @abstractmethod
    def members(self) -> Sequence[Eviction]:
        """Policies of which this one is composed."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.members)!r})"

    @property
    @override
    def columns(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset().union(*(policy.columns for policy in self.members))

    @property
    @override
    def time_source(self) -> Callable[[], float] | None:
        return next((p.time_source for p in self.members if p.time_source is not None), None)

    @property
    @override
    def max_jump(self) -> float | None:
        return min((p.max_jump for p in self.members if p.max_jump is not None), default=None)

    @override
    def expired(self, rows: RowColumns) -> Tensor:
        return self.name_rows(rows, {})


def _check_policies(policies: Sequence[Eviction]) -> tuple[Eviction, ...]:
    if isinstance(policies, (Eviction, str)) or not isinstance(policies, Iterable):
        raise TypeError(f"policies: expected a list of Eviction, got {policies!r}")
    members = tuple(policies)
    if not members:
        raise ValueError("policies: expected at least one policy, got none")
    for policy in members:
        if policy is None:
            raise TypeError("policies: expected Eviction, got None")
        check_kinds(policies=(policy, Eviction))
    if len({policy.time_source for policy in members} - {None}) > 1:
        raise ValueError(f"policies: expected one clock in all of {list(members)}")
    return members


@dataclass(frozen=True, repr=False)
class AnyOf(_Composition):
    """Evict rows that any of several policies evicts.

    Each policy gets the rows that those before it leave: a row is counted for the first policy that
    evicts it, and a ``MaxRows`` behind a ``TimeToLive`` evicts only the rows that are still too
    many.

    Args:
        policies: At least one, in the order in which they are applied; compositions are fine.

    Raises:
        TypeError, ValueError: ``policies`` is empty or holds something else.
    """

    policies: Sequence[Eviction]

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", _check_policies(self.policies))

    @property
    @override
    def members(self) -> Sequence[Eviction]:
        return self.policies

    @override
    def name_rows(self, rows: RowColumns, tally: dict[str, int]) -> Tensor:
        expired = torch.zeros_like(rows.evictable)
        for policy in self.policies:
            left = rows._replace(
                occupied=rows.occupied & ~expired, evictable=rows.evictable & ~expired
            )
            expired |= policy.name_rows(left, tally)
        return expired


@dataclass(frozen=True, repr=False)
class AllOf(_Composition):
    """Evict rows that every one of several policies evicts.

    Each policy gets all rows, and counts those that it evicts itself.

    Args:
        policies: At least one, in any order; compositions are fine.

    Raises:
        TypeError, ValueError: ``policies`` is empty or holds something else.
    """

    policies: Sequence[Eviction]

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", _check_policies(self.policies))

    @override
    def name_rows(self, rows: RowColumns, tally: dict[str, int]) -> Tensor:
        expired = rows.evictable.clone()
        for policy in self.policies:
            expired &= policy.name_rows(rows, tally)
        return expired

    @property
    @override
    def members(self) -> Sequence[Eviction]:
        return self.policies


def count_marked(mask: Tensor) -> int:
    """Return the number of true items of a bool tensor; NumPy is many times as fast as ``sum``."""
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

    A radix selection: ranks sum the number of candidates with each value of a digit, from the
    highest digit on, and keep as candidates those with the value at which ``count`` is reached. No
    rank sees the rows of another.

    Args:
        keys: int64 [rows] each; the last one is different for any two rows of all ranks.
        candidates: bool [rows].
        count: Number of rows to mark, at most that of candidates.
        sum_over_ranks: As in ``RowColumns``.

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
