"""``Cross``: ids of the combinations of several features' ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from recis_lightning.data.checks import check_names
from recis_lightning.data.entries import Entry, values_of
from recis_lightning.data.transforms import Transform
from recis_lightning.jagged import Jagged
from recis_lightning.nested_jagged import NestedJagged
from recis_lightning.ops import string_hash

__all__ = ["Cross"]

_MULTIPLIER = -0x395B586CA42E166B  # 0xC6A4A7935BD1E995, MurmurHash64A's, as int64
_SHIFT, _LOW_BITS = 47, 2**17 - 1


@dataclass(frozen=True)
class Cross(Transform):
    """One id for each combination of the ids of a row: int64, bags where a source has bags.

    The id is MurmurHash64A, with seed 0, of the ids' eight-byte words in the order of
    ``sources``. Bags give the combinations of their distinct ids, in order of first occurrence and
    the last source's fastest; the weight of a combination is the product of its ids' (the first
    one's, where an id occurs twice). With two sources it is RecIS's ``FeatureCross``, except that
    RecIS leaves the order within a row open.

    Args:
        name: Entry that it writes.
        sources: Entries of ids, two or more.

    Example:
        >>> from recis_lightning.data import Cross, Features, Id, IdList
        >>> features = Features([Id("a"), IdList("b")], [Cross("a_b", ["a", "b"])])
        >>> features({"a": [1, 2], "b": [[7, 8], []]})["a_b"][:2]
        (tensor([-6048978351316846121, -4934957694719864792]), tensor([0, 2, 2]))
    """

    name: str
    sources: list[str]

    def __post_init__(self) -> None:
        if isinstance(self.sources, str) or len(self.sources) < 2:
            raise ValueError(f"sources: expected two or more names, got {self.sources!r}")
        check_names(self.name, *(("sources", source) for source in self.sources))

    @property
    @override
    def inputs(self) -> tuple[str, ...]:
        return tuple(self.sources)

    @property
    @override
    def outputs(self) -> tuple[str, ...]:
        return (self.name,)

    @override
    def run(self, others: Sequence[Any], entries: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
        crossed = [_combinations(given) for given in entries]
        found: list[list[Entry]] = [[] for _ in others]
        for width in {len(words) for words, _, _ in crossed}:
            members = [k for k, (words, _, _) in enumerate(crossed) if len(words) == width]
            columns = [torch.cat([crossed[k][0][i] for k in members]) for i in range(width)]
            sizes = [len(crossed[k][0][0]) for k in members]
            for k, ids in zip(members, hash_words(columns).split(sizes), strict=True):
                _, offsets, weights = crossed[k]
                found[k] = [ids if offsets is None else Jagged(ids, offsets, weights)]
        return found


def hash_words(columns: Sequence[Tensor]) -> Tensor:
    """Return MurmurHash64A of each row of int64 words, with seed 0, int64 [n]."""
    if columns[0].device.type == "cpu":
        words = torch.stack(list(columns), 1)
        ends = np.arange(len(words) + 1) * 8 * len(columns)
        return string_hash.hash_strings(words.numpy().view(np.uint8).ravel(), ends, "murmur64a", 0)
    return hash_words_on_device(columns)


def hash_words_on_device(columns: Sequence[Tensor]) -> Tensor:
    """Return the same, by torch on any device: int64 products wrap as unsigned ones do."""
    length = 8 * len(columns) * _MULTIPLIER
    found = torch.full_like(columns[0], (length + 2**63) % 2**64 - 2**63)
    for words in columns:
        found = (found ^ (_fold(words * _MULTIPLIER) * _MULTIPLIER)) * _MULTIPLIER
    return _fold(_fold(found) * _MULTIPLIER)


def _fold(words: Tensor) -> Tensor:
    return words ^ ((words >> _SHIFT) & _LOW_BITS)


def _combinations(entries: Sequence[Entry]) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Return the words of each combination, and the offsets and weights if there are bags."""
    for entry in entries:
        if isinstance(entry, NestedJagged):
            raise TypeError("expected ids or bags of ids, got lists of bags")
        values = entry.values if isinstance(entry, Jagged) else entry
        if values.dtype is not torch.int64:
            raise TypeError(f"expected int64 ids, got {values.dtype}")
        if values.dim() != 1:
            raise ValueError(f"expected one id a row, [B], or bags, got {list(values.shape)}")
    sizes = [e.num_bags if isinstance(e, Jagged) else len(e) for e in entries]
    if len(set(sizes)) > 1:
        raise ValueError(f"expected sources of equally many rows, got {sizes}")
    if not any(isinstance(entry, Jagged) for entry in entries):
        return [entry for entry in entries if isinstance(entry, Tensor)], None, None
    bags = [_distinct(e) if isinstance(e, Jagged) else _bags_of_one(values_of(e)) for e in entries]
    lengths = [bag.lengths() for bag in bags]
    counts = torch.stack(lengths).prod(0)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    row = torch.arange(sizes[0], device=counts.device).repeat_interleave(counts)
    rest = torch.arange(len(row), device=counts.device) - offsets[row]
    words, weights = [], None
    for bag, length in zip(reversed(bags), reversed(lengths), strict=True):
        index = bag.offsets[row] + rest % length[row]
        rest = rest // length[row]
        words.append(bag.values[index])
        if bag.weights is not None:
            weights = bag.weights[index] * (1 if weights is None else weights)
    return words[::-1], offsets, weights


def _bags_of_one(ids: Tensor) -> Jagged:
    return Jagged(ids, torch.arange(len(ids) + 1, device=ids.device))


def _distinct(bags: Jagged) -> Jagged:
    """Return bags without the repetitions of an id in a bag."""
    lengths = bags.lengths()
    bag = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    order = bags.values.argsort(stable=True)
    order = order[bag[order].argsort(stable=True)]
    ids, owner = bags.values[order], bag[order]
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = (ids[1:] != ids[:-1]) | (owner[1:] != owner[:-1])
    if bool(first.all()):
        return bags
    index = order[first].sort().values
    weights = None if bags.weights is None else bags.weights[index]
    counts = torch.bincount(bag[index], minlength=len(lengths))
    return Jagged.from_lengths(bags.values[index], counts, weights)
