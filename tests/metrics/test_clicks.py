"""Click metrics: plain Python's figures, in any batches, on ranks, and refusals of bad samples."""

import math

import pytest
import torch

from recis_lightning.metrics import (
    BinnedAUROC,
    Calibration,
    NormalizedEntropy,
    add_metric,
    clear_metrics,
    get_metrics,
)


def samples(n=400, seed=0):
    chance = torch.Generator().manual_seed(seed)
    preds = torch.rand(n, generator=chance, dtype=torch.float64)
    target = (torch.rand(n, generator=chance) < preds).long()
    return preds, target, torch.rand(n, generator=chance, dtype=torch.float64)


def entropy_truth(preds, target, weights):
    rows = list(zip(preds.tolist(), target.tolist(), weights.tolist(), strict=True))
    total = sum(w for *_, w in rows)
    share = sum(w * y for _, y, w in rows) / total
    cross = -sum(w * math.log(p if y else 1 - p) for p, y, w in rows) / total
    return cross / -(share * math.log(share) + (1 - share) * math.log(1 - share))


def calibration_truth(preds, target, weights):
    rows = list(zip(preds.tolist(), target.tolist(), weights.tolist(), strict=True))
    return sum(p * w for p, _, w in rows) / sum(y * w for _, y, w in rows)


def auroc_truth(preds, target, weights):
    """Compare every positive with every negative."""
    rows = list(zip(preds.tolist(), target.tolist(), weights.tolist(), strict=True))
    positive = [(p, w) for p, y, w in rows if y]
    negative = [(p, w) for p, y, w in rows if not y]
    pairs = [(a * b, (p > q) + (p == q) / 2) for p, a in positive for q, b in negative]
    return sum(w * won for w, won in pairs) / sum(w for w, _ in pairs)


@pytest.mark.parametrize(
    ("metric", "truth"),
    [(NormalizedEntropy, entropy_truth), (Calibration, calibration_truth)],
)
def test_sums_are_exact_in_any_batches(metric, truth):
    preds, target, weights = samples()
    ones = torch.ones_like(weights)
    for given in (weights, None):
        ours = metric()
        for part in (slice(0, 0), slice(0, 7), slice(7, 333), slice(333, 400)):
            ours.update(preds[part], target[part], None if given is None else given[part])
        wanted = truth(preds, target, ones if given is None else given)
        assert ours.compute().item() == pytest.approx(wanted, rel=1e-12)


def test_values_are_scikit_learns():
    """Those of ``log_loss`` and ``roc_auc_score`` with sample weights, of version 1.9.1."""
    preds, target, weights = samples()
    entropy, auroc = NormalizedEntropy(), BinnedAUROC(num_bins=16)
    entropy.update(preds, target, weights)
    wanted = 0.5117917190762313 / 0.6918489732064388  # of the scores, and of the mean label
    assert entropy.compute().item() == pytest.approx(wanted, rel=1e-12)
    auroc.update(preds, target, weights)  # as of scores rounded down to sixteenths
    assert auroc.compute().item() == pytest.approx(0.8218503802945815, rel=1e-12)


def test_binned_auroc_is_exact_where_scores_are_few():
    preds, target, weights = samples()
    preds = (preds * 16).floor() / 16  # multiples of a bin's width: a bin is one score
    ours = BinnedAUROC(num_bins=64)
    ours.update(preds.reshape(20, 20), target, weights)
    assert ours.compute().item() == pytest.approx(auroc_truth(preds, target, weights), rel=1e-12)


@pytest.mark.parametrize("num_bins", [1, 3, 50, 10_000])
def test_binned_auroc_keeps_its_bound(num_bins):
    preds, target, weights = samples()
    preds[:2] = torch.tensor([0.0, 1.0])
    ours = BinnedAUROC(num_bins)
    ours.update(preds, target, weights)
    bound = ours.max_error().item()
    assert abs(ours.compute().item() - auroc_truth(preds, target, weights)) <= bound + 1e-12
    assert bound == pytest.approx(0.5) if num_bins == 1 else bound < 0.2


@pytest.mark.parametrize("metric", [NormalizedEntropy, Calibration, BinnedAUROC])
def test_ranks_add_their_states_up(metric):
    """As torchmetrics joins ranks: each state by its reduction."""
    whole, parts = metric(), [metric(), metric()]
    preds, target, _ = samples()
    whole.update(preds, target)
    for part, half in zip(parts, (slice(0, 150), slice(150, 400)), strict=True):
        part.update(preds[half], target[half])
    for name, reduce in parts[0]._reductions.items():
        states = torch.stack([getattr(part, name) for part in parts])
        setattr(parts[0], name, reduce(states))
    assert parts[0].compute().item() == pytest.approx(whole.compute().item(), rel=1e-12)


@pytest.mark.parametrize("metric", [NormalizedEntropy, BinnedAUROC])
def test_one_class_has_no_value(metric):
    ours = metric()
    ours.update(torch.tensor([0.2, 0.7]), torch.tensor([1, 1]))
    assert ours.compute().isnan()


def test_certain_predictions_have_a_finite_entropy():
    ours = NormalizedEntropy(eps=1e-6)
    ours.update(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1, 0, 0]))
    share = 1 / 3
    base = -(share * math.log(share) + (1 - share) * math.log(1 - share))
    assert ours.compute().item() == pytest.approx(-math.log(1e-6) / 3 / base, rel=1e-5)


@pytest.mark.parametrize("metric", [NormalizedEntropy, Calibration, BinnedAUROC])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.tensor([1]), torch.tensor([1])), TypeError, "preds: expected a floating point"),
        ((torch.tensor([1.5]), torch.tensor([1])), ValueError, "apply sigmoid to logits"),
        ((torch.tensor([torch.nan]), torch.tensor([1])), ValueError, "preds: expected prob"),
        ((torch.tensor([0.5]), torch.tensor([2])), ValueError, "target: expected 0 or 1"),
        ((torch.tensor([0.5]), torch.tensor([1, 0])), ValueError, "target: expected 1 elem"),
        (
            (torch.tensor([0.5]), torch.tensor([1]), torch.tensor([-1.0])),
            ValueError,
            "weights: expected finite numbers >= 0",
        ),
        (
            (torch.tensor([0.5]), torch.tensor([1]), torch.tensor([torch.inf])),
            ValueError,
            "weights: expected finite numbers >= 0",
        ),
        (([0.5], torch.tensor([1])), TypeError, "preds: expected a Tensor, got list"),
        ((torch.tensor([0.5]), 1), TypeError, "target: expected a Tensor, got int"),
        (
            (torch.tensor([0.5]), torch.tensor([1]), torch.ones(2)),
            ValueError,
            "weights: expected 1 elements, got 2",
        ),
    ],
)
def test_bad_samples_change_nothing(metric, arguments, error, message):
    ours = metric()
    with pytest.raises(error, match=message):
        ours.update(*arguments)
    assert all(getattr(ours, name).sum() == 0 for name in ours._defaults)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("metric", [NormalizedEntropy, Calibration, BinnedAUROC])
def test_states_may_get_another_dtype(metric, dtype):
    samples = torch.tensor([0.25, 0.75, 0.5, 0.5]), torch.tensor([0, 1, 1, 0])
    ours, exact = metric().set_dtype(dtype), metric()
    ours.update(*samples)
    exact.update(*samples)
    assert float(ours.compute()) == pytest.approx(float(exact.compute()), rel=1e-2)


def test_settings_of_metrics_are_checked():
    with pytest.raises(ValueError, match="num_bins: expected an int >= 1, got 0"):
        BinnedAUROC(0)
    with pytest.raises(ValueError, match=r"eps: expected a number in \(0, 0.5\), got 0"):
        NormalizedEntropy(eps=0)


def test_add_metric_takes_them():
    entropy = NormalizedEntropy()
    add_metric("ne", entropy)
    assert get_metrics()["ne"] is entropy
    clear_metrics()
