"""ProfilerHook: number, names and content of traces, and the Trainer's profiler afterwards."""

import copy
import json
import logging
import pickle
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from torch.utils.data import DataLoader

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.callbacks import ProfilerHook
from recis_lightning.callbacks.profiler_regions import RegionRecorder
from recis_lightning.optim import SparseAdam
from tests.helpers.quiet_trainer import quiet_trainer


class Tables(pl.LightningModule):
    """Smallest model with a table."""

    def __init__(self, num_batches=16):
        super().__init__()
        self.embedding = DynamicEmbedding(4, name="x")
        self.num_batches = num_batches

    def training_step(self, batch, batch_idx):
        return self.embedding(batch).sum()

    def configure_optimizers(self):
        return SparseAdam(hash_tables(self), lr=0.1)

    def train_dataloader(self):
        return DataLoader(torch.arange(2 * self.num_batches), batch_size=2)


class Boring(BoringModel):
    def __init__(self, num_batches=16, fail_at=None):
        super().__init__()
        self.num_batches, self.fail_at = num_batches, fail_at

    def training_step(self, batch, batch_idx):
        if batch_idx == self.fail_at:
            raise RuntimeError("no more")
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        return DataLoader(torch.randn(self.num_batches, 32))


@pytest.fixture(autouse=True)
def _no_app_id(monkeypatch):
    monkeypatch.delenv("APP_ID", raising=False)


@pytest.fixture
def make_trainer(tmp_path):
    return partial(quiet_trainer, tmp_path, limit_val_batches=0)


def files(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def named(path):
    """Return the names of a trace's events."""
    events = json.loads(Path(path).read_text())["traceEvents"]
    return {event["name"] for event in events}


def test_four_traces_with_lightnings_regions_and_our_ops(make_trainer, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    hook = ProfilerHook(wait=1, warmup=2, active=1, repeat=4, output_dir=tmp_path / "a" / "b")
    trainer = make_trainer(hook)
    profiler = trainer.profiler
    trainer.fit(Tables(num_batches=20))
    expected = [
        str(tmp_path / "a" / "b" / f"local-timeline-{step}.json") for step in (4, 8, 12, 16)
    ]
    assert hook.trace_paths == expected
    assert files(tmp_path / "a" / "b") == sorted(Path(path).name for path in expected)
    for path in expected:
        names = named(path)
        assert "run_training_batch" in names
        assert "[LightningModule]Tables.on_train_batch_start" in names
        assert "[_TrainingEpochLoop].train_dataloader_next" in names
        assert {"recis::find_or_insert", "recis::row_update"} <= names
        assert any(name.startswith("ProfilerStep#") for name in names)
        assert any("training_step" in name for name in names)  # a Python stack
        assert f"Wrote the trace {path}" in caplog.messages
    assert trainer.profiler is profiler


def test_a_trace_has_shapes_memory_and_flops(make_trainer, tmp_path):
    hook = ProfilerHook(wait=0, warmup=1, active=2, repeat=1, output_dir=tmp_path)
    make_trainer(hook).fit(Boring(num_batches=3))
    events = json.loads(Path(hook.trace_paths[0]).read_text())["traceEvents"]
    assert any("Input Dims" in event.get("args", {}) for event in events)
    assert any(event["name"] == "[memory]" for event in events)
    assert sum(event.flops or 0 for event in hook.prof.events()) > 0
    assert sum(event["name"] == "run_training_batch" for event in events) == 2


@pytest.mark.parametrize(
    ("wait", "warmup", "active", "repeat", "steps"),
    [
        (0, 1, 1, 2, [2, 4]),
        (2, 1, 2, 1, [5]),
        (1, 1, 1, 0, [3, 6, 9]),
        (1, 1, 3, 9, [5, 10]),  # the second window ends with training
        (1, 8, 1, 4, [10]),
        (20, 1, 1, 4, []),
        (1, 20, 1, 4, []),
    ],
)
def test_steps_of_the_traces(make_trainer, tmp_path, wait, warmup, active, repeat, steps):
    hook = ProfilerHook(wait, warmup, active, repeat, tmp_path)
    trainer = make_trainer(hook, max_epochs=2)
    trainer.fit(Boring(num_batches=5))
    assert hook.trace_paths == [str(tmp_path / f"local-timeline-{step}.json") for step in steps]
    assert not isinstance(trainer.profiler, RegionRecorder)


def test_torch_warns_of_a_cycle_without_warmup(make_trainer, tmp_path):
    hook = ProfilerHook(wait=1, warmup=0, active=1, repeat=2, output_dir=tmp_path)
    with pytest.warns(UserWarning, match="won't be using warmup"):
        make_trainer(hook).fit(Boring(num_batches=5))
    assert [Path(path).name for path in hook.trace_paths] == [
        "local-timeline-2.json",
        "local-timeline-4.json",
    ]


def test_app_id_and_rank_name_the_trace(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("APP_ID", "job-7")
    trainer = make_trainer(ProfilerHook(0, 1, 1, 1, tmp_path))
    monkeypatch.setattr(type(trainer), "world_size", 4)
    monkeypatch.setattr(type(trainer), "global_rank", 2)
    monkeypatch.setattr(
        "lightning.pytorch.loops.training_epoch_loop.torch.distributed.is_initialized",
        lambda: False,
    )
    trainer.fit(Boring(num_batches=3))
    assert files(tmp_path) == ["job-7-timeline-2-rank2.json"]


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_a_crash_leaves_the_trace_of_an_open_window(make_trainer, tmp_path, fail_at):
    # Batch 0 warms up, batches 1 to 3 are recorded.
    hook = ProfilerHook(wait=0, warmup=1, active=3, repeat=1, output_dir=tmp_path)
    trainer = make_trainer(hook)
    profiler = trainer.profiler
    with pytest.raises(RuntimeError, match="no more"):
        trainer.fit(Boring(fail_at=fail_at))
    assert trainer.profiler is profiler
    assert files(tmp_path) == [f"local-timeline-{fail_at}.json"]
    assert "run_training_batch" in named(hook.trace_paths[0])
    make_trainer(ProfilerHook(0, 1, 1, 1, tmp_path / "next")).fit(Boring(num_batches=2))
    assert files(tmp_path / "next") == ["local-timeline-2.json"]


@pytest.mark.filterwarnings("ignore:.*skew")
def test_a_window_without_a_batch_replaces_no_trace(make_trainer, tmp_path):
    """It opens where the last one closes, and its trace would have the same name."""
    hook = ProfilerHook(wait=0, warmup=0, active=2, repeat=0, output_dir=tmp_path)
    make_trainer(hook).fit(Boring(num_batches=4))
    assert [Path(path).name for path in hook.trace_paths] == [
        "local-timeline-2.json",
        "local-timeline-4.json",
    ]
    for path in hook.trace_paths:
        assert "run_training_batch" in named(path)


def test_a_crash_outside_a_window_leaves_nothing(make_trainer, tmp_path):
    trainer = make_trainer(ProfilerHook(wait=1, warmup=2, output_dir=tmp_path / "out"))
    with pytest.raises(RuntimeError, match="no more"):
        trainer.fit(Boring(fail_at=2))
    assert not (tmp_path / "out").exists()


def test_a_trace_that_cannot_be_written_does_not_hide_the_crash(make_trainer, tmp_path, caplog):
    (tmp_path / "file").touch()
    hook = ProfilerHook(wait=0, warmup=1, active=3, output_dir=tmp_path / "file")
    trainer = make_trainer(hook)
    profiler = trainer.profiler
    with pytest.raises(RuntimeError, match="no more"):
        trainer.fit(Boring(fail_at=2))
    assert trainer.profiler is profiler
    assert "Could not finish the trace of the window that was open" in caplog.messages


def test_a_second_fit_goes_on_counting(make_trainer, tmp_path):
    hook = ProfilerHook(wait=1, warmup=1, active=1, repeat=1, output_dir=tmp_path)
    trainer = make_trainer(hook)
    trainer.fit(Boring(num_batches=5))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Boring(num_batches=5))
    assert [Path(path).name for path in hook.trace_paths] == [
        "local-timeline-3.json",
        "local-timeline-8.json",
    ]


def test_a_simple_profiler_works_beside(make_trainer, tmp_path):
    profiler = SimpleProfiler()
    hook = ProfilerHook(wait=1, warmup=1, active=2, repeat=1, output_dir=tmp_path)
    trainer = make_trainer(hook, profiler=profiler)
    trainer.fit(Boring(num_batches=6))
    assert trainer.profiler is profiler
    assert len(profiler.recorded_durations["run_training_batch"]) == 6
    assert not profiler.current_actions
    assert "run_training_batch" in named(hook.trace_paths[0])


def test_an_advanced_profiler_works_beside(make_trainer, tmp_path):
    profiler = AdvancedProfiler(dirpath=tmp_path, filename="advanced")
    hook = ProfilerHook(wait=1, warmup=1, active=2, repeat=2, output_dir=tmp_path / "out")
    make_trainer(hook, profiler=profiler).fit(Boring(num_batches=9))
    assert "run_training_batch" in (tmp_path / "fit-advanced.txt").read_text()
    assert len(hook.trace_paths) == 2
    assert all("run_training_batch" in named(path) for path in hook.trace_paths)


def test_pytorch_profiler_is_refused(make_trainer, tmp_path):
    profiler = PyTorchProfiler()
    trainer = make_trainer(ProfilerHook(output_dir=tmp_path), profiler=profiler)
    with pytest.raises(MisconfigurationException, match="remove one of them"):
        trainer.fit(Boring())
    profiler.profiler = None  # else its __del__ fails: it never recorded


def test_two_profiler_hooks_are_refused(make_trainer):
    with pytest.raises(MisconfigurationException, match="expected one ProfilerHook, got 2"):
        make_trainer(ProfilerHook(), ProfilerHook()).fit(Boring())


def test_evaluation_is_not_profiled(make_trainer, tmp_path):
    trainer = make_trainer(
        ProfilerHook(wait=0, warmup=1, active=1, output_dir=tmp_path / "out"), limit_val_batches=3
    )
    trainer.validate(Boring(), verbose=False)
    assert not (tmp_path / "out").exists()


def test_region_names_that_json_must_escape(make_trainer, tmp_path):
    class Quoting(pl.Callback):
        @property
        def state_key(self):
            return 'a "quoted" \\ name\n'

    hook = ProfilerHook(wait=0, warmup=1, active=1, repeat=1, output_dir=tmp_path)
    make_trainer(Quoting(), hook).fit(Boring(num_batches=2))
    assert any("quoted" in name for name in named(hook.trace_paths[0]))


def test_a_used_hook_can_be_copied_and_pickled(make_trainer, tmp_path):
    hook = ProfilerHook(wait=0, warmup=1, active=1, repeat=1, output_dir=tmp_path)
    make_trainer(hook).fit(Boring(num_batches=2))
    assert hook.prof is not None
    for twin in (copy.deepcopy(hook), pickle.loads(pickle.dumps(hook))):
        assert twin.trace_paths == hook.trace_paths
        assert twin.prof is None


def test_defaults():
    hook = ProfilerHook()
    assert (hook.wait, hook.warmup, hook.active, hook.repeat) == (1, 48, 1, 4)
    assert hook.output_dir == "./"
    assert hook.prof is None


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("wait", -1, ValueError, "wait: expected an int >= 0, got -1"),
        ("warmup", 1.5, TypeError, r"warmup: expected an int >= 0, got 1\.5"),
        ("active", 0, ValueError, "active: expected an int >= 1, got 0"),
        ("repeat", True, TypeError, "repeat: expected an int >= 0, got True"),
    ],
)
def test_arguments_are_checked(argument, value, error, message):
    with pytest.raises(error, match=message):
        ProfilerHook(**{argument: value})


@pytest.mark.parametrize("app_id", ["team/job\n7", "x" * 300, "ü" * 200])
def test_an_app_id_that_no_file_name_can_hold(make_trainer, tmp_path, monkeypatch, app_id):
    monkeypatch.setenv("APP_ID", app_id)
    make_trainer(ProfilerHook(0, 1, 1, 1, tmp_path)).fit(Boring(num_batches=3))
    (name,) = files(tmp_path)
    assert name.endswith("-timeline-2.json")
    assert len(name.encode()) < 200
    assert "/" not in name
    assert "\n" not in name
    monkeypatch.setenv("APP_ID", app_id[:-1] + "z")
    make_trainer(ProfilerHook(0, 1, 1, 1, tmp_path)).fit(Boring(num_batches=3))
    assert len(files(tmp_path)) == 2


def test_a_loop_written_by_hand(tmp_path):
    hook = ProfilerHook(wait=1, warmup=1, active=1, repeat=2, output_dir=tmp_path)
    hook.before_train()
    for step in range(1, 10):
        torch.ones(2) + 1
        hook.after_step(None, torch.tensor(step))
    hook.end()
    assert files(tmp_path) == ["local-timeline-3.json", "local-timeline-6.json"]
    assert all("aten::add" in named(path) for path in hook.trace_paths)


def test_a_loop_written_by_hand_ends_within_a_window(tmp_path):
    hook = ProfilerHook(wait=0, warmup=1, active=5, repeat=1, output_dir=tmp_path)
    for step in range(1, 4):
        hook.after_step(None, step)
    hook.end()
    assert files(tmp_path) == ["local-timeline-3.json"]


def test_another_profiler_of_torch_is_left_alone(make_trainer, tmp_path, caplog):
    hook = ProfilerHook(wait=0, warmup=1, active=1, repeat=1, output_dir=tmp_path / "out")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as outer:
        make_trainer(hook).fit(Boring(num_batches=3))
    assert len(outer.events()) > 100
    assert hook.trace_paths == []
    assert "Not profiled at step 0: another profiler of torch runs" in caplog.messages
