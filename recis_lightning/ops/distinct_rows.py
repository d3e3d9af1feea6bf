"""Counts of the distinct rows that a batch asked of each table: the contract."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from recis_lightning.ops import backend

Spans = npt.NDArray[np.int64]

Lines = Spans


def count_distinct(
    lookups: Sequence[tuple[Tensor, Spans]], num_tables: int
) -> npt.NDArray[np.int64]:
    """Count, for each table, the distinct rows and all rows of several lookups.

    Args:
        lookups: For each lookup its rows, int64 [n], all on one device, and the spans of them to
            count, int64 [num_spans, SPAN_SIZE]. Negative rows are not counted.
        num_tables: One more than the last table's index.

    Returns:
        int64 [num_tables, 2], distinct rows and rows of each table.
    """
    counts = np.zeros((num_tables, 2), np.int64)
    if lookups:
        module = backend.module("distinct_rows", lookups[0][0].device)
        module.count_distinct(lookups, counts)
    return counts


__all__ = ["Spans", "count_distinct"]
