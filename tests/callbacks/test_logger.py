"""LoggerHook: exact lines, throughput, and values in progress bar and loggers."""

import csv
import logging
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection, SumMetric

from recis_lightning.callbacks import Hook, LoggerHook, training_clock
from recis_lightning.callbacks import logger as logger_module
from recis_lightning.metrics import GAUC, add_metric, clear_metrics
from tests.helpers.quiet_trainer import quiet_trainer


class Clock:
    """Clock that only tests advance."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Model(pl.LightningModule):
    """Has loss i + 1 in batch i (from 0); a batch takes half a second."""

    def __init__(self, clock, num_batches=4, batch_size=3):
        super().__init__()
        self.clock = clock
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.shape = (num_batches * batch_size, batch_size)

    def training_step(self, batch, batch_idx):
        self.clock.now += 0.5
        return self.weight.sum() * 0 + batch_idx + 1

    def validation_step(self, batch, batch_idx):
        self.clock.now += 100.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        rows, batch_size = self.shape
        return DataLoader(torch.zeros(rows, 1), batch_size=batch_size)

    def val_dataloader(self):
        return DataLoader(torch.zeros(2, 1))


class SlowDisk(TorchCheckpointIO):
    def __init__(self, clock):
        self.clock = clock
        self.num_saves = 0

    def save_checkpoint(self, *args, **kwargs):
        super().save_checkpoint(*args, **kwargs)
        self.clock.now += 1000.0
        self.num_saves += 1


class Recorder(Logger):
    """Logger that keeps the values it gets."""

    name, version = "recorder", 0

    def __init__(self):
        super().__init__()
        self.calls = []

    def log_metrics(self, metrics, step=None):
        self.calls.append((step, {k: v for k, v in metrics.items() if k != "epoch"}))

    def log_hyperparams(self, params, *args, **kwargs):
        pass


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(training_clock, "time", SimpleNamespace(perf_counter=clock))
    return clock


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
    """Return the lines of the hook so far."""

    def read():
        return [r.getMessage() for r in caplog.records if r.name == logger_module.__name__]

    caplog.set_level(logging.INFO)
    return read


def test_line_and_loggers(make_trainer, clock, lines):
    recorders = [Recorder(), Recorder()]
    trainer = make_trainer(LoggerHook(log_step=2), logger=recorders, log_every_n_steps=2)
    trainer.fit(Model(clock, num_batches=5))
    assert lines() == [
        "<gstep=2> <lstep=2> <qps=2.0000> <loss=2>",
        "<gstep=4> <lstep=4> <qps=2.0000> <loss=4>",
    ]
    for recorder in recorders:
        assert [call for call in recorder.calls if call[1]] == [
            (1, {"qps": 2.0, "samples_per_sec": 6.0, "loss": 2.0}),
            (3, {"qps": 2.0, "samples_per_sec": 6.0, "loss": 4.0}),
        ]
    for shown in (trainer.callback_metrics, trainer.progress_bar_metrics, trainer.logged_metrics):
        assert {k: float(v) for k, v in shown.items()} == {
            "qps": 2.0,
            "samples_per_sec": 6.0,
            "loss": 4.0,
        }


def test_everything_goes_through_self_log(make_trainer, clock):
    calls = []

    class Listening(Model):
        def log(self, name, value, **settings):
            calls.append((self.global_step, name, value, settings))
            super().log(name, value, **settings)

    add_metric("accuracy", 0.5)
    make_trainer(LoggerHook(3)).fit(Listening(clock))
    expected = {"qps": 2.0, "samples_per_sec": 6.0, "loss": 3.0, "accuracy": 0.5}
    settings = {"on_step": True, "on_epoch": False, "prog_bar": True}
    assert calls == [(3, name, value, settings) for name, value in expected.items()]
    assert {call[2].dtype for call in calls} == {torch.float64}


@pytest.mark.parametrize(
    ("log_every_n_steps", "log_step", "expected"),
    [
        (3, 3, {2: 3, 5: 1, 8: 4}),  # each window once
        (1, 3, {2: 3, 3: 3, 4: 3, 5: 1, 6: 1, 7: 1, 8: 4, 9: 4}),  # until the next
        (5, 2, {4: 4, 9: 5}),  # the newest, at the Trainer's steps
        (6, 5, {5: 5}),  # batch 6 is in another epoch than batch 5, where the window ended
        (2, 1, {1: 2, 3: 4, 5: 1, 7: 3, 9: 5}),
    ],
)
def test_a_logging_step_gets_the_newest_window(
    make_trainer, clock, tmp_path, log_every_n_steps, log_step, expected
):
    """Expected: step in the logger -> loss of the window, which is that of its last batch."""
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(
        LoggerHook(log_step), logger=logger, log_every_n_steps=log_every_n_steps, max_epochs=2
    )
    trainer.fit(Model(clock, num_batches=5))
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        windows = [row for row in csv.DictReader(file) if row["qps"]]
    assert {int(row["step"]): float(row["loss"]) for row in windows} == expected
    assert len(windows) == len(expected)
    assert {row["qps"] for row in windows} == {"2.0"}


def test_a_second_fit_does_not_log_the_windows_of_the_first(make_trainer, clock):
    hook, recorder = LoggerHook(4), Recorder()
    make_trainer(hook).fit(Model(clock))
    make_trainer(hook, logger=recorder, log_every_n_steps=1).fit(Model(clock, num_batches=3))
    assert not [call for call in recorder.calls if call[1]]


def test_evaluation_and_checkpoints_take_no_training_time(make_trainer, clock, lines, tmp_path):
    disk = SlowDisk(clock)
    trainer = make_trainer(
        LoggerHook(log_step=5),
        ModelCheckpoint(tmp_path / "a", every_n_train_steps=2, save_top_k=-1),
        ModelCheckpoint(tmp_path / "b", every_n_epochs=1, save_weights_only=True, save_top_k=-1),
        enable_checkpointing=True,
        plugins=[disk],
        limit_val_batches=2,
        val_check_interval=2,
        num_sanity_val_steps=2,
        max_epochs=3,
    )
    trainer.fit(Model(clock, num_batches=5))
    assert disk.num_saves > 6
    assert [line.split()[2] for line in lines()] == ["<qps=2.0000>"] * 3


def test_a_save_by_hand_takes_no_training_time(make_trainer, clock, lines, tmp_path):
    class Saving(Hook):
        def before_step(self, trainer, batch_idx):
            trainer.save_checkpoint(tmp_path / f"{batch_idx}.ckpt")

    make_trainer(Saving(), LoggerHook(2), plugins=[SlowDisk(clock)]).fit(Model(clock))
    assert [line.split()[2] for line in lines()] == ["<qps=2.0000>"] * 2


def test_setting_validation_up_takes_no_training_time(make_trainer, clock, lines):
    class SlowStart(Model):
        def on_validation_model_zero_grad(self):
            self.clock.now += 50.0

    make_trainer(LoggerHook(3), limit_val_batches=1, val_check_interval=1).fit(
        SlowStart(clock, num_batches=6)
    )
    assert [line.split()[2] for line in lines()] == ["<qps=2.0000>"] * 2


def test_waiting_for_data_is_training_time(make_trainer, clock, lines):
    class SlowData(Model):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            self.clock.now += 0.5
            return batch

    make_trainer(LoggerHook(2)).fit(SlowData(clock))
    assert [line.split()[2] for line in lines()] == ["<qps=1.0000>"] * 2


def test_windows_span_epochs(make_trainer, clock, lines):
    make_trainer(LoggerHook(log_step=4), max_epochs=3, limit_val_batches=1).fit(
        Model(clock, num_batches=3)
    )
    assert lines() == [
        "<gstep=4> <lstep=4> <qps=2.0000> <loss=1>",
        "<gstep=8> <lstep=8> <qps=2.0000> <loss=2>",
    ]


def test_accumulation_counts_both_steps_and_keeps_the_loss(make_trainer, clock, lines):
    make_trainer(LoggerHook(log_step=3), accumulate_grad_batches=2).fit(Model(clock, num_batches=6))
    assert lines() == [
        "<gstep=1> <lstep=3> <qps=2.0000> <loss=3>",
        "<gstep=3> <lstep=6> <qps=2.0000> <loss=6>",
    ]


def test_manual_optimization_and_a_loss_in_a_dict(make_trainer, clock, lines):
    class Manual(Model):
        def __init__(self, clock):
            super().__init__(clock)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.optimizers().step()
            return {"loss": loss, "scores": batch}

    make_trainer(LoggerHook(log_step=4)).fit(Manual(clock))
    assert lines() == ["<gstep=4> <lstep=4> <qps=2.0000> <loss=4>"]


def test_a_step_without_loss(make_trainer, clock, lines):
    class Lossless(Model):
        def __init__(self, clock):
            super().__init__(clock)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.clock.now += 0.5

    make_trainer(LoggerHook(log_step=4)).fit(Lossless(clock))
    assert lines() == ["<gstep=0> <lstep=4> <qps=2.0000>"]


def test_counts_continue_after_a_resume(make_trainer, clock, lines, tmp_path):
    path = tmp_path / "five.ckpt"
    trainer = make_trainer(LoggerHook(4), max_steps=5, max_epochs=-1)
    trainer.fit(Model(clock, num_batches=5))
    trainer.save_checkpoint(path)
    clock.now += 12345.0
    resumed = make_trainer(LoggerHook(4), max_steps=10, max_epochs=-1)
    resumed.fit(Model(clock, num_batches=5), ckpt_path=path)
    assert [line.split(" <loss")[0] for line in lines()] == [
        "<gstep=4> <lstep=4> <qps=2.0000>",
        "<gstep=8> <lstep=8> <qps=2.0000>",
    ]


def test_a_second_fit_with_a_new_trainer_starts_over(make_trainer, clock, lines):
    hook = LoggerHook(4)
    for _ in range(2):
        make_trainer(hook).fit(Model(clock, num_batches=5))
    assert [line.split()[1] for line in lines()] == ["<lstep=4>", "<lstep=4>"]


def test_registered_metrics(make_trainer, clock, lines):
    class Reporting(Model):
        def __init__(self, clock):
            super().__init__(clock, num_batches=2)
            self.mean, self.sum = MeanMetric(), SumMetric()
            self.both = MetricCollection({"mean": MeanMetric(), "sum": SumMetric()})

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            for metric in (self.mean, self.both):
                metric.update(loss)
            add_metric("accuracy", 0.95)
            add_metric("ids", 16_777_217)
            add_metric("count", torch.tensor(7))
            add_metric("weight", loss / 3)
            add_metric("mean", self.mean)
            add_metric("unused", self.sum)
            add_metric("both", self.both)
            add_metric("called", lambda: 2.5)
            add_metric("phase", "warm")
            add_metric("vector", torch.tensor([1, 2]))
            add_metric("qps", 3.0)
            return loss

    recorder = Recorder()
    trainer = make_trainer(LoggerHook(2), logger=recorder, log_every_n_steps=2)
    trainer.fit(Reporting(clock))
    assert lines() == [
        "<gstep=2> <lstep=2> <qps=2.0000> <loss=2> <accuracy=0.95> <ids=16777217> <count=7> "
        "<weight=0.666667> <mean=1.5> <both_mean=1.5> <both_sum=3> <called=2.5> <phase=warm> "
        "<vector=tensor([1, 2])>"
    ]
    step, logged = next(call for call in recorder.calls if call[1])
    assert step == 1
    assert logged == {
        "qps": 2.0,
        "samples_per_sec": 6.0,
        "loss": 2.0,
        "accuracy": 0.95,
        "ids": 16_777_217,  # not rounded to float32
        "count": 7,
        "weight": pytest.approx(2 / 3),
        "mean": 1.5,
        "both_mean": 1.5,
        "both_sum": 3.0,
        "called": 2.5,
    }
    assert trainer.callback_metrics["accuracy"] == 0.95
    assert trainer.callback_metrics["ids"] == 16_777_217


def test_a_registered_loss_takes_the_place_of_the_steps(make_trainer, clock, lines):
    add_metric("loss", 0.125)
    add_metric("auc", GAUC())  # never updated: nothing to show yet
    make_trainer(LoggerHook(4)).fit(Model(clock))
    assert lines() == ["<gstep=4> <lstep=4> <qps=2.0000> <loss=0.125>"]


def test_a_loss_that_the_module_logs_is_left_alone(make_trainer, clock, lines):
    class Logging(Model):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss + 0.5, on_step=True, on_epoch=False, prog_bar=True)
            return loss

    trainer = make_trainer(LoggerHook(4))
    trainer.fit(Logging(clock))
    assert trainer.callback_metrics["loss"] == 4.5
    assert lines() == ["<gstep=4> <lstep=4> <qps=2.0000> <loss=4>"]


def test_several_hooks_and_the_trainer_left_as_it_was(make_trainer, clock, lines, tmp_path):
    trainer = make_trainer(LoggerHook(2), LoggerHook(4), LoggerHook(3))
    trainer.fit(Model(clock))
    assert [line.split()[1] for line in lines()] == [
        "<lstep=2>",
        "<lstep=3>",
        "<lstep=4>",
        "<lstep=4>",
    ]
    assert "save_checkpoint" not in vars(trainer)


def test_a_trainers_own_save_is_given_back(make_trainer, clock):
    class Failing(Model):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("no more")

    def save(*args, **kwargs):
        pass

    trainer = make_trainer(LoggerHook(2))
    trainer.save_checkpoint = save
    with pytest.raises(RuntimeError, match="no more"):
        trainer.fit(Failing(clock))
    assert trainer.save_checkpoint is save


def test_a_clock_that_stands_still(make_trainer, monkeypatch, lines):
    monkeypatch.setattr(training_clock, "time", SimpleNamespace(perf_counter=lambda: 1.0))
    trainer = make_trainer(LoggerHook(4))
    trainer.fit(Model(Clock()))
    assert lines() == ["<gstep=4> <lstep=4> <qps=inf> <loss=4>"]
    assert trainer.callback_metrics["samples_per_sec"] == math.inf


def test_barebones_gets_the_line_only(tmp_path, clock, lines):
    trainer = pl.Trainer(
        max_steps=4,
        barebones=True,
        callbacks=[LoggerHook(4)],
        accelerator="cpu",
        default_root_dir=tmp_path,
    )
    trainer.fit(Model(clock))
    assert lines() == ["<gstep=4> <lstep=4> <qps=2.0000> <loss=4>"]


@pytest.mark.parametrize("log_step", [True, 2.0, "2", None])
def test_log_step_of_a_wrong_type(log_step):
    with pytest.raises(TypeError, match=r"log_step: expected an int >= 1, got "):
        LoggerHook(log_step)


@pytest.mark.parametrize("log_step", [0, -3])
def test_log_step_too_small(log_step):
    with pytest.raises(ValueError, match=rf"log_step: expected an int >= 1, got {log_step}"):
        LoggerHook(log_step)


def test_no_samples_per_sec_for_batches_of_unknown_size(make_trainer, clock):
    class Opaque(Model):
        def train_dataloader(self):
            return DataLoader(range(4), batch_size=None)

    trainer = make_trainer(LoggerHook(4))
    trainer.fit(Opaque(clock))
    assert "qps" in trainer.callback_metrics
    assert "samples_per_sec" not in trainer.callback_metrics


def test_lines_do_not_tear_a_live_bar(make_trainer, clock, monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # without pytest's own
    bar = TQDMProgressBar()
    make_trainer(LoggerHook(2), bar, enable_progress_bar=True).fit(Model(clock))
    captured = capsys.readouterr()
    assert "<gstep=2> <lstep=2> <qps=2.0000> <loss=2>\n" in captured.err
    # tqdm wipes its bar from the line before the line is printed, and draws it again after.
    assert "qps=2.000" in captured.out + captured.err


def test_a_loop_written_by_hand(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    now = [100.0]
    monkeypatch.setattr(training_clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    add_metric("auc", torch.tensor(0.5))
    hook = LoggerHook(log_step=3)
    try:
        for step in range(11, 18):
            now[0] += 0.5
            hook.after_step({"loss": torch.tensor(float(step))}, torch.tensor(step))
    finally:
        clear_metrics()
    assert [r.getMessage() for r in caplog.records if r.name == logger_module.__name__] == [
        "<gstep=13> <lstep=3> <qps=2.0000> <loss=13> <auc=0.5>",
        "<gstep=16> <lstep=6> <qps=2.0000> <loss=16> <auc=0.5>",
    ]
    with pytest.raises(TypeError, match="metrics: expected a dict or None, got int"):
        hook.after_step(3, 18)


def test_several_ranks_log_the_mean_of_their_losses():
    other = torch.tensor([4.0, 0.5, 1.0], dtype=torch.float64)
    strategy = SimpleNamespace(
        root_device=torch.device("cpu"), reduce=lambda own, reduce_op: own + other
    )
    trainer = SimpleNamespace(world_size=2, strategy=strategy)
    samples, loss = logger_module._over_ranks(trainer, 3.0, torch.tensor([1.5]))
    assert (samples.item(), loss.item()) == (7.0, 1.0)
    assert logger_module._over_ranks(trainer, 3.0, None)[1] is None
    other[1:] = 0  # the other rank has none
    assert logger_module._over_ranks(trainer, 3.0, torch.tensor([1.5]))[1].item() == 1.5
