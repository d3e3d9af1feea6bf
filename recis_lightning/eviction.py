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
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from recis_lightning.arguments import check_bound, check_int, check_kinds, explain_arguments
from recis_lightning.eviction_policy import Eviction, RowColumns, RowLimit
from recis_lightning.row_limits import DistanceLFU, MaxRows


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
    A clock that goes back, as event times do that come out of order, stands still until it is ahead
    of its latest reading: what was seen later never counts as older.

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

    @property
    @override
    def halving_steps(self) -> int | None:
        return next((p.halving_steps for p in self.members if p.halving_steps is not None), None)

    @property
    @override
    def lookup_limit(self) -> RowLimit | None:
        return next((p.lookup_limit for p in self.members if p.lookup_limit is not None), None)

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
    if len({policy.halving_steps for policy in members} - {None}) > 1:
        raise ValueError(f"policies: expected one half_life in all of {list(members)}")
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
        TypeError, ValueError: ``policies`` is empty or holds something else, or more than one with
            ``when="lookup"``.
    """

    policies: Sequence[Eviction]

    def __post_init__(self) -> None:
        members = _check_policies(self.policies)
        limits = [policy for policy in members if policy.lookup_limit is not None]
        if len(limits) > 1:
            raise ValueError(f"policies: expected one with when='lookup' at most, got {limits}")
        object.__setattr__(self, "policies", members)

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
        TypeError, ValueError: ``policies`` is empty or holds something else, or one with
            ``when="lookup"``, which must not depend on others.
    """

    policies: Sequence[Eviction]

    def __post_init__(self) -> None:
        members = _check_policies(self.policies)
        for policy in members:
            if policy.lookup_limit is not None:
                raise ValueError(
                    f"policies: a lookup cannot ask others before it makes room; put "
                    f"{policy.lookup_limit!r} into an AnyOf, beside AllOf"
                )
        object.__setattr__(self, "policies", members)

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


__all__ = [
    "AllOf",
    "AnyOf",
    "DistanceLFU",
    "Eviction",
    "GlobalStepFilter",
    "MaxRows",
    "MinNorm",
    "RowColumns",
    "RowLimit",
    "TimeToLive",
]
