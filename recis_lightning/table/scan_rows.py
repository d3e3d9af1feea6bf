"""``HashTable.survey``: a look at all rows of a table, or at a random sample."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import CAPACITY, NO_ROW, STEP
from recis_lightning.table import scan
from recis_lightning.table.row_store import RowStore
from recis_lightning.table.scan import Rows, RowSurvey

__all__ = ["TableSurvey"]

_PIECE_ENTRIES = 1 << 16  # entries of the index looked at together


class TableSurvey:
    """The part of a table that looks at its rows."""

    rows: RowStore
    header: Header
    _entries: Tensor

    @property
    def keeps_last_seen(self) -> bool:
        """Whether a policy asks for the step of each row's last training lookup."""
        raise NotImplementedError

    @property
    def _last_seen(self) -> Tensor:
        raise NotImplementedError

    def survey(
        self, start: float = 0.0, stop: float = 1.0, rows: Tensor | None = None
    ) -> RowSurvey:
        """Look at all rows, or at some, for their ages and norms and for NaN and Inf.

        Ids lie in the index in the order of their hashes: those of a part of it are a random sample
        of all. Memory stays flat, however many rows are looked at.

        Args:
            start: Where in the index to begin, in [0, 1].
            stop: Where to end, in [start, 1].
            rows: int64 [n], look at these rows instead; negative ones are passed over.

        Raises:
            ValueError: ``start`` and ``stop`` are not what they should be.

        Example:
            >>> import torch
            >>> from recis_lightning import HashTable
            >>> table = HashTable(2)
            >>> table.insert(torch.tensor([7, 8]), torch.tensor([[3.0, 4.0], [0.0, torch.nan]]))
            >>> found = table.survey()
            >>> found.num_rows, found.norm_max, table.ids()[found.nonfinite_rows].tolist()
            (2, 5.0, [8])
        """
        if not 0 <= start <= stop <= 1:
            raise ValueError(f"expected 0 <= start <= stop <= 1, got start={start}, stop={stop}")
        return scan.survey(self._pieces(start, stop, rows))

    def _pieces(self, start: float, stop: float, rows: Tensor | None) -> Iterator[Rows]:
        header = self.header.fields
        capacity, step = int(header[CAPACITY]), int(header[STEP])
        # The entry behind the last slot is one id's own.
        end = capacity + 1 if stop == 1 else int(stop * capacity)
        first, end = (int(start * capacity), end) if rows is None else (0, rows.numel())
        column = self._last_seen if self.keeps_last_seen else None
        for place in range(first, max(end, first + 1), _PIECE_ENTRIES):
            part = slice(place, min(place + _PIECE_ENTRIES, end))
            chosen = (self._entries[part, 1] if rows is None else rows[part]).cpu().numpy()
            chosen = chosen[chosen.view(np.uint64) < NO_ROW]  # neither negative nor empty
            found = torch.from_numpy(chosen).to(self.header.device)
            weights, state = self.rows.read_whole(found)
            ages = None
            if column is not None:
                ages = (step - column.index_select(0, found)).clamp_(min=0)
            yield Rows(found, weights, [state], ages)
