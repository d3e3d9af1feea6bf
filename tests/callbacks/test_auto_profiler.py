"""AutoProfilerHook: a trace of long runs, none where another profiler is, none that fails a run."""

import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.profilers import PyTorchProfiler, SimpleProfiler

from recis_lightning.callbacks import AutoProfilerHook, ProfilerHook, TimelineProfiler
from recis_lightning.callbacks.auto_profiler import SWITCH
from tests.callbacks.test_profiler import Boring, Tables, files, named
from tests.helpers.quiet_trainer import quiet_trainer


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.delenv("APP_ID", raising=False)
    monkeypatch.delenv(SWITCH, raising=False)


@pytest.fixture
def make_trainer(tmp_path):
    return partial(quiet_trainer, tmp_path, limit_val_batches=0)


def test_a_run_that_is_long_enough_has_one_trace(make_trainer, tmp_path):
    hook = AutoProfilerHook(wait=3)
    trainer = make_trainer(hook)
    trainer.fit(Tables(num_batches=9))
    assert hook.trace_paths == [str(tmp_path / "auto_profiler" / "local-timeline-5.json")]
    names = named(hook.trace_paths[0])
    assert {"run_training_batch", "recis::find_or_insert", "recis::row_update"} <= names
    short = AutoProfilerHook(output_dir=tmp_path / "short")
    make_trainer(short).fit(Boring(num_batches=9))
    assert short.trace_paths == []
    assert not (tmp_path / "short").exists()


@pytest.mark.parametrize("value", ["0", "off", "False"])
def test_the_environment_turns_it_off(make_trainer, tmp_path, monkeypatch, value):
    monkeypatch.setenv(SWITCH, value)
    hook = AutoProfilerHook(wait=1, output_dir=tmp_path / "out")
    make_trainer(hook).fit(Boring(num_batches=4))
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv(SWITCH, "1")
    make_trainer(hook).fit(Boring(num_batches=4))
    assert files(tmp_path / "out") == ["local-timeline-3.json"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"enabled": False}, []),
        ({"ranks": (1, 3)}, []),
        ({"ranks": [0, 2]}, ["local-timeline-3-rank2.json"]),
    ],
)
def test_only_some_ranks_profile(make_trainer, tmp_path, monkeypatch, settings, expected):
    hook = AutoProfilerHook(wait=1, output_dir=tmp_path / "out", **settings)
    trainer = make_trainer(hook)
    monkeypatch.setattr(type(trainer), "world_size", 4)
    monkeypatch.setattr(type(trainer), "global_rank", 2)
    monkeypatch.setattr(
        "lightning.pytorch.loops.training_epoch_loop.torch.distributed.is_initialized",
        lambda: False,
    )
    trainer.fit(Boring(num_batches=4))
    assert [Path(path).name for path in hook.trace_paths] == expected


def test_it_gives_way_to_profilers_that_were_asked_for(make_trainer, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    out = tmp_path / "auto"
    asked = ProfilerHook(wait=1, warmup=1, active=1, repeat=1, output_dir=tmp_path / "asked")
    auto = partial(AutoProfilerHook, wait=1, output_dir=out)
    make_trainer(auto(), asked).fit(Boring(num_batches=4))
    timeline = TimelineProfiler(1, 1, 1, 1, tmp_path / "timeline")
    make_trainer(auto(), profiler=timeline).fit(Boring(num_batches=4))
    assert len(asked.trace_paths) == len(timeline.trace_paths) == 1
    profiler = PyTorchProfiler(dirpath=tmp_path, filename="torch")
    make_trainer(auto(), profiler=profiler).fit(Boring(num_batches=9))
    assert not out.exists()
    make_trainer(auto(), profiler=SimpleProfiler()).fit(Boring(num_batches=4))
    assert files(out) == ["local-timeline-3.json"]  # SimpleProfiler works beside it
    says = [line for line in caplog.messages if "gives way" in line]
    assert says == [
        "AutoProfilerHook gives way to ProfilerHook",
        "AutoProfilerHook gives way to Trainer(profiler=TimelineProfiler)",
        "AutoProfilerHook gives way to Trainer(profiler=PyTorchProfiler)",
    ]


def test_another_profiler_of_torch_is_left_alone(make_trainer, tmp_path, caplog):
    hook = AutoProfilerHook(wait=1, output_dir=tmp_path / "out")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as outer:
        make_trainer(hook).fit(Boring(num_batches=4))
    assert len(outer.events()) > 100
    assert hook.trace_paths == []
    assert "Not profiled at step 1: another profiler of torch runs" in caplog.messages


def test_a_trace_that_cannot_be_written_fails_no_run(make_trainer, tmp_path, caplog):
    """Neither at the end of training nor by hiding a run's own exception."""
    (tmp_path / "file").touch()
    hook = AutoProfilerHook(wait=1, active=9, output_dir=tmp_path / "file")
    trainer = make_trainer(hook)
    profiler = trainer.profiler
    trainer.fit(Boring(num_batches=4))
    assert trainer.global_step == 4
    assert trainer.profiler is profiler
    assert "AutoProfilerHook could not finish its trace" in caplog.messages
    with pytest.raises(RuntimeError, match="no more"):
        make_trainer(hook).fit(Boring(fail_at=3))


def test_a_full_window_that_cannot_be_written_fails_no_run(make_trainer, tmp_path, caplog):
    (tmp_path / "file").touch()
    trainer = make_trainer(AutoProfilerHook(wait=1, output_dir=tmp_path / "file"))
    profiler = trainer.profiler
    trainer.fit(Boring(num_batches=6))
    assert trainer.global_step == 6
    assert trainer.profiler is profiler
    assert "AutoProfilerHook could not write its trace" in caplog.messages
    assert not torch._C._autograd._profiler_enabled()


def test_a_crash_leaves_the_trace_of_an_open_window(make_trainer, tmp_path):
    hook = AutoProfilerHook(wait=1, active=9, output_dir=tmp_path / "out")
    with pytest.raises(RuntimeError, match="no more"):
        make_trainer(hook).fit(Boring(fail_at=3))
    assert files(tmp_path / "out") == ["local-timeline-3.json"]


def test_yaml(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
        trainer:
          accelerator: cpu
          max_steps: 3
          default_root_dir: {tmp_path}
          logger: false
          enable_checkpointing: false
          enable_progress_bar: false
          enable_model_summary: false
          callbacks:
          - class_path: recis_lightning.callbacks.AutoProfilerHook
            init_args: {{enabled: true, ranks: [0], wait: 0, output_dir: {tmp_path}/out}}
        """
    )
    LightningCLI(
        BoringModel,
        args=["fit", "--config", str(config)],
        save_config_callback=None,
        seed_everything_default=False,
    )
    assert files(tmp_path / "out") == ["local-timeline-2.json"]


def test_defaults_are_those_of_recis():
    hook = AutoProfilerHook()
    timeline = hook._timeline
    assert (hook.enabled, hook.ranks) == (True, (0,))
    assert (timeline.wait, timeline.warmup, timeline.active, timeline.repeat) == (100, 1, 1, 1)


def test_arguments_are_checked(make_trainer):
    with pytest.raises(TypeError, match="enabled: expected a bool, got 1"):
        AutoProfilerHook(enabled=1)
    with pytest.raises(TypeError, match="ranks: expected a sequence of ints, got 0"):
        AutoProfilerHook(ranks=0)
    with pytest.raises(ValueError, match="ranks: expected an int >= 0, got -1"):
        AutoProfilerHook(ranks=[-1])
    with pytest.raises(ValueError, match="active: expected an int >= 1, got 0"):
        AutoProfilerHook(active=0)
    with pytest.raises(MisconfigurationException, match="expected one AutoProfilerHook, got 2"):
        make_trainer(AutoProfilerHook(), AutoProfilerHook()).fit(Boring())
