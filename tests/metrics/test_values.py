"""Values of add_metric: computed at once, or by a thread, on one rank and on several."""

import pytest
import torch
from torchmetrics import CatMetric, MetricCollection, SumMetric
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision

from recis_lightning.metrics import GAUC, add_metric, clear_metrics
from recis_lightning.metrics.values import registered_values
from tests.helpers.rank_metrics import report, samples


@pytest.fixture(autouse=True)
def _empty_registry():
    clear_metrics()
    yield
    clear_metrics()


def test_kinds_of_values_in_the_order_of_their_names():
    add_metric("called", lambda: 2)
    add_metric("sum", SumMetric())  # without samples
    add_metric("text", "warm")
    add_metric("parts", {"a": 1, "b": 2})
    values = registered_values(1)
    assert list(values.items()) == [
        *(("called", 2), ("sum", None), ("text", "warm"), ("parts_a", 1), ("parts_b", 2)),
    ]


def test_members_of_a_collection_come_by_their_names():
    both = MetricCollection({"sum": SumMetric(), "kept": CatMetric()})
    both.update(2.0)
    add_metric("both", both)
    assert registered_values(1) == {"both_sum": 2, "both_kept": 2}
    assert both._state_is_copy is False  # nothing was copied
    late = registered_values(1, background=True)["both"]
    assert late.values() == {"both": {"sum": 2, "kept": 2}}


def test_ranks_communicate_in_their_own_thread_only(ranks):
    """One rank has no samples, and takes part all the same."""
    preds, target, groups = (
        torch.cat(parts) for parts in zip(*map(samples, range(3)), strict=True)
    )
    gauc, auroc, precision = GAUC(), BinaryAUROC(), BinaryAveragePrecision()
    gauc.update(preds, target, groups)
    expected = {
        "gauc": gauc.compute().item(),
        "both_BinaryAUROC": auroc(preds, target).item(),
        "both_BinaryAveragePrecision": precision(preds, target).item(),
    }
    for rank, (values, threads, kept) in enumerate(ranks.run(3, report)):
        assert values == pytest.approx(expected)
        assert threads == {"MainThread"}
        assert kept == (0 if rank == 1 else 40 + rank)
