"""Targets that are neither 0 nor 1: each metric of ours counts them."""

import pytest
import torch

from recis_lightning.metrics import (
    GAUC,
    BinnedAUROC,
    Calibration,
    MeanReciprocalRank,
    NormalizedEntropy,
    RecallAtK,
)
from recis_lightning.metrics.targets import check_binary

METRICS = [
    *(GAUC(), RecallAtK(1), MeanReciprocalRank()),
    *(BinnedAUROC(), Calibration(), NormalizedEntropy()),
]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: type(metric).__name__)
def test_other_targets_are_counted(metric):
    target = torch.tensor([1.0, torch.nan, 4.0, 0.0, torch.nan])
    given = [torch.zeros(5, dtype=torch.int64)] if metric in METRICS[:3] else []
    message = r"^target: expected 0 or 1 everywhere, got 3 of 5 others: 2 NaN, 1 such as 4.0$"
    with pytest.raises(ValueError, match=message):
        metric(torch.full((5,), 0.5), target, *given)


@pytest.mark.parametrize("target", [[], [True, False], [0, 1, 1], [0.0, 1.0]])
def test_targets_that_are_right(target):
    check_binary(torch.tensor(target))


@pytest.mark.parametrize(
    ("target", "others"),
    [
        ([-1, 1, 2, 2, 3, 4], "5 of 6 others: 5 such as -1, 2, 3"),
        ([torch.nan], "1 of 1 others: 1 NaN"),
        ([0.5, float("inf")], "2 of 2 others: 2 such as 0.5, inf"),
    ],
)
def test_others_are_shown(target, others):
    with pytest.raises(ValueError, match=f"got {others}$"):
        check_binary(torch.tensor(target))
