"""Phases of a step, each of which takes a time of its own on a clock that only tests move."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler
from torch.optim import optimizer

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.callbacks import (
    AutoProfilerHook,
    MetricReportHook,
    ProfilerHook,
    TimelineProfiler,
)
from recis_lightning.lookup import group
from recis_lightning.monitoring import phases as phases_module
from recis_lightning.monitoring.phases import PHASES
from recis_lightning.ops import backend
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer, table_updater
from tests.helpers.quiet_trainer import quiet_trainer

# Milliseconds of each phase in a batch, sums of different powers of two: none hides in another.
SPENT = {
    "data": 1.0,
    "lookup": 2.0,
    "exchange": 4.0,
    "dense_forward": 8.0,
    "backward": 16.0,
    "dense_step": 32.0,
    "table_step": 64.0,
    "hooks": 128.0,
    "other": 256.0,
}


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now

    def spend(self, phase):
        self.now += SPENT[phase] / 1000


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, clock):
        ctx.clock = clock
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock.spend("backward")
        return gradient, None


class SGD(torch.optim.SGD):
    def __init__(self, parameters, clock):
        self.clock = clock
        super().__init__(parameters, lr=0.1)

    def step(self, closure=None):
        loss = super().step(closure)
        self.clock.spend("dense_step")
        return loss


class Batches(torch.utils.data.Dataset):
    def __init__(self, clock, size):
        self.clock, self.size = clock, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.clock.spend("data")
        return torch.tensor([index, index, index + 1])


class Spending(L.Callback):
    """Callback that spends its time in two of Lightning's methods."""

    def __init__(self, clock):
        self.clock = clock

    def on_before_backward(self, *args):
        self.clock.now += SPENT["hooks"] / 4000

    def on_train_batch_end(self, *args):
        self.clock.now += 3 * SPENT["hooks"] / 4000


class Model(L.LightningModule):
    def __init__(self, clock, size=6, manual=False):
        super().__init__()
        self.embedding = DynamicEmbedding(2, name="t")
        self.tower = torch.nn.Linear(2, 1)
        self.clock, self.size = clock, size
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        rows = self.embedding(batch)
        self.clock.spend("dense_forward")
        loss = Backward.apply(self.tower(rows), self.clock).sum()
        if not self.automatic_optimization:
            optimizers = self.optimizers()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.trainer.strategy.spend()
        return loss

    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step()
        self.clock.spend("other")

    def validation_step(self, batch, batch_idx):
        self.clock.now += 50.0
        self.embedding(batch.long().view(-1))

    def configure_optimizers(self):
        dense = SGD(self.tower.parameters(), self.clock)
        sparse = SparseAdam(hash_tables(self), lr=0.1)
        if not self.automatic_optimization:
            return [dense, sparse]
        joined = SparseDenseOptimizer(dense, sparse)
        scheduler = torch.optim.lr_scheduler.ConstantLR(joined)
        return [joined], [{"scheduler": scheduler, "interval": "step"}]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(Batches(self.clock, self.size), batch_size=None)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(2, 1))


@pytest.fixture
def clock(monkeypatch):
    """Move the clock in lookups, exchanges within them, and steps of tables."""
    clock = Clock()
    monkeypatch.setattr(phases_module, "time", SimpleNamespace(perf_counter=clock))
    run_lookups, step = group._run_lookups, table_updater.TableUpdater.step

    def looking_up(*args, **kwargs):
        clock.spend("lookup")
        with backend.region("recis::all_to_all", lambda: 24):
            clock.spend("exchange")
        return run_lookups(*args, **kwargs)

    def stepping(*args, **kwargs):
        clock.spend("table_step")
        return step(*args, **kwargs)

    monkeypatch.setattr(group, "_run_lookups", looking_up)
    monkeypatch.setattr(table_updater.TableUpdater, "step", stepping)
    return clock


def fit(path, model, *callbacks, interval=2, **kwargs):
    hook = MetricReportHook(interval, phases=True)
    trainer = quiet_trainer(path, hook, *callbacks, **{"limit_val_batches": 0, **kwargs})
    trainer.fit(model)
    return hook.history, trainer


def phases_of(history, point=0):
    return {phase: history.column(f"step/{phase}_ms")[point] for phase in PHASES}


def test_each_moment_counts_to_one_phase_and_all_add_up(tmp_path, clock):
    callbacks = [Spending(clock)]
    history, trainer = fit(tmp_path, Model(clock), *callbacks)
    assert history.steps == [2, 4, 6]
    for point in range(3):
        assert phases_of(history, point) == pytest.approx(SPENT)
        assert history.column("step/total_ms")[point] == pytest.approx(sum(SPENT.values()))
    assert history.column("step/exchanged_bytes") == [24] * 3
    assert isinstance(trainer.profiler, PassThroughProfiler)


def test_accumulated_gradients_make_one_step_of_several_batches(tmp_path, clock):
    history, _ = fit(
        tmp_path, Model(clock, size=9), Spending(clock), interval=4, accumulate_grad_batches=2
    )
    found = phases_of(history)
    half = {"dense_step": 16.0, "table_step": 32.0, "other": 128.0}
    assert found == pytest.approx({**SPENT, **half})
    assert history.column("step/total_ms")[0] == pytest.approx(sum(found.values()))


def test_manual_optimization_with_several_optimizers(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(
        L.pytorch.strategies.SingleDeviceStrategy, "spend", lambda self: None, raising=False
    )
    history, _ = fit(tmp_path, Model(clock, manual=True), Spending(clock))
    assert phases_of(history) == pytest.approx({**SPENT, "other": 0.0})


def test_validation_and_checkpoints_are_left_out(tmp_path, clock, monkeypatch):
    class Slow(ModelCheckpoint):
        def on_train_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    save = L.Trainer.save_checkpoint

    def saving(*args, **kwargs):
        clock.now += 30.0
        save(*args, **kwargs)

    monkeypatch.setattr(L.Trainer, "save_checkpoint", saving)
    history, _ = fit(
        tmp_path,
        Model(clock),
        Spending(clock),
        Slow(),
        limit_val_batches=2,
        val_check_interval=1,
        enable_checkpointing=True,
    )
    assert history.steps[:2] == [1, 2]  # the first is one of validation alone
    assert phases_of(history, 1) == pytest.approx(SPENT)


def test_an_epochs_end_is_left_out(tmp_path, clock):
    class Late(L.Callback):
        def on_train_epoch_end(self, *args):
            clock.now += 20.0

    history, _ = fit(tmp_path, Model(clock, size=3), Spending(clock), Late(), max_epochs=2)
    assert history.steps == [2, 4, 6]
    assert phases_of(history, 1) == pytest.approx(SPENT)


def test_every_batch_may_be_reported(tmp_path, clock):
    history, _ = fit(tmp_path, Model(clock), Spending(clock), interval=1)
    assert len(history) == 6
    totals = history.column("step/total_ms")
    assert totals[0] != totals[0]  # its operations were counted
    assert phases_of(history, 2) == pytest.approx(SPENT)


@pytest.mark.parametrize(
    "others",
    [
        lambda path: ([ProfilerHook(0, 1, 1, 2, path / "a")], None),
        lambda path: ([AutoProfilerHook(wait=1, output_dir=path / "b")], None),
        lambda path: ([], TimelineProfiler(0, 1, 1, 2, path / "c")),
        lambda path: ([], SimpleProfiler()),
    ],
)
def test_beside_profilers(tmp_path, clock, others):
    callbacks, profiler = others(tmp_path)
    history, trainer = fit(tmp_path, Model(clock), *callbacks, Spending(clock), profiler=profiler)
    assert phases_of(history)["table_step"] == pytest.approx(SPENT["table_step"])
    assert trainer.profiler is profiler or profiler is None
    assert not backend._meters
    for found in [*callbacks, profiler]:
        if hasattr(found, "trace_paths"):
            assert found.trace_paths
    if isinstance(profiler, SimpleProfiler):
        assert len(profiler.recorded_durations["run_training_batch"]) == 6


def test_a_failing_run_leaves_nothing_behind(tmp_path, clock):
    model = Model(clock)

    class Failing(L.Callback):
        def on_after_backward(self, trainer, *args):
            if trainer.global_step == 1:
                raise RuntimeError("stop")

    profiler = SimpleProfiler()
    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, model, Failing(), profiler=profiler)
    assert model.trainer.profiler is profiler
    assert not backend._meters
    assert not optimizer._global_optimizer_pre_hooks
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_measuring_changes_no_weight(tmp_path):
    results = []
    for kwargs in ({}, {"phases": True}):
        torch.manual_seed(0)
        model = Model(Clock())
        hook = MetricReportHook(2, **kwargs)
        quiet_trainer(tmp_path, hook, limit_val_batches=0).fit(model)
        (table,) = hash_tables(model)
        results.append([table.embeddings(torch.arange(9)), model.tower.weight.detach()])
    assert all(map(torch.equal, *results))
