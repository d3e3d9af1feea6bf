"""Received ids in the order of tables."""

import numpy as np
import pytest
import torch

from recis_lightning.lookup import regrouping
from recis_lightning.lookup.regrouping import received_parts

CPU = torch.device("cpu")


def test_small_parts_are_regrouped_by_source():
    """Ids of one source follow in the order of ranks, and what belongs to them comes along."""
    counts = np.array([[2, 0, 1], [1, 2, 0]])
    message = torch.tensor([10, 11, 30, 12, 20, 21])
    parts = received_parts(counts, CPU)
    assert parts.sources.tolist() == [0, 1, 2]
    assert parts.sizes.tolist() == [3, 2, 1]
    assert parts.arrange(message).tolist() == [10, 11, 12, 20, 21, 30]
    rows = parts.arrange(message)[:, None].expand(-1, 2).contiguous()
    assert torch.equal(parts.restore(rows)[:, 1], message)


@pytest.mark.parametrize("counts", [[[3]], [[3], [0], [2]], [[0, 0], [0, 0]], [[1, 0, 4]]])
def test_one_source_or_rank_needs_no_other_order(counts):
    """What is in order stays as it is; there may be nothing at all."""
    counts = np.array(counts)
    parts = received_parts(counts, CPU)
    assert parts.sizes.sum() == counts.sum()
    message = torch.arange(int(counts.sum()))
    assert torch.equal(parts.arrange(message), message)
    assert torch.equal(parts.restore(message), message)


def test_large_parts_stay_in_the_order_of_the_message(monkeypatch):
    """Rows are not copied where the parts are large enough to pay for themselves."""
    monkeypatch.setattr(regrouping, "IDS_OF_PART", 2)
    large = received_parts(np.array([[2, 2], [3, 1]]), CPU)
    assert large.order is None
    assert large.sources.tolist() == [0, 1, 0, 1]
    assert large.sizes.tolist() == [2, 2, 3, 1]
    assert received_parts(np.array([[2, 1], [3, 1]]), CPU).order is not None
