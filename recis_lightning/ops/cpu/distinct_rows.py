"""Count distinct rows in Numba: a set of each table's rows, one table after the other."""

from __future__ import annotations

import numpy as np

from recis_lightning.ops.cpu import runtime
from recis_lightning.ops.cpu.intrinsics import load_i64, store_i64
from recis_lightning.ops.cpu.runtime import address_of
from recis_lightning.ops.layout import SPAN_ADDRESS, SPAN_NUM_ROWS, SPAN_SIZE, SPAN_TABLE

_LINE_BYTES = 8 * SPAN_SIZE
_MIX = np.uint64(0x9E3779B97F4A7C15)
_LEAST_BITS = 4
_SPARE = 4  # cells of the set for a row, at most


@runtime.kernel
def _count_kernel(args):
    lines, num_lines = load_i64(args + 16), load_i64(args + 24)
    cells, counts = load_i64(args + 32), load_i64(args + 40)
    line, end = lines, lines + num_lines * _LINE_BYTES
    while line < end:
        table = load_i64(line + 8 * SPAN_TABLE)
        size, last = 0, line
        while last < end and load_i64(last + 8 * SPAN_TABLE) == table:
            size += load_i64(last + 8 * SPAN_NUM_ROWS)
            last += _LINE_BYTES
        bits = _LEAST_BITS
        while (1 << bits) < 2 * size:
            bits += 1
        shift, mask = np.uint64(64 - bits), (1 << bits) - 1
        for cell in range(1 << bits):
            store_i64(cells + 8 * cell, -1)
        distinct, known = 0, 0
        while line < last:
            rows = load_i64(line + 8 * SPAN_ADDRESS)
            for i in range(load_i64(line + 8 * SPAN_NUM_ROWS)):
                row = load_i64(rows + 8 * i)
                if row < 0:
                    continue
                known += 1
                cell = np.int64((np.uint64(row) * _MIX) >> shift)
                found = load_i64(cells + 8 * cell)
                while found != row and found >= 0:
                    cell = (cell + 1) & mask
                    found = load_i64(cells + 8 * cell)
                if found < 0:
                    store_i64(cells + 8 * cell, row)
                    distinct += 1
            line += _LINE_BYTES
        store_i64(counts + 16 * table, distinct)
        store_i64(counts + 16 * table + 8, known)


def count_distinct(lookups, counts):
    """See the contract."""
    lines = lookups[0][1] if len(lookups) == 1 else np.concatenate([part for _, part in lookups])
    lines = lines[np.argsort(lines[:, SPAN_TABLE], kind="stable")]
    cells = np.empty(_SPARE * int(lines[:, SPAN_NUM_ROWS].sum()) + (1 << _LEAST_BITS), np.int64)
    where = (address_of(lines), len(lines), address_of(cells), address_of(counts))
    _count_kernel.launch(1, *where)


__all__ = ["count_distinct"]
