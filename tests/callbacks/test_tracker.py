"""MLTrackerHook: a model's tracked values reach every logger of the Trainer, once."""

import csv

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recis_lightning.callbacks import MLTrackerHook, add_to_ml_tracker
from recis_lightning.metrics import take_tracked
from tests.helpers.quiet_trainer import quiet_trainer


class Model(L.LightningModule):
    """Tracks the number of each batch, and an array in batch 2."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        add_to_ml_tracker("twice", -1)
        add_to_ml_tracker("twice", self.weight.sum() * 0 + batch_idx)
        if batch_idx == 2:
            add_to_ml_tracker("scores", np.array([1.0, 2.0, 3.0, 6.0]))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        add_to_ml_tracker("seen", 2**24 + 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(3, 1))

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(2, 1))


class Recorder(Logger):
    """Logger that keeps the values it gets, as those of W&B and MLflow do."""

    name, version = "recorder", 0

    def __init__(self):
        super().__init__()
        self.metrics, self.params = [], []

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, {k: v for k, v in metrics.items() if k != "epoch"}))

    def log_hyperparams(self, params, *args, **kwargs):
        self.params.append(params)


def test_every_logger_gets_everything_once(tmp_path):
    recorder, table = Recorder(), CSVLogger(tmp_path)
    hook = MLTrackerHook("ctr", "deepfm", {"dim": 4})
    quiet_trainer(tmp_path, hook, logger=[recorder, table]).fit(Model())
    assert recorder.params == [{"tracker_project": "ctr", "tracker_name": "deepfm", "dim": 4}]
    scores = {"scores_mean": 3.0, "scores_std": 3.5**0.5, "scores_min": 1.0, "scores_max": 6.0}
    assert [call for call in recorder.metrics if call[1]] == [
        (0, {"twice": 0.0}),
        (1, {"twice": 1.0}),
        (2, {"twice": 2.0, **scores}),
        (2, {"seen": 2**24 + 1}),
    ]
    with open(f"{table.log_dir}/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["seen"] for row in rows if row["seen"]] == ["16777217"]
    assert [row["twice"] for row in rows if row["twice"]] == ["0.0", "1.0", "2.0"]


def test_tensorboard_gets_a_histogram(tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    quiet_trainer(tmp_path, MLTrackerHook(), logger=logger).fit(Model())
    events = EventAccumulator(logger.log_dir, {"histograms": 0})
    events.Reload()
    (histogram,) = events.Histograms("scores")
    assert (histogram.step, histogram.histogram_value.num) == (2, 4)
    assert [event.value for event in events.Scalars("twice")] == [0.0, 1.0, 2.0]


def test_a_trainer_without_loggers_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="this one has none"):
        quiet_trainer(tmp_path, MLTrackerHook()).fit(Model())


def test_what_another_run_left_is_not_of_this_one(tmp_path):
    add_to_ml_tracker("old", 1)
    recorder = Recorder()
    quiet_trainer(tmp_path, MLTrackerHook(), logger=recorder).fit(Model())
    assert not any("old" in values for _, values in recorder.metrics)


def test_arguments_are_checked():
    for arguments, words in (
        ({"project": 3}, "project: expected str or None, got 3"),
        ({"config": "x"}, "config: expected Mapping or None, got 'x'"),
    ):
        with pytest.raises(TypeError, match=words):
            MLTrackerHook(**arguments)
    for value in ("text", ["a"], {"a": 1}):
        with pytest.raises(TypeError, match="data: expected"):
            add_to_ml_tracker("x", value)
    with pytest.raises(TypeError, match="name: expected a str"):
        add_to_ml_tracker(1, 1)
    assert take_tracked() == {}
