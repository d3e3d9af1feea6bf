"""The registry of add_metric, and the metric classes that are imported when they are asked for."""

import pickle
import threading

import pytest
import torch

import recis_lightning
from recis_lightning import metrics
from recis_lightning.metrics import add_metric, clear_metrics, clicks, gauc, get_metrics, rankings


@pytest.fixture(autouse=True)
def _empty_registry():
    clear_metrics()
    yield
    clear_metrics()


def test_registry_keeps_first_added_order_and_the_newest_value():
    add_metric("loss", 0.5)
    add_metric("auc", 0.7)
    add_metric("loss", 0.25)
    assert list(get_metrics().items()) == [("loss", 0.25), ("auc", 0.7)]


def test_registry_hands_out_copies():
    add_metric("loss", 0.5)
    get_metrics()["loss"] = 1.0
    assert get_metrics() == {"loss": 0.5}


def test_a_registered_tensor_lets_go_of_its_graph():
    loss = (torch.ones(2, requires_grad=True) * 2).sum()
    add_metric("loss", loss)
    kept = get_metrics()["loss"]
    assert isinstance(kept, torch.Tensor)
    assert kept.grad_fn is None
    assert kept == 4


def test_registry_refuses_a_name_that_is_no_string():
    with pytest.raises(TypeError, match="name: expected a str, got int"):
        add_metric(3, 0.5)


def test_registry_under_threads():
    def add(start):
        for i in range(start, start + 200):
            add_metric(f"m{i}", i)
            get_metrics()

    threads = [threading.Thread(target=add, args=(200 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(get_metrics()) == 800


def test_metric_classes_are_attributes_like_others():
    for module in (metrics, recis_lightning):
        assert module.GAUC is gauc.GAUC
        assert set(module.__all__) <= set(dir(module))
        with pytest.raises(
            AttributeError, match=r"module 'recis_lightning.*' has no attribute 'AUC'"
        ):
            _ = module.AUC
    for module in (clicks, rankings):
        for name in module.__all__:
            assert getattr(metrics, name) is getattr(module, name)


def test_pickles_of_earlier_versions_name_gauc_in_metrics():
    assert pickle.loads(b"crecis_lightning.metrics\nGAUC\n.") is gauc.GAUC
