"""log_values and to_host: exact numbers for metrics and loggers."""

import math

import pytest
import torch

from recis_lightning.callbacks.log_values import TensorCache, log_values, to_host
from tests.helpers.quiet_trainer import quiet_trainer


def test_a_number_that_stays_keeps_its_tensor(tmp_path):
    """Logged numbers are exact, and are set again after the Trainer's metrics were cleared."""
    trainer, cache = quiet_trainer(tmp_path), TensorCache()
    nan = math.nan
    for values in ({"a": 1, "b": 2.5, "c": nan}, {"a": 1, "b": 2**53 - 1, "c": nan}, {"b": 3.0}):
        before = dict(trainer.callback_metrics)
        trainer.callback_metrics.clear()
        log_values(trainer, values, exact=True, cache=cache)
        found = {name: value.item() for name, value in trainer.callback_metrics.items()}
        assert found == pytest.approx(values, rel=0, abs=0, nan_ok=True)
        if "a" in before and "a" in found:
            assert trainer.callback_metrics["a"] is before["a"]
            assert before["b"].item() == 2.5


def test_one_element_tensors_come_to_the_host_as_numbers():
    """Ints stay ints, and values other than tensors of one element are returned unchanged."""
    many = torch.arange(3)
    values = {"a": torch.tensor(0.5), "b": torch.tensor([2**40 + 1]), "c": many, "d": "text"}
    found = to_host(values, torch.device("cpu"))
    assert found == {"a": 0.5, "b": 2**40 + 1, "c": many, "d": "text"}
    assert isinstance(found["b"], int)
