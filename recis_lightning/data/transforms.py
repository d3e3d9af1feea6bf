"""Transforms of a batch's entries: the same values at training and at serving.

Each reads entries (tensors, or the values of bags) and writes new ones. Transforms of one kind are
independent of each other, so ``Features`` runs those that do not wait for one another together.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from recis_lightning.arguments import check_int
from recis_lightning.data.checks import check_names, check_number, check_numbers, check_values
from recis_lightning.data.entries import Entry, cut, ids_of, in_groups, joined, split, spread
from recis_lightning.jagged import Jagged

__all__ = [
    "Bucketize",
    "Clip",
    "Log1p",
    "Lookup",
    "Mask",
    "Mod",
    "MultiHash",
    "Transform",
    "Truncate",
]

_MULTIPLIERS, _PRIME_RANGES = (1, 3, 5, 7), (29, 47, 67, 83)  # RecIS's


class Transform(ABC):
    """New entries of a batch, as a function of others, row by row."""

    name: str

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """Entries that it reads."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[str, ...]:
        """Entries that it writes."""

    @abstractmethod
    def run(self, others: Sequence[Any], entries: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
        """Compute the outputs of several transforms of this kind at once.

        Args:
            others: Transforms of this class, itself among them.
            entries: Inputs of each.

        Returns:
            Outputs of each.

        Raises:
            TypeError, ValueError: Values do not fit; the caller adds the name of the transform.
        """


class OneToOne(Transform):
    """Transform of one entry into another."""

    source: str | None

    @property
    @override
    def inputs(self) -> tuple[str, ...]:
        return (self.source or self.name,)

    @property
    @override
    def outputs(self) -> tuple[str, ...]:
        return (self.name,)


@dataclass(frozen=True)
class Bucketize(OneToOne):
    """Number of boundaries that a number has reached: int64.

    A value equal to a boundary has reached it; NaN has reached all. Values and boundaries are
    compared in the dtype of the values, integers in float64. RecIS's ``Bucketize``.

    Args:
        name: Entry that it writes.
        boundaries: Ascending, at least one.
        source: Entry that it reads; None means ``name``.

    Example:
        >>> from recis_lightning.data import Bucketize, Features, Number
        >>> Features([Number("age")], [Bucketize("age", [18, 25])])({"age": [17, 18, 40]})
        {'age': tensor([0, 1, 2])}
    """

    name: str
    boundaries: list[float]
    source: str | None = None

    def __post_init__(self) -> None:
        check_names(self.name, ("source", self.source))
        check_numbers("boundaries", self.boundaries)
        given = list(self.boundaries)
        if not given or given[0] != given[0] or any(not a < b for a, b in pairwise(given)):
            raise ValueError(f"boundaries: expected at least one, ascending, got {given}")

    @override
    def run(self, others: Sequence[Any], entries: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
        return in_groups(others, entries, "boundaries", self._bucket)

    @staticmethod
    def _bucket(values: Tensor, boundaries: Any) -> Tensor:
        values = values if values.is_floating_point() else values.double()
        limits = torch.tensor(boundaries, dtype=values.dtype, device=values.device)
        return torch.bucketize(values.contiguous(), limits, right=True)


@dataclass(frozen=True)
class Mod(OneToOne):
    """Remainder of an id, read as unsigned 64-bit number: int64 in [0, modulus).

    RecIS's ``Mod``.

    Args:
        name: Entry that it writes.
        modulus: At least 1.
        source: Entry that it reads; None means ``name``.

    Example:
        >>> from recis_lightning.data import Features, Id, Mod
        >>> Features([Id("user")], [Mod("user", 10)])({"user": [23, -1]})  # 2**64 - 1
        {'user': tensor([3, 5])}
    """

    name: str
    modulus: int
    source: str | None = None

    def __post_init__(self) -> None:
        check_names(self.name, ("source", self.source))
        check_int("modulus", self.modulus, least=1, most=2**63 - 1)

    @override
    def run(self, others: Sequence[Any], entries: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
        values = joined(entries, ids_of)
        modulus = spread([one.modulus for one in others], entries, values)
        top = spread([2**63 % one.modulus for one in others], entries, values)
        low = (values & (2**63 - 1)) % modulus
        # low + top, less modulus if it reaches that: the sum itself may not fit.
        high = low - (modulus - top)
        found = torch.where(values >= 0, low, torch.where(high >= 0, high, low + top))
        return split(found, entries)


@dataclass(frozen=True)
class Clip(OneToOne):
    """Numbers, at least ``low`` and at most ``high``; NaN stays, and integers stay integers.

    Args:
        name: Entry that it writes.
        low: None for no limit.
        high: None for no limit.
        source: Entry that it reads; None means ``name``.

    Example:
        >>> from recis_lightning.data import Clip, Features, Number
        >>> Features([Number("age")], [Clip("age", 0, 99)])({"age": [-1.0, 7.0, 120.0]})
        {'age': tensor([ 0.,  7., 99.])}
    """

    name: str
    low: float | None = None
    high: float | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        check_names(self.name, ("source", self.source))
        check_number("low", self.low)
        check_number("high", self.high)
        for limit in ("low", "high"):
            value = getattr(self, limit)
            if value is not None and value != value:  # would make NaN of all numbers
                raise ValueError(f"{limit}: expected a number or None, got {value}")
        if self.low is None and self.high is None:
            raise ValueError("low, high: expected at least one number, got None and None")
        if self.low is not None and self.high is not None and not self.low <= self.high:
            raise ValueError(f"low: expected at most high={self.high}, got {self.low}")

    @override
    def run(self, others: Sequence[Any], entries: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
        limits = [(one.low, one.high) for one in others]
        return in_groups(others, entries, limits, _clipped)


@dataclass(frozen=True)
class Log1p(OneToOne):
    """``sign(x) log(1 + |x|)`` of numbers, in their dtype; of integers in float32.

    Args:
        name: Entry that it writes.
        source: Entry that it reads; None means ``name``.

    Example:
        >>> from recis_lightning.data import Features, Log1p, Number
        >>> Features([Number("n")], [Log1p("n")])({"n": [0.0, 3.0, -3.0]})
        {'n': tensor([ 0.0000,  1.3863, -1.3863])}
    """

    name: str
    source: str | None = None

    def __post_init__(self) -> None:
        check_names(self.name, ("source", self.source))

    @override
    def run(self, others: Sequence[Any], entries: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
        return in_groups(others, entries, [None] * len(others), lambda x, _: _log(x))


@dataclass(frozen=True)
class MultiHash(Transform):
    """Remainders of an id by several hashes, entries ``name_0``, ``name_1``, ...: int64.

    Hash i is ``(id * m mod p) mod num_buckets[i]`` with m = 1, 3, 5, 7 and p the largest prime up
    to 29, 47, 67, 83 times ``num_buckets[i]``: RecIS's ``IDMultiHash``.

    Args:
        name: Prefix of the entries that it writes.
        num_buckets: One to four sizes, at least 1.
        source: Entry that it reads; None means ``name``.

    Example:
        >>> from recis_lightning.data import Features, Id, MultiHash
        >>> features = Features([Id("user")], [MultiHash("h", [1000, 10], source="user")])
        >>> list(features({"user": [5, 30000]}).values())[1:]
        [tensor([ 5, 21]), tensor([5, 6])]
    """

    name: str
    num_buckets: list[int]
    source: str | None = None

    def __post_init__(self) -> None:
        check_names(self.name, ("source", self.source))
        if not hasattr(self.num_buckets, "__len__"):
            raise TypeError(f"num_buckets: expected a list of sizes, got {self.num_buckets!r}")
        if not 1 <= len(self.num_buckets) <= len(_MULTIPLIERS):
            raise ValueError(f"num_buckets: expected one to four sizes, got {self.num_buckets}")
        for size in self.num_buckets:
            check_int("num_buckets", size, least=1, most=2**40)

    @property
    @override
    def inputs(self) -> tuple[str, ...]:
        return (self.source or self.name,)

    @property
    @override
    def outputs(self) -> tuple[str, ...]:
        return tuple(f"{self.name}_{i}" for i in range(len(self.num_buckets)))

    @override
    def run(self, others: Sequence[Any], entries: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
        found: list[list[Entry]] = [[] for _ in others]
        for i, (multiplier, extent) in enumerate(zip(_MULTIPLIERS, _PRIME_RANGES, strict=True)):
            having = [k for k, one in enumerate(others) if i < len(one.num_buckets)]
            if not having:
                break
            given = [entries[k] for k in having]
            sizes = [others[k].num_buckets[i] for k in having]
            values = joined(given, ids_of)
            primes = spread([_prime_up_to(extent * size) for size in sizes], given, values)
            buckets = spread(sizes, given, values)
            parts = split(values * multiplier % primes % buckets, given)
            for k, part in zip(having, parts, strict=True):
                found[k] += part
        return found


@dataclass(frozen=True)
class Lookup(OneToOne):
    """Place of a value in a small vocabulary: int64.

    Args:
        name: Entry that it writes.
        vocabulary: Values as files have them, each once: where ``source`` is a column with a hash,
            strings (or integers) before the hash; else integers.
        default: Place of any other value.
        source: Entry of ids that it reads; None means ``name``.

    Example:
        >>> from recis_lightning.data import Features, Id, Lookup
        >>> city = Id("city", hash="xxh64")
        >>> Features([city], [Lookup("city", ["Berlin", "Rome"])])({"city": ["Rome", "Oslo"]})
        {'city': tensor([ 1, -1])}
    """

    name: str
    vocabulary: list[str] | list[int]
    default: int = -1
    source: str | None = None

    def __post_init__(self) -> None:
        check_names(self.name, ("source", self.source))
        check_values("vocabulary", self.vocabulary)
        if not self.vocabulary or len(set(self.vocabulary)) < len(self.vocabulary):
            raise ValueError("vocabulary: expected at least one value, each once")
        if any(not isinstance(value, str | Integral) for value in self.vocabulary):
            raise TypeError(f"vocabulary: expected strings or ints, got {self.vocabulary!r:.100}")
        check_int("default", self.default, least=-(2**63), most=2**63 - 1)

    @override
    def run(self, others: Sequence[Any], entries: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
        parts = [(tuple(one.vocabulary), one.default) for one in others]
        return in_groups(others, entries, parts, self._places, ids_of)

    @staticmethod
    def _places(values: Tensor, part: Any) -> Tensor:
        vocabulary, default = part
        known, places = torch.tensor(vocabulary, device=values.device).sort()
        at = torch.searchsorted(known, values.contiguous()).clamp(max=len(known) - 1)
        return torch.where(known[at] == values, places[at], default)


@dataclass(frozen=True)
class Mask(OneToOne):
    """0 for the values of a list, 1 for all others: float32. RecIS's ``Mask``.

    Args:
        name: Entry that it writes.
        values: Values as files have them, as in ``Lookup``; or numbers, where the source has some.
        source: Entry that it reads; None means ``name``.

    Example:
        >>> from recis_lightning.data import Features, Id, Mask
        >>> Features([Id("user")], [Mask("known", [0], source="user")])({"user": [0, 7]})
        {'user': tensor([0, 7]), 'known': tensor([0., 1.])}
    """

    name: str
    values: list[str] | list[int] | list[float]
    source: str | None = None

    def __post_init__(self) -> None:
        check_names(self.name, ("source", self.source))
        check_values("values", self.values)

    @override
    def run(self, others: Sequence[Any], entries: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
        return in_groups(others, entries, "values", self._others)

    @staticmethod
    def _others(values: Tensor, masked: Any) -> Tensor:
        if not values.is_floating_point():
            values = values.long()
            limit = 2**63  # what is beyond, or has a fraction, is no id
            masked = [m for m in masked if float(m).is_integer() and -limit <= m < limit]
        listed = torch.tensor(masked, dtype=values.dtype, device=values.device)
        return (~torch.isin(values, listed)).float()


@dataclass(frozen=True)
class Truncate(OneToOne):
    """Bags of at most ``max_len`` values: RecIS's ``SequenceTruncate``, which drops on a side.

    Args:
        name: Entry that it writes.
        max_len: At least 1.
        keep: Which values of a longer bag are kept, ``"first"`` or ``"last"``.
        source: Entry of bags that it reads; None means ``name``.

    Example:
        >>> from recis_lightning.data import Features, IdList, Truncate
        >>> features = Features([IdList("history")], [Truncate("history", 2, keep="last")])
        >>> features({"history": [[1, 2, 3], [4]]})["history"][:2]
        (tensor([2, 3, 4]), tensor([0, 2, 3]))
    """

    name: str
    max_len: int
    keep: str = "first"
    source: str | None = None

    def __post_init__(self) -> None:
        check_names(self.name, ("source", self.source))
        check_int("max_len", self.max_len, least=1)
        if self.keep not in ("first", "last"):
            raise ValueError(f"keep: expected 'first' or 'last', got {self.keep!r}")

    @override
    def run(self, others: Sequence[Any], entries: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
        found: list[list[Entry]] = []
        for one, (entry,) in zip(others, entries, strict=True):
            if not isinstance(entry, Jagged):
                got = "one value a row" if isinstance(entry, Tensor) else "lists of bags"
                raise TypeError(f"expected bags, got {got}")
            found.append([cut(entry, one.max_len, one.keep)])
        return found


def _clipped(values: Tensor, limits: Any) -> Tensor:
    """Limit numbers; integers by integers, or torch would make them float32.

    Raises:
        ValueError: A limit of integers has a fraction.
    """
    if values.is_floating_point():
        return values.clamp(*limits)
    extent = torch.iinfo(values.dtype)
    whole = [limit if limit is None else _within(limit, extent) for limit in limits]
    return values.clamp(*whole)


def _within(limit: float, extent: torch.iinfo) -> int:
    if math.isinf(limit):
        return extent.max if limit > 0 else extent.min
    if limit != math.floor(limit):
        raise ValueError(f"expected whole limits of integers, got {limit}")
    return min(max(int(limit), extent.min), extent.max)


def _log(values: Tensor) -> Tensor:
    values = values if values.is_floating_point() else values.float()
    return values.abs().log1p().copysign(values)


@functools.cache
def _prime_up_to(limit: int) -> int:
    """Return the largest prime up to a number of at least 2."""
    for candidate in range(limit, 1, -1):
        if all(candidate % n for n in range(2, math.isqrt(candidate) + 1)):
            return candidate
    raise ValueError(f"limit: expected at least 2, got {limit}")
