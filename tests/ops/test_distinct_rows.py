"""Counts of the distinct rows of each table in a batch."""

import numpy as np
import pytest
import torch

from recis_lightning.ops.distinct_rows import count_distinct


def lookup(*parts):
    """Return rows in one tensor, and a span for each (table, rows) that has a table."""
    rows = torch.cat([torch.tensor(part, dtype=torch.int64) for _, part in parts])
    spans, first = [], 0
    for table, part in parts:
        if table is not None:
            spans.append((rows.data_ptr() + 8 * first, len(part), table))
        first += len(part)
    return rows, np.array(spans, np.int64).reshape(-1, 3)


def test_rows_of_several_lookups_count_together(backend):
    """Negative rows are not counted, nor rows outside of spans."""
    first = lookup((2, [7, 7, -1, 0]), (None, [1, 2, 3]), (0, [5, -2, 2**40]), (2, [0, 9]))
    second = lookup((2, [9, 10, 7]), (0, []))
    found = count_distinct([first, second], 4)
    assert found.tolist() == [[2, 2], [0, 0], [4, 8], [0, 0]]
    assert count_distinct([], 2).tolist() == [[0, 0], [0, 0]]
    assert count_distinct([lookup((0, [])), lookup((None, [4]))], 1).tolist() == [[0, 0]]


@pytest.mark.parametrize("num_rows", [1, 8, 9, 1000, 30_000])
def test_many_rows(backend, num_rows):
    """Rows are close together, far apart, or all different."""
    rng = np.random.default_rng(num_rows)
    parts = [
        (0, rng.integers(0, 1 + num_rows // 3, num_rows)),
        (1, rng.permutation(num_rows) << 20),
        (2, rng.zipf(1.3, num_rows) % 2**40),
    ]
    expected = [[len(np.unique(part)), num_rows] for _, part in parts]
    assert count_distinct([lookup(*parts)], 3).tolist() == expected
