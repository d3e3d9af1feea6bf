"""Heads: which of them differ."""

import numpy as np
import pytest

from recis_lightning.distributed.heads import Kind, _differ

TRAINING, EVALUATION, FINISHED = Kind.TRAINING, Kind.EVALUATION, Kind.FINISHED


@pytest.mark.parametrize(
    ("heads", "differs"),
    [
        ([(TRAINING, 5, 2)] * 3, False),
        ([(TRAINING, 5, 2), (TRAINING, 5, 3)], True),
        ([(TRAINING, 5, 2), (TRAINING, 6, 2)], True),
        ([(TRAINING, 5, 2), (EVALUATION, 5, 2)], True),
        ([(FINISHED, 0, 2), (EVALUATION, 5, 2)], False),
        ([(FINISHED, 0, 2), (FINISHED, 0, 2)], False),
        ([(FINISHED, 0, 2), (TRAINING, 5, 2), (TRAINING, 5, 2)], True),
        ([(FINISHED, 0, 2), (EVALUATION, 5, 2), (EVALUATION, 6, 2)], True),
        ([(Kind.FAILED, 0, 0)] * 2, True),
        ([(Kind.FAILED, 0, 0), (FINISHED, 0, 0)], True),
    ],
)
def test_which_heads_differ(heads, differs):
    """Ranks that have finished go with those that evaluate one thing, and with nothing else."""
    for order in (heads, heads[::-1]):
        assert _differ(np.array(order, np.int64)) is differs
