"""Rows of batches: choosing, joining and pinning them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from recis_lightning.jagged import Jagged
from recis_lightning.nested_jagged import NestedJagged

__all__ = ["Batch", "join_rows", "pinned", "select_rows"]

Batch: TypeAlias = dict[str, Tensor | Jagged | NestedJagged]


def select_rows(
    value: Tensor | Jagged | NestedJagged, rows: Tensor | slice
) -> Tensor | Jagged | NestedJagged:
    """Return a copy of some rows of an entry."""
    if isinstance(value, NestedJagged):
        return value.select(rows)
    if isinstance(value, Jagged):
        found = value.select(rows)
        if isinstance(rows, slice):  # views of the whole block
            weights = None if found.weights is None else found.weights.clone()
            return Jagged(found.values.clone(), found.offsets.clone(), weights)
        return found
    return value[rows].clone() if isinstance(rows, slice) else value.index_select(0, rows)


def join_rows(parts: Sequence[Batch]) -> Batch:
    """Return the rows of batches, one after the other; a lone batch is returned itself."""
    if len(parts) == 1:
        return parts[0]
    return {name: _concat([part[name] for part in parts]) for name in parts[0]}


def _concat(values: Sequence[Any]) -> Tensor | Jagged | NestedJagged:
    if isinstance(values[0], NestedJagged):
        inner = _concat([value.inner() for value in values])
        assert isinstance(inner, Jagged)
        outer = torch.cat([value.lengths() for value in values])
        return NestedJagged.from_lengths(inner.values, inner.lengths(), outer, inner.weights)
    if not isinstance(values[0], Jagged):
        return torch.cat(list(values))
    weights = [value.weights for value in values]
    return Jagged.from_lengths(
        torch.cat([value.values for value in values]),
        torch.cat([value.lengths() for value in values]),
        None if weights[0] is None else torch.cat(weights),
    )


def pinned(batch: Any) -> Any:
    """Return a batch, a dict of tensors and dicts, in pinned memory."""
    if isinstance(batch, dict):
        return {name: pinned(value) for name, value in batch.items()}
    return batch.pin_memory() if hasattr(batch, "pin_memory") else batch
