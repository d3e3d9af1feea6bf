"""Counts of distinct rows in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import distinct_rows
from recis_lightning.ops import layout as fields
from recis_lightning.ops.reference.storage import memory


def count_distinct(
    lookups: Sequence[tuple[Tensor, distinct_rows.Spans]], counts: npt.NDArray[np.int64]
) -> None:
    for table, count in enumerate(counts):
        rows: list[int] = []
        for span in (span for _, spans in lookups for span in spans.tolist()):
            if span[fields.SPAN_TABLE] == table:
                size = span[fields.SPAN_NUM_ROWS]
                rows += memory(span[fields.SPAN_ADDRESS], size, torch.int64).tolist()
        known = [row for row in rows if row >= 0]
        count[:] = len(set(known)), len(known)
