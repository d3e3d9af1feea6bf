"""Columns of a data set: which file columns become which tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pyarrow as pa
import torch
from torch import Tensor
from typing_extensions import override

from recis_lightning.arguments import check_int
from recis_lightning.data.checks import check_id, check_names, check_number
from recis_lightning.data.conversion import (
    bags_of,
    fill_nulls,
    float_of,
    int64_of,
    is_list,
    one_of_list,
)
from recis_lightning.data.entries import cut
from recis_lightning.data.hashing import check_hash
from recis_lightning.jagged import Jagged
from recis_lightning.nested_jagged import NestedJagged

__all__ = ["Column", "Id", "IdBags", "IdList", "Label", "Number"]

_BAGS = "the bags of ids"  # entry that no column of weights is called
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Column(ABC):
    """Entry of a batch, and how it is read from a file's columns."""

    name: str

    @property
    @abstractmethod
    def sources(self) -> tuple[str, ...]:
        """Columns of a file that it reads."""

    @abstractmethod
    def read(self, arrays: Mapping[str, pa.Array]) -> Tensor | Jagged | NestedJagged:
        """Convert its columns.

        Args:
            arrays: Column of a file -> its values.

        Returns:
            [n] or n bags.

        Raises:
            TypeError, ValueError: The values are of another kind, or null without a default; the
                caller adds the names of the file and of the column.
        """


@dataclass(frozen=True)
class Id(Column):
    """One id a row: int64 [B].

    Integers, bools, whole decimals, times and dates are ids as they are; strings and bytes need a
    ``hash``. A list of one value counts as the value, an empty one as null.

    Args:
        name: Entry of the batch.
        hash: Hash of the values, as ``hash_strings`` takes it; None takes the values themselves.
        seed: Of the hash.
        default: Id of a null; None refuses nulls.
        source: Column of the file; None means ``name``.

    Example:
        >>> column = Id("city", hash="xxh64", seed=3, default=0)
        >>> column.read({"city": pa.array(["Berlin", None])})
        tensor([1601191450551721879,                   0])
    """

    name: str
    hash: str | None = None
    seed: int = 0
    default: int | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        check_names(self.name, ("source", self.source))
        check_id("default", self.default)
        check_hash(self.hash, self.seed)

    @property
    @override
    def sources(self) -> tuple[str, ...]:
        return (self.source or self.name,)

    @override
    def read(self, arrays: Mapping[str, pa.Array]) -> Tensor:
        array = one_of_list(arrays[self.sources[0]])
        return fill_nulls(int64_of(array, self.hash, self.seed), array, self.default)


@dataclass(frozen=True)
class IdList(Column):
    """A bag of ids a row: ``Jagged`` of int64.

    A null list is an empty bag, and so is a null where the file's column holds single values.

    Args:
        name: Entry of the batch.
        hash: Hash of the values, as ``hash_strings`` takes it; None takes the values themselves.
        seed: Of the hash.
        default: Id of a null within a list; None refuses it.
        max_len: Longest bag; None keeps all values.
        keep: Which values of a longer list are kept, ``"first"`` or ``"last"``.
        weights: Column of the file with a weight for each value, lists of the same lengths.
        source: Column of the file; None means ``name``.

    Example:
        >>> column = IdList("history", max_len=2, keep="last")
        >>> column.read({"history": pa.array([[1, 2, 3], None, [4]])})[:2]
        (tensor([2, 3, 4]), tensor([0, 2, 2, 3]))
    """

    name: str
    hash: str | None = None
    seed: int = 0
    default: int | None = None
    max_len: int | None = None
    keep: str = "first"
    weights: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        check_names(self.name, ("source", self.source), ("weights", self.weights))
        check_id("default", self.default)
        check_hash(self.hash, self.seed)
        if self.max_len is not None:
            check_int("max_len", self.max_len, least=1, alternative=" or None")
        if self.keep not in ("first", "last"):
            raise ValueError(f"keep: expected 'first' or 'last', got {self.keep!r}")

    @property
    @override
    def sources(self) -> tuple[str, ...]:
        own = (self.source or self.name,)
        return own if self.weights is None else (*own, self.weights)

    @override
    def read(self, arrays: Mapping[str, pa.Array]) -> Jagged:
        values, lengths = bags_of(arrays[self.sources[0]])
        if is_list(values.type):
            raise TypeError("expected lists of ids, got lists of lists")
        ids = fill_nulls(int64_of(values, self.hash, self.seed), values, self.default)
        weights = None
        if self.weights is not None:
            given, weight_lengths = bags_of(arrays[self.weights])
            if not torch.equal(lengths, weight_lengths):
                row = int((lengths != weight_lengths).nonzero()[0])
                raise ValueError(
                    f"row {row} has {int(lengths[row])} values and {int(weight_lengths[row])} "
                    f"weights in {self.weights!r}"
                )
            weights = _weights_of(given, self.weights)
        bags = Jagged.from_lengths(ids, lengths, weights)
        return bags if self.max_len is None else cut(bags, self.max_len, self.keep)


@dataclass(frozen=True)
class IdBags(Column):
    """A sequence of bags of ids a row, of lists of lists: ``NestedJagged`` of int64.

    A null list is an empty sequence, a null within it an empty bag.

    Args:
        name: Entry of the batch.
        hash: Hash of the values, as ``hash_strings`` takes it; None takes the values themselves.
        seed: Of the hash.
        default: Id of a null within a bag; None refuses it.
        max_len: Most bags of a row; None keeps all.
        keep: Which bags of a longer row are kept, ``"first"`` or ``"last"``.
        weights: Column of the file with a weight for each value, in lists of the same lengths.
        source: Column of the file; None means ``name``.

    Example:
        >>> column = IdBags("baskets")
        >>> column.read({"baskets": pa.array([[[1, 2], []], None, [[3]]])})[:3]
        (tensor([1, 2, 3]), tensor([0, 2, 2, 3]), tensor([0, 2, 2, 3]))
    """

    name: str
    hash: str | None = None
    seed: int = 0
    default: int | None = None
    max_len: int | None = None
    keep: str = "first"
    weights: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        # The rules for the bags of a row are those for the ids of one.
        IdList(self.name, self.hash, self.seed, self.default, self.max_len, self.keep)

    @property
    @override
    def sources(self) -> tuple[str, ...]:
        own = (self.source or self.name,)
        return own if self.weights is None else (*own, self.weights)

    @override
    def read(self, arrays: Mapping[str, pa.Array]) -> NestedJagged:
        bags, lengths = _lists_of(arrays[self.sources[0]], "lists of lists of ids")
        inner = IdList(_BAGS, self.hash, self.seed, self.default)
        given = {_BAGS: bags}
        if self.weights is not None:
            wanted = f"lists of weights in {self.weights!r}"
            weight_lists, weight_lengths = _lists_of(arrays[self.weights], wanted)
            if not torch.equal(lengths, weight_lengths):
                row = int((lengths != weight_lengths).nonzero()[0])
                raise ValueError(
                    f"row {row} has {int(lengths[row])} bags and {int(weight_lengths[row])} "
                    f"lists of weights in {self.weights!r}"
                )
            inner = replace(inner, weights=self.weights)
            given[self.weights] = weight_lists
        values, offsets, weights = inner.read(given)
        outer = Jagged.from_lengths(torch.arange(len(bags), device="cpu"), lengths)
        if self.max_len is None:
            return NestedJagged(values, offsets, outer.offsets, weights)
        kept = cut(outer, self.max_len, self.keep)
        values, offsets, weights = Jagged(values, offsets, weights).select(kept.values)
        return NestedJagged(values, offsets, kept.offsets, weights)


def _weights_of(array: pa.Array, source: str) -> Tensor:
    """Return the weights of a file's column; its errors name it, as the column is another's."""
    try:
        found = float_of(array, torch.float32)
    except (TypeError, ValueError) as error:
        raise type(error)(f"weights in {source!r}: {error}") from error
    if array.null_count:
        raise ValueError(
            f"weights in {source!r}: {array.null_count} of {len(array)} are null, and a weight "
            "has no default"
        )
    return found


def _lists_of(array: pa.Array, wanted: str) -> tuple[pa.Array, Tensor]:
    """Return the lists within lists, and how many each row has."""
    kind = array.type
    if not pa.types.is_null(kind) and not (is_list(kind) and _may_be_list(kind.value_type)):
        raise TypeError(f"expected {wanted}, got {kind}")
    return bags_of(array)


def _may_be_list(kind: pa.DataType) -> bool:
    return is_list(kind) or pa.types.is_null(kind)


@dataclass(frozen=True)
class Number(Column):
    """One number a row: float32 or float64 [B].

    Integers, floats, bools and decimals; times, dates and durations become seconds. A list of one
    value counts as the value, an empty one as null. NaN is a value.

    Args:
        name: Entry of the batch.
        default: Number of a null; None refuses nulls.
        dtype: ``"float32"`` or ``"float64"``.
        source: Column of the file; None means ``name``.

    Example:
        >>> Number("price", default=0.0).read({"price": pa.array([1, None])})
        tensor([1., 0.])
    """

    name: str
    default: float | None = None
    dtype: str = "float32"
    source: str | None = None

    def __post_init__(self) -> None:
        check_names(self.name, ("source", self.source))
        check_number("default", self.default)
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {sorted(_DTYPES)}, got {self.dtype!r}")

    @property
    @override
    def sources(self) -> tuple[str, ...]:
        return (self.source or self.name,)

    @override
    def read(self, arrays: Mapping[str, pa.Array]) -> Tensor:
        array = one_of_list(arrays[self.sources[0]])
        return fill_nulls(float_of(array, _DTYPES[self.dtype]), array, self.default)


@dataclass(frozen=True)
class Label(Column):
    """One target a row: float32 [B]; a null is refused.

    Args:
        name: Entry of the batch.
        source: Column of the file; None means ``name``.

    Example:
        >>> Label("click").read({"click": pa.array([True, False])})
        tensor([1., 0.])
    """

    name: str
    source: str | None = None

    def __post_init__(self) -> None:
        check_names(self.name, ("source", self.source))

    @property
    @override
    def sources(self) -> tuple[str, ...]:
        return (self.source or self.name,)

    @override
    def read(self, arrays: Mapping[str, pa.Array]) -> Tensor:
        array = one_of_list(arrays[self.sources[0]])
        return fill_nulls(float_of(array, torch.float32), array, None)
