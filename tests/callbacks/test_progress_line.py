"""Values of windows, and those that a thread computes while training goes on."""

import copy
import logging
import threading
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader
from torchmetrics import CatMetric

from recis_lightning.callbacks import LoggerHook
from recis_lightning.callbacks import logger as logger_module
from recis_lightning.metrics import GAUC, add_metric, clear_metrics
from recis_lightning.metrics.background import BackgroundMetrics
from tests.helpers.quiet_trainer import quiet_trainer


class Waiting(CatMetric):
    """Metric that has the sum of what it kept, once it is let through."""

    def __init__(self):
        super().__init__()
        self.gate, self.threads = threading.Event(), []

    def compute(self):
        self.threads.append(threading.current_thread())
        assert self.gate.wait(60)
        return sum(part.sum() for part in self.value)


class Model(pl.LightningModule):
    """Keeps batch_idx + 1 of each batch, and lets the thread through in one of them."""

    def __init__(self, num_batches=6, open_at=0, fail_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.metric = Waiting()
        self.num_batches, self.open_at, self.fail_at = num_batches, open_at, fail_at

    def training_step(self, batch, batch_idx):
        if batch_idx == self.open_at:
            self.metric.gate.set()
        if batch_idx == self.fail_at:
            raise RuntimeError("no more")
        self.metric.update(batch_idx + 1.0)
        add_metric("kept", self.metric)
        add_metric("constant", 0.5)
        return self.weight.sum() * 0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(torch.zeros(self.num_batches, 1))

    def val_dataloader(self):
        return DataLoader(torch.zeros(1, 1))


class Recorder(Logger):
    """Logger that keeps the numbers named "kept" and "constant"."""

    name, version = "recorder", 0

    def __init__(self):
        super().__init__()
        self.calls = []

    def log_metrics(self, metrics, step=None):
        self.calls += [(step, k, v) for k, v in metrics.items() if k in ("kept", "constant")]

    def log_hyperparams(self, params, *args, **kwargs):
        pass


class Reading(pl.Callback):
    """Callback that keeps what it finds in ``callback_metrics``."""

    def __init__(self):
        self.found = []

    def look(self, when, trainer):
        value = trainer.callback_metrics.get("kept")
        self.found.append((when, None if value is None else float(value)))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.look(batch_idx, trainer)

    def on_train_epoch_end(self, trainer, pl_module):
        self.look("epoch", trainer)

    def on_validation_end(self, trainer, pl_module):
        self.look("validation", trainer)


@pytest.fixture(autouse=True)
def _empty_registry():
    clear_metrics()
    yield
    clear_metrics()


@pytest.fixture
def make_trainer(tmp_path):
    return partial(quiet_trainer, tmp_path, limit_val_batches=0)


@pytest.fixture
def lines(caplog):
    """Return the lines so far, from the first value on."""

    def read():
        messages = [r.getMessage() for r in caplog.records if r.name == logger_module.__name__]
        return [line.split()[0] + line[line.index(" <loss=") :] for line in messages]

    caplog.set_level(logging.INFO)
    return read


def test_training_goes_on_and_values_keep_their_step(make_trainer, lines):
    """The first window's thread ends in the batch after; callbacks read it with the next window."""
    model, recorder, reading = Model(open_at=2), Recorder(), Reading()
    trainer = make_trainer(LoggerHook(2), reading, logger=recorder, log_every_n_steps=2)
    trainer.fit(model)
    assert lines() == [
        "<gstep=2> <loss=0> <kept=3> <constant=0.5>",
        "<gstep=4> <loss=0> <kept=10> <constant=0.5>",
        "<gstep=6> <loss=0> <kept=21> <constant=0.5>",
    ]
    assert threading.main_thread() not in model.metric.threads
    assert [call for call in recorder.calls if call[1] == "kept"] == [
        (1, "kept", 3),
        (3, "kept", 10),
        (5, "kept", 21),
    ]
    assert [step for step, name, _ in recorder.calls if name == "constant"] == [1, 3, 5]
    assert reading.found == [
        *((0, None), (1, None), (2, None), (3, 3), (4, 3)),
        *((5, 21), ("epoch", 21)),  # the last batch waits
    ]
    for shown in (trainer.callback_metrics, trainer.progress_bar_metrics, trainer.logged_metrics):
        assert shown["kept"] == 21
        assert shown["constant"] == 0.5


@pytest.mark.parametrize("log_every_n_steps", [1, 3])
def test_each_window_is_written_once(make_trainer, log_every_n_steps):
    recorder = Recorder()
    make_trainer(LoggerHook(2), logger=recorder, log_every_n_steps=log_every_n_steps).fit(Model(5))
    assert [call for call in recorder.calls if call[1] == "kept"] == [
        (1, "kept", 3),
        (3, "kept", 10),
    ]


def test_validation_and_an_early_end_find_the_newest_values(make_trainer, lines):
    """Neither a validation nor the end by max_steps comes at the last batch of an epoch."""
    reading = Reading()
    make_trainer(
        reading, LoggerHook(2), limit_val_batches=1, val_check_interval=4, max_steps=6
    ).fit(Model(9))
    assert ("validation", 10.0) in reading.found
    assert lines()[-1] == "<gstep=6> <loss=0> <kept=21> <constant=0.5>"
    reading.found.clear()
    trainer = make_trainer(reading, LoggerHook(2), max_steps=4)
    trainer.fit(Model(9))
    assert trainer.callback_metrics["kept"] == 10


def test_an_error_of_a_metric_ends_training(make_trainer):
    class Wrong(Model):
        def __init__(self):
            super().__init__()
            self.gauc = GAUC()

        def training_step(self, batch, batch_idx):
            self.gauc.update(torch.rand(2), torch.tensor([0, 2]), torch.tensor([1, 1]))
            add_metric("gauc", self.gauc)
            return self.weight.sum() * 0

    with pytest.raises(ValueError, match="target: expected 0 or 1 everywhere"):
        make_trainer(LoggerHook(2)).fit(Wrong())


def test_a_run_that_fails_prints_what_it_had(make_trainer, lines):
    with pytest.raises(RuntimeError, match="no more"):
        make_trainer(LoggerHook(2)).fit(Model(fail_at=2))
    assert lines() == ["<gstep=2> <loss=0> <kept=3> <constant=0.5>"]


def test_a_name_may_change_its_kind(make_trainer, lines):
    class Changing(Model):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx >= 2:
                add_metric("kept", 7.0)
            return loss

    trainer = make_trainer(LoggerHook(1), logger=Recorder(), log_every_n_steps=1)
    trainer.fit(Changing(4))
    assert trainer.callback_metrics["kept"] == 7
    assert [line.split()[2] for line in lines()] == [
        *("<kept=1>", "<kept=3>", "<kept=7>", "<kept=7>"),
    ]


def test_a_hook_with_a_thread_can_be_copied():
    hook = LoggerHook(2)
    metric = Waiting()
    metric.update(1.0)
    background = BackgroundMetrics({"kept": metric})
    hook._waiting = background
    assert copy.deepcopy(hook)._waiting is None
    assert hook._waiting is background
    metric.gate.set()
