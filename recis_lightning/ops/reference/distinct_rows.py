"""Counts of distinct rows in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recis_lightning.ops import distinct_rows
from recis_lightning.ops import layout as fields
from recis_lightning.ops.reference.storage import memory


def count_distinct(
    lookups: Sequence[tuple[Tensor, distinct_rows.Lines]], counts: distinct_rows.Lines
) -> None:
    """See ``distinct_rows.count_distinct``."""
    for table, count in enumerate(counts):
        rows: list[int] = []
        for line in (line for _, lines in lookups for line in lines.tolist()):
            if line[fields.SPAN_TABLE] == table:
                size = line[fields.SPAN_NUM_ROWS]
                rows += memory(line[fields.SPAN_ADDRESS], size, torch.int64).tolist()
        known = [row for row in rows if row >= 0]
        count[:] = len(set(known)), len(known)
