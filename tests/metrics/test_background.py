"""Metrics that a thread computes, from snapshots of their states."""

import threading
import time

import pytest
import torch
from torchmetrics import CatMetric, MaxMetric, MetricCollection, MinMaxMetric, SumMetric
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision

from recis_lightning.metrics import GAUC, NDCG, BinnedAUROC
from recis_lightning.metrics.background import BackgroundMetrics, is_costly, take_snapshot

PREDS, TARGET = torch.tensor([0.9, 0.1, 0.6, 0.4]), torch.tensor([1, 0, 0, 1])


@pytest.mark.parametrize(
    ("metric", "costly"),
    [
        (BinaryAUROC(), True),
        (BinaryAUROC(thresholds=10), False),
        (GAUC(), True),
        (NDCG(), True),
        (BinnedAUROC(), False),
        (MinMaxMetric(BinaryAUROC()), False),
        (SumMetric() + MaxMetric(), False),
        (MetricCollection({"sum": SumMetric(), "auroc": BinaryAUROC()}), True),
        (MetricCollection({"sum": SumMetric(), "max": MaxMetric()}), False),
        (MetricCollection([MinMaxMetric(SumMetric()), BinaryAUROC()]), False),
    ],
    ids=lambda x: type(x).__name__,
)
def test_metrics_that_keep_samples_are_costly(metric, costly):
    assert is_costly(metric) is costly


def test_a_snapshot_is_of_its_moment():
    """It shares the samples, and neither side sees what the other does later."""
    auroc = BinaryAUROC()
    auroc.update(PREDS, TARGET)
    taken = take_snapshot(auroc)
    assert taken.preds[0] is auroc.preds[0]
    auroc.update(PREDS, 1 - TARGET)
    assert taken.compute() == 0.75
    assert auroc.compute() == 0.5
    taken.reset()
    assert len(auroc.preds) == 2
    auroc.update(PREDS, TARGET)
    auroc.reset()
    auroc.update(PREDS, 1 - TARGET)
    assert auroc.compute() == 0.25


def test_a_snapshot_copies_states_of_constant_size():
    """Metrics add to those in place."""

    class Both(CatMetric):
        def __init__(self):
            super().__init__()
            self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

        def update(self, value):
            super().update(value)
            self.total += value

        def compute(self):
            return self.total + len(self.value)

    metric = Both()
    metric.update(5.0)
    taken = take_snapshot(metric)
    metric.update(7.0)
    assert taken.compute() == 6.0
    assert metric.compute() == 14.0


def test_a_collection_keeps_its_names_and_its_groups():
    metrics = MetricCollection([BinaryAUROC(), BinaryAveragePrecision()], prefix="val_")
    for _ in range(2):  # the first finds the groups
        metrics.update(PREDS, TARGET)
    taken = take_snapshot(metrics)
    expected = metrics.compute()
    metrics.update(PREDS, 1 - TARGET)
    assert taken.compute() == expected
    assert set(expected) == {"val_BinaryAUROC", "val_BinaryAveragePrecision"}
    assert len(metrics["BinaryAveragePrecision"].preds) == 3
    metrics.reset()
    assert taken.compute() == expected


def test_a_snapshot_of_several_ranks_has_joined_them_already():
    """To compute it takes no collective; the metric goes on with this rank's samples."""
    calls = []

    def gather(tensor, group=None):
        calls.append(threading.current_thread())
        return [tensor, tensor + 1]

    metric = CatMetric(dist_sync_fn=gather, distributed_available_fn=lambda: True)
    metric.update(torch.tensor([1.0, 3.0]))
    taken = take_snapshot(metric)
    assert BackgroundMetrics({"all": taken}).values()["all"].tolist() == [1, 3, 2, 4]
    assert calls == [threading.current_thread()]
    assert [part.tolist() for part in metric.value] == [[1, 3]]
    assert taken.compute().tolist() == [1, 3, 2, 4]
    assert len(calls) == 1


def test_a_thread_computes_while_its_owner_goes_on():
    release, threads = threading.Event(), []

    class Slow(CatMetric):
        def compute(self):
            threads.append(threading.current_thread())
            assert not torch.is_grad_enabled()
            release.wait(30)
            return super().compute()

    metric = Slow()
    metric.update(2.0)
    background = BackgroundMetrics({"slow": take_snapshot(metric)})
    metric.update(3.0)
    assert not background.is_done
    release.set()
    assert background.values()["slow"] == 2.0
    assert threads == [background._thread]
    deadline = time.monotonic() + 30
    while not background.is_done:
        assert time.monotonic() < deadline
    assert not background._snapshots


def test_an_error_is_raised_where_values_are_asked_for():
    gauc = GAUC()
    gauc.update(torch.rand(2), torch.tensor([0, 2]), torch.tensor([1, 1]))
    background = BackgroundMetrics({"gauc": take_snapshot(gauc)})
    with pytest.raises(ValueError, match="target: expected 0 or 1 everywhere"):
        background.values()
    assert background.is_done


def test_values_of_any_kind_come_through():
    class Odd(CatMetric):
        def compute(self):
            return {"a": torch.tensor(1.0), "b": "text", "c": [1, 2]}

    first, second = Odd(), Odd()
    for metric in (first, second):
        metric.update(1.0)
    value = {"a": 1.0, "b": "text", "c": [1, 2]}
    assert BackgroundMetrics({"first": first, "second": second}).values() == {
        "first": value,
        "second": value,
    }
