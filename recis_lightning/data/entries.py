"""Entries of a batch: their values, several at a time, and shorter bags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from recis_lightning.jagged import Jagged
from recis_lightning.nested_jagged import NestedJagged

__all__ = [
    "Entry",
    "cut",
    "ids_of",
    "in_groups",
    "joined",
    "num_rows_of",
    "split",
    "spread",
    "values_of",
    "with_values",
]

Entry: TypeAlias = Tensor | Jagged | NestedJagged


def cut(bags: Jagged, max_len: int, keep: str) -> Jagged:
    """Shorten bags to their ``"first"`` or ``"last"`` ``max_len`` values."""
    lengths = bags.lengths()
    kept = lengths.clamp(max=max_len)
    if torch.equal(kept, lengths):
        return bags
    starts = bags.offsets[1:] - kept if keep == "last" else bags.offsets[:-1]
    offsets = torch.cat([kept.new_zeros(1), kept.cumsum(0)])
    index = torch.arange(int(offsets[-1]), device=kept.device)
    index += (starts - offsets[:-1]).repeat_interleave(kept)
    weights = None if bags.weights is None else bags.weights[index]
    return Jagged(bags.values[index], offsets, weights)


def values_of(entry: Entry) -> Tensor:
    """Return the values of an entry, [N]."""
    return entry if isinstance(entry, Tensor) else entry.values


def num_rows_of(entry: Entry) -> int:
    """Return the rows of an entry."""
    if isinstance(entry, Tensor):
        return entry.shape[0] if entry.ndim else 1
    offsets = entry.offsets if isinstance(entry, Jagged) else entry.outer_offsets
    return offsets.numel() - 1


def with_values(entry: Entry, values: Tensor) -> Entry:
    """Return an entry of the same bags with other values."""
    return values.view(entry.shape) if isinstance(entry, Tensor) else entry._replace(values=values)


def ids_of(entry: Entry) -> Tensor:
    """Return the ids of an entry, int64 [N].

    Raises:
        TypeError: They are no integers.
    """
    values = values_of(entry)
    if values.is_floating_point() or values.dtype is torch.bool:
        raise TypeError(f"expected integers, got {values.dtype}")
    return values.long()


def joined(
    entries: Sequence[Sequence[Entry]], read: Callable[[Entry], Tensor] = values_of
) -> Tensor:
    """Return all values of the first sources, one after the other."""
    values = [read(entry).reshape(-1) for entry, *_ in entries]
    return values[0] if len(values) == 1 else torch.cat(values)


def split(values: Tensor, entries: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
    """Give each first source its part of joined values."""
    sizes = [values_of(entry).numel() for entry, *_ in entries]
    parts = values.split(sizes) if len(sizes) > 1 else [values]
    return [[with_values(entry, part)] for (entry, *_), part in zip(entries, parts, strict=True)]


def spread(numbers: list[int], entries: Sequence[Sequence[Entry]], values: Tensor) -> Any:
    """Return a number for each joined value; one for all, if they are equal."""
    if len(set(numbers)) == 1:
        return numbers[0]
    sizes = [values_of(entry).numel() for entry, *_ in entries]
    # NumPy's: torch's repeat_interleave takes milliseconds for a hundred sizes.
    return torch.from_numpy(np.repeat(np.array(numbers, np.int64), sizes)).to(values.device)


def in_groups(
    transforms: Sequence[Any],
    entries: Sequence[Sequence[Entry]],
    parameters: str | Sequence[Any],
    compute: Callable[[Tensor, Any], Tensor],
    read: Callable[[Entry], Tensor] = values_of,
) -> list[list[Entry]]:
    """Run transforms of equal parameters and dtype at once, by ``compute(values, parameters)``."""
    if isinstance(parameters, str):
        parameters = [tuple(getattr(one, parameters)) for one in transforms]
    groups: dict[Any, list[int]] = {}
    for k, (entry, *_) in enumerate(entries):
        groups.setdefault((parameters[k], values_of(entry).dtype), []).append(k)
    found: list[list[Entry]] = [[] for _ in transforms]
    for members in groups.values():
        given = [entries[k] for k in members]
        parts = split(compute(joined(given, read), parameters[members[0]]), given)
        for k, part in zip(members, parts, strict=True):
            found[k] = part
    return found
