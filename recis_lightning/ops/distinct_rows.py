"""Count the distinct rows that a batch asked of each table: the contract."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from recis_lightning.ops import backend
from recis_lightning.ops import layout as fields

# Aliases until all rooms name the fields of ops.layout.
LINE_SIZE = fields.SPAN_SIZE
ADDRESS = fields.SPAN_ADDRESS
NUM_ROWS = fields.SPAN_NUM_ROWS
TABLE = fields.SPAN_TABLE

Lines = npt.NDArray[np.int64]


def count_distinct(lookups: Sequence[tuple[Tensor, Lines]], num_tables: int) -> Lines:
    """Count, for each table, the distinct rows and all rows of several lookups.

    Args:
        lookups: For each int64 [n], rows, all on one device, and int64 [num_lines, LINE_SIZE],
            which parts of them are to be counted. Negative rows count for nothing.
        num_tables: One more than the last table's number.

    Returns:
        int64 [num_tables, 2], distinct rows and rows of each table.
    """
    counts: Lines = np.zeros((num_tables, 2), np.int64)
    if lookups:
        module = backend.module("distinct_rows", lookups[0][0].device)
        module.count_distinct(lookups, counts)
    return counts


__all__ = ["Lines", "count_distinct"]
