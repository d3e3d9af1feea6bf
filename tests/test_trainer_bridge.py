"""TrainerBridge: strategies that are refused, the callback that a Trainer gets, its profiler."""

import json
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from torch.utils.data import DataLoader

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.callbacks import ProfilerHook
from recis_lightning.callbacks.sharded_evaluation import ShardedEvaluation
from recis_lightning.ops import backend
from recis_lightning.optim import SparseAdam
from recis_lightning.trainer_bridge import TrainerBridge
from tests.helpers.quiet_trainer import quiet_trainer


class Model(L.LightningModule):
    """A model of one table, below a module of its own."""

    def __init__(self):
        super().__init__()
        self.tower = torch.nn.Sequential(DynamicEmbedding(2))

    def training_step(self, batch, batch_idx):
        return self.tower(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.tower(batch)

    def configure_optimizers(self):
        return SparseAdam(hash_tables(self), clip_grad_norm=1.0)

    def train_dataloader(self):
        return DataLoader(torch.arange(12), batch_size=2)

    def val_dataloader(self):
        return self.train_dataloader()


def runner_under(strategy):
    """Return what runs the lookups of a model whose Trainer has ``strategy``."""
    model = Model()
    model._trainer = SimpleNamespace(strategy=strategy, callbacks=[])
    return model, TrainerBridge().runner_of(hash_tables(model))


@pytest.mark.parametrize(
    ("kind", "attributes", "message"),
    [
        (DeepSpeedStrategy, {}, "DeepSpeedStrategy: its engine owns.*strategy='ddp'"),
        (FSDPStrategy, {}, "FSDPStrategy: .*strategy='ddp'"),
        (ModelParallelStrategy, {}, "ModelParallelStrategy: .*strategy='ddp'"),
        (DDPStrategy, {"_start_method": "spawn"}, "started by 'spawn' .ddp_spawn.*strategy='ddp'"),
    ],
)
def test_strategies_that_cannot_train_tables_are_refused(kind, attributes, message):
    """The error says what to use; nothing of ours need be a callback of the Trainer."""
    strategy = kind.__new__(kind)
    vars(strategy).update({"_root_device": None, "parallel_devices": [None], **attributes})
    strategy.__class__ = type(kind.__name__, (kind,), {"root_device": None})
    with pytest.raises(RuntimeError, match=message):
        runner_under(strategy)


def test_ddp_is_accepted():
    """As is a lookup outside Lightning."""
    TrainerBridge().runner_of(hash_tables(DynamicEmbedding(2))).join_evaluation()
    strategy = type("DDPStrategy", (DDPStrategy,), {"root_device": None})()
    runner_under(strategy)


def test_a_trainer_gets_the_callback_that_serves_other_ranks():
    """Once, however often it evaluates; the next Trainer of the model gets its own."""
    model, runner = runner_under(SimpleNamespace())
    first = model._trainer
    for trainer in (first, first, SimpleNamespace(strategy=None, callbacks=[])):
        model._trainer = trainer
        runner.join_evaluation()
        assert [type(callback) for callback in trainer.callbacks] == [ShardedEvaluation]
    model._trainer = None
    runner.join_evaluation()


TRAINING = ["find_or_insert", "sort_gradients", "gradient_norm", "row_update"]
OPS = {f"recis::{name}" for name in TRAINING}


def test_the_simple_profiler_lists_our_operations(tmp_path):
    """In each run of each Trainer, and only while it runs; nothing of ours is a callback."""
    model = Model()
    model.tower(torch.arange(2))  # in a group that is older than the Trainer
    for _ in range(2):
        profiler = SimpleProfiler(dirpath=tmp_path, filename="simple")
        trainer = quiet_trainer(tmp_path, profiler=profiler, limit_val_batches=0)
        trainer.fit(model)
        counts = {name: len(spent) for name, spent in profiler.recorded_durations.items()}
        assert counts["run_training_batch"] == 6
        assert counts.keys() >= OPS
        assert counts["recis::row_update"] == counts["recis::sort_gradients"] == 6
        assert "recis::row_update" in (tmp_path / "fit-simple.txt").read_text()
        model.tower(torch.arange(2))
        assert {name: len(spent) for name, spent in profiler.recorded_durations.items()} == counts
        assert not profiler.current_actions


def test_operations_of_an_evaluation_are_listed(tmp_path):
    model, profiler = Model(), SimpleProfiler()
    model.tower(torch.arange(8))
    quiet_trainer(tmp_path, profiler=profiler).validate(model, verbose=False)
    names = {name for name in profiler.recorded_durations if name.startswith("recis::")}
    assert names
    assert not names & {"recis::row_update", "recis::find_or_insert"}


def test_the_advanced_profiler_lists_our_operations(tmp_path):
    profiler = AdvancedProfiler(dirpath=tmp_path, filename="advanced")
    quiet_trainer(tmp_path, profiler=profiler, limit_val_batches=0).fit(Model())
    text = (tmp_path / "fit-advanced.txt").read_text()
    for name in (*OPS, "run_training_batch"):
        assert f"Profile stats for: {name}" in text


def test_the_pytorch_profiler_lists_each_operation_once(tmp_path):
    profiler = PyTorchProfiler(dirpath=tmp_path, filename="torch", row_limit=-1)
    quiet_trainer(tmp_path, profiler=profiler, limit_val_batches=0).fit(Model())
    (trace,) = tmp_path.glob("*.json")
    names = [e["name"] for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    assert set(names) >= OPS
    # Not Lightning's form of a region, which it would have if the profiler were told too.
    assert not [name for name in names if "[pl][profile]recis::" in name]
    assert [name for name in names if "[pl][profile]run_training_batch" in name]
    text = (tmp_path / "fit-torch.txt").read_text()
    assert "recis::row_update" in text


def test_a_simple_profiler_beside_the_profiler_hook_lists_each_operation_once(tmp_path):
    profiler = SimpleProfiler()
    hook = ProfilerHook(wait=1, warmup=1, active=1, repeat=1, output_dir=tmp_path)
    quiet_trainer(tmp_path, hook, profiler=profiler, limit_val_batches=0).fit(Model())
    assert len(profiler.recorded_durations["recis::row_update"]) == 6
    with open(hook.trace_paths[0]) as file:
        names = [e["name"] for e in json.load(file)["traceEvents"] if e["ph"] == "X"]
    assert names.count("recis::row_update") == 1


def test_operations_of_other_threads_are_not_listed(tmp_path):
    """Lightning's profilers know one thread: two in an operation of one name would raise."""
    other, asked = DynamicEmbedding(2).eval(), []

    class Threaded(Model):
        def training_step(self, batch, batch_idx):
            thread = threading.Thread(target=lambda: asked.append(backend.region("recis::x")))
            thread.start()
            thread.join()
            other(batch)
            return super().training_step(batch, batch_idx)

    profiler = SimpleProfiler()
    quiet_trainer(tmp_path, profiler=profiler, limit_val_batches=0).fit(Threaded())
    assert [type(region) for region in asked] == [nullcontext] * 6
    assert "recis::x" not in profiler.recorded_durations


def test_a_profiler_that_lists_nothing_is_not_asked(tmp_path):
    asked = []

    class Asking(Model):
        def training_step(self, batch, batch_idx):
            asked.append(type(backend.region("recis::x")))
            return super().training_step(batch, batch_idx)

    quiet_trainer(tmp_path, limit_val_batches=0).fit(Asking())
    assert asked == [nullcontext] * 6


def test_one_process_never_walks_the_heap(tmp_path, monkeypatch):
    """A walk takes 0.1 s and more; one was due for each new table, and for each optimizer."""

    def walk():
        raise AssertionError("the heap was walked")

    monkeypatch.setattr("recis_lightning.trainer_bridge._lightning_modules", walk)
    model, profiler = Model(), SimpleProfiler()
    model.tower(torch.arange(3))
    quiet_trainer(tmp_path, profiler=profiler, max_epochs=2).fit(model)
    assert profiler.recorded_durations.keys() >= OPS
    DynamicEmbedding(2)(torch.arange(3))


def test_the_innermost_trainer_is_told(tmp_path):
    """As where a step validates another model by a Trainer of its own."""
    inner, outer = SimpleProfiler(), SimpleProfiler()

    class Nested(Model):
        def training_step(self, batch, batch_idx):
            trainer = quiet_trainer(tmp_path, profiler=inner)
            trainer.validate(Model(), verbose=False)
            return super().training_step(batch, batch_idx)

    quiet_trainer(tmp_path, profiler=outer, max_steps=1, limit_val_batches=0).fit(Nested())
    ops = [
        {name for name in one.recorded_durations if name.startswith("recis::")}
        for one in (inner, outer)
    ]
    assert ops[0]
    assert "recis::row_update" in ops[1] - ops[0]


@pytest.mark.parametrize("made", [object, torch.nn.Module])
def test_a_model_whose_init_failed_is_passed_over(made):
    """It lives on in a traceback, as in a notebook."""

    class Failing(L.LightningModule):
        def __init__(self):
            made.__init__(self)
            raise RuntimeError("no file")

    left = Failing.__new__(Failing)
    with pytest.raises(RuntimeError, match="no file"):
        left.__init__()
    module = DynamicEmbedding(2)
    optimizer = SparseAdam(hash_tables(module))
    module(torch.arange(3)).sum().backward()
    optimizer.step()
    TrainerBridge().runner_of(hash_tables(module)).join_evaluation()
