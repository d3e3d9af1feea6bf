"""Gradients on their way from a backward pass to the optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recis_lightning.ops import distinct_rows
from recis_lightning.ops import layout as fields
from recis_lightning.ops.embedding_bag import Plan
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import UNKNOWN

_version = attrgetter("_version")  # grows when a tensor, or one that shares its memory, is changed


@dataclass(eq=False)
class PendingGradient:
    """Gradients of bags that a backward pass left for the optimizer, and the rows of their ids.

    Attributes:
        tables: The table of each feature.
        plan: int64 [num_features, PLAN_SIZE]; DATA holds gradients.
        rows: int64 [n], rows of all ids of the lookup.
        keep: Tensors that ``plan`` points into.
        kept: What a backend keeps for plans that differ from this one in addresses alone; then
            FIRST_ID numbers the ids of ``plan`` through, all of which ``rows`` has. None: nothing.
        scales: Factor of a table's gradients, float64 [], where they were clipped.
        unsent: Gradients of rows that other ranks own, and that have not travelled to them.
    """

    tables: Sequence[object]
    plan: Plan
    rows: Tensor
    keep: list[Tensor]
    kept: dict[str, Any] | None = None
    scales: dict[object, Tensor] = field(default_factory=dict)
    unsent: object | None = None

    def __post_init__(self) -> None:
        self._versions = list(map(_version, self.keep))

    def check_unchanged(self, name: str) -> None:
        """Raise if somebody has changed a gradient in place: only what autograd made is not copied.

        Args:
            name: Of a table that it is for.

        Raises:
            RuntimeError: The update would use other numbers than backward gave (names the table).
        """
        if list(map(_version, self.keep)) != self._versions:
            raise RuntimeError(
                f"table {name!r}: a gradient was changed in place between backward and the "
                "optimizer's step (by a hook that keeps what it saw, or a backward that returns a "
                "buffer of its own); change a copy of it, gradient.clone(), or return one"
            )

    def rows_of(self, header: Header) -> Tensor:
        """Return the rows that a table has a gradient for, by its header; negative ones too."""
        parts = list(self._parts(header))
        return torch.cat(parts) if parts else self.rows[:0]

    def lines_of(self, numbers: Mapping[object, int]) -> distinct_rows.Lines:
        """Return where the rows of several tables are, for ``ops.distinct_rows``.

        Args:
            numbers: Index of each table that is asked for, at least 0.
        """
        lines = np.empty((len(self.tables), fields.SPAN_SIZE), np.int64)
        lines[:, fields.SPAN_TABLE] = [numbers.get(table, -1) for table in self.tables]
        lines[:, fields.SPAN_ADDRESS] = self.plan[:, fields.PLAN_ROWS]
        lines[:, fields.SPAN_NUM_ROWS] = self.plan[:, fields.PLAN_NUM_IDS]
        return lines[lines[:, fields.SPAN_TABLE] >= 0]

    def forget(self, header: Header, gone: Tensor) -> None:
        """Drop the gradients of a table's rows that ``gone`` (bool [rows]) marks, by its header."""
        for part in self._parts(header):
            known = (part >= 0).nonzero().squeeze(1)
            part[known[gone[part[known]]]] = UNKNOWN

    def _parts(self, header: Header) -> Iterator[Tensor]:
        """Yield views of ``rows``, one for each feature of the table with this header."""
        for line in self.plan[self.plan[:, fields.PLAN_HEADER] == header.address]:
            first = (int(line[fields.PLAN_ROWS]) - self.rows.data_ptr()) // 8
            yield self.rows[first : first + int(line[fields.PLAN_NUM_IDS])]


__all__ = ["PendingGradient"]
