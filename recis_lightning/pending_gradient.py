"""Gradients on their way from a backward pass to the optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import embedding_bag
from recis_lightning.ops.embedding_bag import Plan
from recis_lightning.ops.table_header import UNKNOWN


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

    def numbered_rows(self, numbers: Mapping[object, int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        """Return the rows of several tables at once, and whose they are.

        Args:
            numbers: Of each table that is asked for, at least 0.

        Returns:
            rows: int64 [m], negative ones among them.
            owners: int64 [m], for each row the number of its table.
        """
        owners = np.array([numbers.get(table, -1) for table in self.tables], np.int64)
        asked = owners >= 0
        lines, owners = self.plan[asked], owners[asked]
        sizes = lines[:, embedding_bag.NUM_IDS]
        ends = np.cumsum(sizes)
        firsts = (lines[:, embedding_bag.ROWS] - self.rows.data_ptr()) // 8
        places = np.repeat(firsts - ends + sizes, sizes)
        places += np.arange(len(places))
        chosen = torch.from_numpy(places).to(self.rows.device)
        return self.rows.index_select(0, chosen), np.repeat(owners, sizes)

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
