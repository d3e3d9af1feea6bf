"""Counts of distinct rows by torch's own operators, which are kernels already."""

from __future__ import annotations

import numpy as np
import torch

from recis_lightning.ops.async_copy import to_device_async
from recis_lightning.ops.layout import SPAN_ADDRESS, SPAN_NUM_ROWS, SPAN_TABLE

_ROW_BITS = 44  # low bits of a key hold the row, those above the table


def count_distinct(lookups, counts):
    parts = []
    for rows, spans in lookups:
        sizes = spans[:, SPAN_NUM_ROWS]
        ends = np.cumsum(sizes)
        indices = np.repeat((spans[:, SPAN_ADDRESS] - rows.data_ptr()) // 8 - ends + sizes, sizes)
        indices += np.arange(len(indices))
        tables = np.repeat(spans[:, SPAN_TABLE] << _ROW_BITS, sizes)
        # A key is negative where its row is.
        parts.append(
            rows[to_device_async(indices, rows.device)] | to_device_async(tables, rows.device)
        )
    keys = torch.cat(parts)
    known = keys[keys >= 0]
    for column, part in enumerate((known.unique(), known)):
        per_table = torch.bincount(part >> _ROW_BITS, minlength=len(counts))
        counts[:, column] = per_table.cpu().numpy()


__all__ = ["count_distinct"]
