"""``Batch``: the output of both data modules and the input of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypedDict

from torch import Tensor

from recis_lightning import Jagged


class Batch(TypedDict):
    """``B`` examples, column by column.

    Attributes:
        features: For each feature int64 [B], or a :class:`Jagged` of ``B`` bags.
        dense: float32 [B, num_dense]; ``num_dense`` may be 0.
        label: float32 [B], 0 or 1.
        group: int64 [B], group of each example in GAUC; -1 for none.
    """

    features: dict[str, Tensor | Jagged]
    dense: Tensor
    label: Tensor
    group: Tensor


def no_batches() -> Iterator[Batch]:
    """Return no batches: the loader of a part without files."""
    return iter(())
