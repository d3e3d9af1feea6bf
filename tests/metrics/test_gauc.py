"""GAUC next to its definition, and what it refuses."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_auroc

from recis_lightning import GAUC
from tests.helpers.metric_ranks import joined_by_torchmetrics


def naive_gauc(preds, target, group_ids):
    """Return GAUC by its definition, one pair at a time."""
    total = weight = 0.0
    for group in set(group_ids.tolist()):
        mine = group_ids == group
        positives = preds[mine & (target == 1)].tolist()
        negatives = preds[mine & (target == 0)].tolist()
        if positives and negatives:
            wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
            total += int(mine.sum()) * wins / (len(positives) * len(negatives))
            weight += int(mine.sum())
    return total / weight if weight else float("nan")


def gauc(preds, target, group_ids):
    metric = GAUC()
    metric.update(preds, target, group_ids)
    return metric.compute()


def test_gauc_of_one_group_is_the_auc():
    generator = torch.Generator().manual_seed(0)
    preds = torch.rand(500, generator=generator).mul(20).round().div(20)  # many ties
    target = torch.randint(0, 2, (500,), generator=generator)
    torch.testing.assert_close(
        gauc(preds, target, torch.zeros(500, dtype=torch.int64)), binary_auroc(preds, target)
    )


def test_gauc_weights_each_groups_auc_by_its_samples():
    generator = torch.Generator().manual_seed(1)
    preds = torch.rand(600, generator=generator)
    target = torch.randint(0, 2, (600,), generator=generator)
    groups = torch.randint(-3, 3, (600,), generator=generator)
    total = 0.0
    for group in range(-3, 3):
        mine = groups == group
        total += float(binary_auroc(preds[mine], target[mine])) * int(mine.sum())
    assert gauc(preds, target, groups).item() == pytest.approx(total / 600, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([-1.5, 0.0, 0.25, 0.5, 1.0]),
            st.integers(0, 1),
            st.sampled_from([-(2**63), -1, 0, 7, 2**63 - 1]),
        ),
        min_size=1,
        max_size=40,
    )
)
def test_gauc_agrees_with_the_definition(samples):
    preds, target, groups = (torch.tensor(column) for column in zip(*samples, strict=True))
    expected = naive_gauc(preds, target, groups)
    if expected != expected:
        with pytest.warns(UserWarning, match="no group has both classes"):
            assert gauc(preds.float(), target, groups).isnan()
    else:
        assert gauc(preds.float(), target, groups).item() == pytest.approx(expected, abs=1e-6)


def test_gauc_adds_up_over_updates_and_resets():
    metric = GAUC()
    preds, target = torch.tensor([0.1, 0.9, 0.4, 0.3]), torch.tensor([0, 1, 0, 1])
    groups = torch.tensor([1, 1, 2, 2])
    for i in range(4):
        metric.update(preds[i : i + 1], target[i : i + 1], groups[i : i + 1])
    assert metric.compute() == 0.5
    metric.reset()
    metric.update(preds[:2], target[:2], groups[:2])
    assert metric.compute() == 1.0


def test_gauc_leaves_out_groups_with_one_class():
    preds = torch.tensor([0.9, 0.1, 0.2, 0.3])
    assert gauc(preds, torch.tensor([1, 0, 1, 1]), torch.tensor([0, 0, 1, 1])) == 1.0


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_gauc_takes_any_dtype_of_target(dtype):
    preds = torch.tensor([[0.9, 0.1], [0.2, 0.3]], dtype=torch.float16)
    target = torch.tensor([[1, 0], [1, 0]]).to(dtype)
    assert gauc(preds, target, torch.tensor([[0, 0], [1, 1]], dtype=torch.int32)) == 0.5


def test_gauc_of_nothing_is_nan_with_a_warning():
    metric = GAUC()
    metric.update(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.int64))
    with pytest.warns(UserWarning, match="no group has both classes"):
        assert metric.compute().isnan()


def test_gauc_of_a_nan_score_is_nan():
    preds = torch.tensor([0.9, float("nan"), 0.1])
    assert gauc(preds, torch.tensor([1, 0, 0]), torch.tensor([0, 0, 0])).isnan()


def test_gauc_names_what_is_wrong():
    ids = torch.tensor([0, 0])
    with pytest.raises(TypeError, match=r"preds: expected a floating point dtype, got torch.int64"):
        GAUC().update(ids, ids, ids)
    with pytest.raises(TypeError, match=r"target: expected a Tensor, got list"):
        GAUC().update(torch.ones(1), [1], torch.ones(1))
    with pytest.raises(TypeError, match=r"group_ids: expected an integer dtype"):
        GAUC().update(torch.rand(2), ids, torch.rand(2))
    with pytest.raises(ValueError, match="got 2 and 1 for 2 preds"):
        GAUC().update(torch.rand(2), ids, ids[:1])
    with pytest.raises(ValueError, match="target: expected 0 or 1"):
        gauc(torch.rand(2), torch.tensor([0, 2]), ids)


def test_gauc_survives_pickling_and_joins_what_ranks_gathered():
    metric = GAUC()
    metric.update(torch.tensor([0.1, 0.9]), torch.tensor([0, 1]), torch.tensor([1, 1]))
    copy = pickle.loads(pickle.dumps(metric))
    assert copy.compute() == 1.0
    # After a sync over ranks, torchmetrics leaves one tensor where a list was.
    synced = GAUC()
    synced.preds, synced.target = torch.tensor([0.1, 0.9]), torch.tensor([0, 1])
    synced.group_ids, synced.weights = torch.tensor([1, 1]), torch.ones(2)
    synced._update_count = 1
    assert synced.compute() == 1.0


def weighted_truth(preds, target, groups, weights, equal):
    """Return the weighted GAUC by its definition, one pair at a time."""
    areas, shares = [], []
    for group in set(groups.tolist()):
        rows = [
            (p, y, w)
            for p, y, g, w in zip(
                *(part.tolist() for part in (preds, target, groups, weights)), strict=True
            )
            if g == group
        ]
        pairs = [
            (w * v, (p > q) + 0.5 * (p == q)) for p, y, w in rows if y for q, z, v in rows if not z
        ]
        if sum(w for w, _ in pairs):
            areas.append(sum(w * won for w, won in pairs) / sum(w for w, _ in pairs))
            shares.append(1.0 if equal else sum(w for *_, w in rows))
    return sum(a * s for a, s in zip(areas, shares, strict=True)) / sum(shares)


@pytest.mark.parametrize("group_weight", ["samples", "equal"])
@pytest.mark.parametrize("weighted", [True, False])
def test_gauc_weighs_samples_and_groups(group_weight, weighted):
    """In any batches, some without weights; zero weights; on ranks, joined by torchmetrics."""
    chance = torch.Generator().manual_seed(0)
    preds = torch.randint(6, (200,), generator=chance).double() / 6
    target = torch.randint(2, (200,), generator=chance)
    groups = torch.randint(-4, 25, (200,), generator=chance)
    weights = torch.randint(4, (200,), generator=chance).double() / 3
    weights[:50] = 1
    ranks = [GAUC(group_weight=group_weight) for _ in range(2)]
    for part in (slice(0, 50), slice(50, 51), slice(51, 120), slice(120, 200)):
        given = [weights[part]] if weighted and part.start else []
        ranks[part.start >= 51].update(preds[part], target[part], groups[part], *given)
    joined = joined_by_torchmetrics(ranks)
    used = weights if weighted else torch.ones_like(weights)
    wanted = weighted_truth(preds, target, groups, used, group_weight == "equal")
    assert joined.compute().item() == pytest.approx(wanted, abs=1e-6)


def test_gauc_agrees_with_scikit_learn():
    """Each group's area is that of ``roc_auc_score`` with sample weights, of version 1.9.1."""
    chance = torch.Generator().manual_seed(1)
    preds, weights = (torch.rand(60, generator=chance) for _ in range(2))
    target, groups = torch.arange(60) % 2, torch.arange(60) % 3
    metric = GAUC(group_weight="equal")
    metric.update(preds, target, groups, weights)
    areas = [0.2695898621512205, 0.508367089072757, 0.6257082246610195]
    assert metric.compute().item() == pytest.approx(sum(areas) / 3, abs=1e-6)


@pytest.mark.parametrize(
    "weights", [torch.ones(3), torch.tensor([1.0, -1]), torch.tensor([1, 1e999])]
)
def test_gauc_refuses_bad_weights_and_keeps_nothing_of_them(weights):
    metric = GAUC()
    with pytest.raises(ValueError, match="weights: expected"):
        metric.update(torch.rand(2), torch.tensor([0, 1]), torch.tensor([0, 0]), weights)
    assert not metric.preds
    assert not metric.weights
    with pytest.raises(ValueError, match="group_weight: expected 'samples' or 'equal', got 'user'"):
        GAUC(group_weight="user")


def test_a_group_of_large_weights_leaves_the_others_exact():
    weights = torch.tensor([1e200, 1e200, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    metric = GAUC(group_weight="equal")
    metric.update(
        torch.tensor([0.9, 0.1, 0.9, 0.1, 0.8, 0.2]),
        torch.tensor([1, 0, 1, 0, 0, 1]),
        torch.tensor([1, 1, 2, 2, 2, 2]),
        weights,
    )
    assert metric.compute() == 0.875  # 1 and 3 / 4


def test_groups_that_are_left_out_are_counted():
    metric = GAUC()
    assert metric.num_groups() == (0, 0)
    ids = torch.tensor([7, 7, 9, 9, 5, 5, -3])
    target = torch.tensor([1, 0, 1, 1, 0, 0, 1])
    metric.update(torch.rand(4), target[:4], ids[:4])
    assert metric.num_groups() == (1, 1)
    metric.update(torch.rand(3), target[4:], ids[4:])
    assert metric.num_groups() == (1, 3)
    metric.update(torch.rand(1), torch.tensor([0]), torch.tensor([9]), torch.tensor([0.0]))
    assert metric.num_groups() == (1, 3)  # a sample of no weight makes no pair
    metric.update(torch.rand(1), torch.tensor([0]), torch.tensor([9]))
    assert metric.num_groups() == (2, 2)
