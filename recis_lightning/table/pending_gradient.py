"""Gradients on their way from a backward pass to the optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recis_lightning.ops import distinct_rows, embedding_bag
from recis_lightning.ops.embedding_bag import Plan
from recis_lightning.ops.layout import UNKNOWN


@dataclass(eq=False)
class PendingGradient:
    """What a backward pass left for the optimizer: gradients of bags, and where ids lie in them.

    Attributes:
        tables: The table of each feature.
        plan: int64 [num_features, PLAN_SIZE]; DATA holds gradients.
        rows: int64 [n], rows of all ids of the lookup.
        keep: Tensors that ``plan`` points into.
    """

    tables: Sequence[object]
    plan: Plan
    rows: Tensor
    keep: list[Tensor]

    def rows_of(self, table: object) -> Tensor:
        """Return the rows that ``table`` has a gradient for; negative ones among them."""
        parts = list(self._parts(table))
        return torch.cat(parts) if parts else self.rows[:0]

    def lines_of(self, numbers: Mapping[object, int]) -> distinct_rows.Lines:
        """Say where the rows of several tables stand, for ``ops.distinct_rows``.

        Args:
            numbers: Of each table that is asked for, at least 0.
        """
        lines = np.empty((len(self.tables), distinct_rows.LINE_SIZE), np.int64)
        lines[:, distinct_rows.TABLE] = [numbers.get(table, -1) for table in self.tables]
        lines[:, distinct_rows.ADDRESS] = self.plan[:, embedding_bag.ROWS]
        lines[:, distinct_rows.NUM_ROWS] = self.plan[:, embedding_bag.NUM_IDS]
        return lines[lines[:, distinct_rows.TABLE] >= 0]

    def forget(self, table: object, gone: Tensor) -> None:
        """Drop the gradients of ``table``'s rows that ``gone`` (bool [rows]) marks."""
        for part in self._parts(table):
            known = (part >= 0).nonzero().squeeze(1)
            part[known[gone[part[known]]]] = UNKNOWN

    def _parts(self, table: object) -> Iterator[Tensor]:
        """Yield views of ``rows``, one for each feature of ``table``."""
        for owner, line in zip(self.tables, self.plan, strict=True):
            if owner is table:
                first = (int(line[embedding_bag.ROWS]) - self.rows.data_ptr()) // 8
                yield self.rows[first : first + int(line[embedding_bag.NUM_IDS])]


__all__ = ["PendingGradient"]
