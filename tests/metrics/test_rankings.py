"""Rankings by group: a loop over groups, scikit-learn, torchmetrics, ranks, and refusals."""

import math

import pytest
import torch
from torchmetrics.retrieval import RetrievalMRR, RetrievalNormalizedDCG, RetrievalRecall

from recis_lightning.metrics import NDCG, MeanReciprocalRank, RecallAtK
from tests.helpers.metric_ranks import joined_by_torchmetrics


def recall_truth(ranked, k):
    return sum(ranked[:k]) / sum(ranked)


def reciprocal_truth(ranked, k):
    return next((1 / r for r, y in enumerate(ranked[:k], 1) if y), 0.0)


def ndcg_truth(ranked, k):
    def gain(targets):
        return sum(y / math.log2(r + 1) for r, y in enumerate(targets[:k], 1))

    return gain(ranked) / gain(sorted(ranked, reverse=True))


def exponential_truth(ranked, k):
    return ndcg_truth([2**y - 1 for y in ranked], k)


def truth(rule, preds, target, groups, k):
    """Average ``rule`` over the groups with a positive; negatives come first among ties."""
    values = []
    for group in set(groups.tolist()):
        mine = groups == group
        pairs = zip(preds[mine].tolist(), target[mine].tolist(), strict=True)
        ranked = [y for _, y in sorted(pairs, key=lambda pair: (-pair[0], pair[1]))]
        if any(ranked):
            values.append(rule(ranked, k))
    return sum(values) / len(values)


CASES = {
    "recall": (lambda k: RecallAtK(k or 99), recall_truth, 2),
    "mrr": (MeanReciprocalRank, reciprocal_truth, 2),
    "ndcg": (NDCG, ndcg_truth, 5),
    "ndcg, exponential": (lambda k: NDCG(k, exponential=True), exponential_truth, 5),
}


def samples(levels, distinct=False, n=300):
    chance = torch.Generator().manual_seed(0)
    preds = torch.randint(7, (n,), generator=chance).float() / 7
    if distinct:
        preds = torch.randperm(n, generator=chance) / n
    target = torch.randint(levels, (n,), generator=chance)
    target[torch.rand(n, generator=chance) < 0.5] = 0
    groups = torch.randint(60, (n,), generator=chance) - 30
    return preds, target, groups * 2**57


@pytest.mark.parametrize("k", [1, 3, None])
@pytest.mark.parametrize("case", CASES)
def test_it_is_a_loop_over_groups_on_any_ranks(case, k):
    """With ties, groups without a positive and of one sample, in any batches, on two ranks."""
    make, rule, levels = CASES[case]
    preds, target, groups = samples(levels)
    ranks = [make(k), make(k)]
    for part in (slice(0, 1), slice(1, 90), slice(90, 300)):
        ranks[part.start > 0].update(preds[part], target[part], groups[part])
    ranks[0].update(preds[:0], target[:0], groups[:0])
    wanted = truth(rule, preds, target, groups, k)
    assert joined_by_torchmetrics(ranks).compute().item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("ours", "theirs", "levels"),
    [
        (RecallAtK(3), RetrievalRecall(empty_target_action="skip", top_k=3), 2),
        (MeanReciprocalRank(), RetrievalMRR(empty_target_action="skip"), 2),
        (NDCG(4), RetrievalNormalizedDCG(empty_target_action="skip", top_k=4), 5),
    ],
)
def test_it_is_torchmetrics_without_ties(ours, theirs, levels):
    preds, target, groups = samples(levels, distinct=True)
    ours.update(preds, target, groups)
    theirs.update(preds, target, indexes=groups // 2**57 + 30)
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), abs=1e-6)


def test_ndcg_is_scikit_learns_without_ties():
    """Mean of ``ndcg_score(k=4)`` of version 1.9.1; a group of one, which it refuses, has 1."""
    ours = NDCG(4)
    ours.update(*samples(5, distinct=True))
    assert ours.compute().item() == pytest.approx(0.6038349528533058, abs=1e-6)


@pytest.mark.parametrize("make", [lambda: RecallAtK(1), MeanReciprocalRank, NDCG])
def test_nothing_to_rank_is_nan(make):
    """With a warning where no group has a positive, without where a score is NaN."""
    metric = make()
    metric.update(torch.rand(2), torch.zeros(2), torch.tensor([0, 1]))
    with pytest.warns(UserWarning, match="no group has a positive target, the result is NaN"):
        assert metric.compute().isnan()
    metric = make()
    metric.update(torch.tensor([torch.nan, 0.5]), torch.ones(2), torch.tensor([0, 1]))
    assert metric.compute().isnan()
    metric.reset()
    metric.update(torch.tensor([0.5]), torch.ones(1), torch.tensor([0]))
    assert metric.compute() == 1


@pytest.mark.parametrize("make", [lambda: RecallAtK(1), MeanReciprocalRank, NDCG])
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.ones(1).long(), torch.ones(1), torch.ones(1).long()), TypeError, "preds: expected"),
        ((torch.ones(1), torch.ones(1), torch.ones(1)), TypeError, "group_ids: expected an integ"),
        ((torch.ones(1), torch.ones(2), torch.ones(1).long()), ValueError, "target: expected 1 el"),
        ((torch.ones(1), torch.ones(1), torch.ones(2).long()), ValueError, "group_ids: expected 1"),
        ((torch.ones(1), -torch.ones(1), torch.ones(1).long()), ValueError, "target: expected"),
        (([1.0], torch.ones(1), torch.ones(1).long()), TypeError, "preds: expected a Tensor"),
        ((torch.ones(1), torch.ones(1), [1]), TypeError, "group_ids: expected a Tensor, got list"),
    ],
)
def test_bad_samples_change_nothing(make, arguments, error, words):
    metric = make()
    with pytest.raises(error, match=words):
        metric.update(*arguments)
    assert not metric.preds
    assert not metric.target
    assert not metric.group_ids


def test_targets_keep_their_size():
    """Gains are float64: neither do large ones overflow, nor do close ones become equal."""
    preds, groups = torch.tensor([0.9, 0.5]), torch.zeros(2, dtype=torch.int64)
    for target, wanted in ([1e300, 2e300], 0.5), ([2**53 - 2, 2**53 - 1], 1 - 2**-53):
        metric = NDCG(k=1)
        metric.update(preds, torch.tensor(target, dtype=torch.float64), groups)
        assert metric.compute() == pytest.approx(wanted, abs=1e-16)
        assert metric.compute() < 1
    metric = NDCG(k=1, exponential=True)
    metric.update(preds, torch.tensor([999.0, 1000.0]), groups)
    assert metric.compute() == 0.5
    with pytest.raises(ValueError, match=r"target: expected numbers <= 1000 .* got 1001\.0"):
        metric.update(preds, torch.tensor([0.0, 1001.0]), groups)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="k: expected an int >= 1, got 0"):
        RecallAtK(0)
    with pytest.raises(TypeError, match=r"k: expected an int >= 1, got 2\.5"):
        MeanReciprocalRank(2.5)
    with pytest.raises(TypeError, match="exponential: expected a bool, got 1"):
        NDCG(exponential=1)
