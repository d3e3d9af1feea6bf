"""Count distinct rows in Numba: a set of each table's rows, one table after the other."""

from __future__ import annotations

import numpy as np

from recis_lightning.ops.cpu.intrinsics import load_i64, store_i64
from recis_lightning.ops.cpu.runtime import kernel
from recis_lightning.ops.layout import SPAN_ADDRESS, SPAN_NUM_ROWS, SPAN_SIZE, SPAN_TABLE

_SPAN_BYTES = 8 * SPAN_SIZE
_MIX = np.uint64(0x9E3779B97F4A7C15)
_MIN_BITS = 4
_CELLS_PER_ROW = 4  # of the set, at most


@kernel
def _count_kernel(spans, num_spans, cells, counts):
    span, end = spans, spans + num_spans * _SPAN_BYTES
    while span < end:
        table = load_i64(span + 8 * SPAN_TABLE)
        num_rows, last = 0, span
        while last < end and load_i64(last + 8 * SPAN_TABLE) == table:
            num_rows += load_i64(last + 8 * SPAN_NUM_ROWS)
            last += _SPAN_BYTES
        bits = _MIN_BITS
        while (1 << bits) < 2 * num_rows:
            bits += 1
        shift, mask = np.uint64(64 - bits), (1 << bits) - 1
        for cell in range(1 << bits):
            store_i64(cells + 8 * cell, -1)
        distinct, known = 0, 0
        while span < last:
            rows = load_i64(span + 8 * SPAN_ADDRESS)
            for i in range(load_i64(span + 8 * SPAN_NUM_ROWS)):
                row = load_i64(rows + 8 * i)
                if row < 0:
                    continue
                known += 1
                cell = np.int64((np.uint64(row) * _MIX) >> shift)
                stored = load_i64(cells + 8 * cell)
                while stored != row and stored >= 0:
                    cell = (cell + 1) & mask
                    stored = load_i64(cells + 8 * cell)
                if stored < 0:
                    store_i64(cells + 8 * cell, row)
                    distinct += 1
            span += _SPAN_BYTES
        store_i64(counts + 16 * table, distinct)
        store_i64(counts + 16 * table + 8, known)


def count_distinct(lookups, counts):
    spans = lookups[0][1] if len(lookups) == 1 else np.concatenate([part for _, part in lookups])
    spans = spans[np.argsort(spans[:, SPAN_TABLE], kind="stable")]
    num_cells = _CELLS_PER_ROW * int(spans[:, SPAN_NUM_ROWS].sum()) + (1 << _MIN_BITS)
    cells = np.empty(num_cells, np.int64)
    _count_kernel.launch(1, 1, spans=spans, num_spans=len(spans), cells=cells, counts=counts)


__all__ = ["count_distinct"]
