"""Combiners of the user's own: functions of a feature's rows and their bags."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from recis_lightning.jagged import Bags
from recis_lightning.lookup.unique_rows import offsets_of

Combiner = Callable[[Tensor, Tensor], Tensor]
"""Function of rows [n, embedding_dim] and offsets, int64 [B + 1], that returns [B, ...]."""


def combine(combiner: Combiner, rows: Tensor, bags: Bags, name: str, width: int | None) -> Tensor:
    """Return what a combiner makes of the rows of bags, [B, ...].

    Ids [B, S, L] are B * S bags, and give [B, S, ...].

    Args:
        combiner: The function.
        rows: [n, embedding_dim].
        bags: Of the feature, as it was given.
        name: Of the feature, for errors.
        width: Columns that it must return; None for anything.

    Raises:
        TypeError: It returns no tensor (names the feature, like all that follow).
        ValueError: The tensor has another number of bags or columns.
    """
    found = combiner(rows, offsets_of(bags))
    if not isinstance(found, Tensor):
        raise TypeError(f"{name}: its combiner must return a Tensor, got {type(found).__name__}")
    wanted = [bags.num_bags, "..." if width is None else width]
    if not found.dim() or found.shape[0] != bags.num_bags:
        raise ValueError(f"{name}: its combiner must return {wanted}, got {list(found.shape)}")
    if width is not None and list(found.shape[1:]) != [width]:
        raise ValueError(f"{name}: its combiner must return {wanted}, got {list(found.shape)}")
    if bags.shape is None or len(bags.shape) < 3:
        return found
    return found.reshape(*bags.shape[:-1], *found.shape[1:])


__all__ = ["Combiner", "combine"]
