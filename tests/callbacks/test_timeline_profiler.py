"""TimelineProfiler: the traces of ProfilerHook, as a profiler of Lightning's Trainer."""

import copy
import json
import pickle
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.callbacks import ProfilerHook, TimelineProfiler
from recis_lightning.optim import SparseAdam
from tests.helpers.quiet_trainer import quiet_trainer


class Tables(pl.LightningModule):
    """Model of one table, whose step ``fail_at`` or validation fails."""

    def __init__(self, num_batches=10, fail_at=None, fail_in_validation=False):
        super().__init__()
        self.embedding = DynamicEmbedding(4, name="x")
        self.num_batches, self.fail_at = num_batches, fail_at
        self.fail_in_validation = fail_in_validation

    def training_step(self, batch, batch_idx):
        if batch_idx == self.fail_at:
            raise RuntimeError("no more")
        return self.embedding(batch).sum()

    def validation_step(self, batch, batch_idx):
        if self.fail_in_validation:
            raise RuntimeError("no more")

    def configure_optimizers(self):
        return SparseAdam(hash_tables(self), lr=0.1)

    def train_dataloader(self):
        return DataLoader(torch.arange(2 * self.num_batches), batch_size=2)

    def val_dataloader(self):
        return self.train_dataloader()


@pytest.fixture(autouse=True)
def _no_app_id(monkeypatch):
    monkeypatch.delenv("APP_ID", raising=False)


@pytest.fixture
def make_trainer(tmp_path):
    return partial(quiet_trainer, tmp_path, limit_val_batches=0)


def named(path):
    events = json.loads(Path(path).read_text())["traceEvents"]
    return [event["name"] for event in events if event["ph"] == "X"]


def steps(profiler):
    return [Path(path).stem for path in profiler.trace_paths]


def test_traces_have_our_operations_and_lightnings_regions(make_trainer, tmp_path):
    profiler = TimelineProfiler(1, 1, 2, 2, tmp_path / "a" / "b")
    make_trainer(profiler=profiler).fit(Tables())
    assert steps(profiler) == ["local-timeline-4", "local-timeline-8"]
    for path in profiler.trace_paths:
        names = named(path)
        assert names.count("run_training_batch") == 2
        assert names.count("recis::row_update") == names.count("recis::find_or_insert") == 2
        assert "[_TrainingEpochLoop].train_dataloader_next" in names
        assert "[LightningModule]Tables.on_train_batch_start" in names


@pytest.mark.parametrize(
    ("wait", "warmup", "active", "repeat"),
    [(0, 1, 1, 2), (2, 1, 2, 1), (1, 1, 1, 0), (1, 1, 3, 9), (1, 8, 1, 4), (20, 1, 1, 4)],
)
@pytest.mark.slow_except(dict(wait=[2, 20]), dict(repeat=0))
def test_the_steps_are_those_of_the_hook(make_trainer, tmp_path, wait, warmup, active, repeat):
    cycle = (wait, warmup, active, repeat)
    profiler, hook = TimelineProfiler(*cycle, tmp_path / "a"), ProfilerHook(*cycle, tmp_path / "b")
    make_trainer(profiler=profiler, max_epochs=2).fit(Tables(num_batches=5))
    make_trainer(hook, max_epochs=2).fit(Tables(num_batches=5))
    assert steps(profiler) == steps(hook)
    assert len(steps(hook)) == (0 if wait == 20 else len(steps(profiler)))
    for ours, theirs in zip(profiler.trace_paths, hook.trace_paths, strict=True):
        counts = [named(path).count("recis::row_update") for path in (ours, theirs)]
        assert counts[0] == counts[1] > 0


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_counting_goes_on_after_a_resume(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=5, max_epochs=-1)
    trainer.fit(Tables())
    trainer.save_checkpoint(tmp_path / "five.ckpt")
    profiler = TimelineProfiler(1, 1, 1, 1, tmp_path)
    make_trainer(profiler=profiler, max_steps=10, max_epochs=-1).fit(
        Tables(), ckpt_path=tmp_path / "five.ckpt"
    )
    assert steps(profiler) == ["local-timeline-8"]


@pytest.mark.parametrize("callbacks", [[], [Timer()]])
def test_a_crash_leaves_the_trace_of_an_open_window(make_trainer, tmp_path, callbacks):
    """With a callback, whose ``on_exception`` Lightning calls, and without."""
    profiler = TimelineProfiler(0, 1, 5, 1, tmp_path)
    try:
        raise KeyError("being handled all the while")
    except KeyError:
        with pytest.raises(RuntimeError, match="no more"):
            make_trainer(*callbacks, profiler=profiler).fit(Tables(fail_at=3))
    assert steps(profiler) == ["local-timeline-3"]
    assert named(profiler.trace_paths[0]).count("recis::row_update") == 2
    after = TimelineProfiler(0, 1, 1, 1, tmp_path / "next")
    make_trainer(profiler=after).fit(Tables(num_batches=2))
    assert steps(after) == ["local-timeline-2"]


def test_a_crash_in_validation_leaves_the_trace_of_an_open_window(make_trainer, tmp_path):
    profiler = TimelineProfiler(0, 1, 5, 1, tmp_path)
    trainer = make_trainer(
        Timer(),
        profiler=profiler,
        limit_val_batches=1,
        val_check_interval=3,
        num_sanity_val_steps=0,
    )
    with pytest.raises(RuntimeError, match="no more"):
        trainer.fit(Tables(fail_in_validation=True))
    assert steps(profiler) == ["local-timeline-3"]


def test_an_exception_that_is_being_handled_ends_no_window(make_trainer, tmp_path):
    profiler = TimelineProfiler(0, 1, 2, 1, tmp_path)
    try:
        raise KeyError("what fit is called to answer")
    except KeyError:
        make_trainer(profiler=profiler).fit(Tables())
    assert steps(profiler) == ["local-timeline-3"]


def test_a_trace_that_cannot_be_written_does_not_hide_the_crash(make_trainer, tmp_path, caplog):
    (tmp_path / "file").touch()
    profiler = TimelineProfiler(0, 1, 3, 1, tmp_path / "file")
    with pytest.raises(RuntimeError, match="no more"):
        make_trainer(Timer(), profiler=profiler).fit(Tables(fail_at=2))
    assert "Could not finish the trace of the window that was open" in caplog.messages


def test_the_report_lists_the_traces(make_trainer, tmp_path):
    profiler = TimelineProfiler(0, 1, 1, 2, tmp_path)
    assert profiler.summary() == ""
    make_trainer(profiler=profiler).fit(Tables())
    assert profiler.summary().splitlines() == ["Traces:", *profiler.trace_paths]


def test_evaluation_is_not_profiled(make_trainer, tmp_path):
    profiler = TimelineProfiler(0, 1, 1, 0, tmp_path / "out")
    make_trainer(profiler=profiler, limit_val_batches=3).validate(Tables(), verbose=False)
    assert not (tmp_path / "out").exists()


def test_manual_optimization_counts_batches_not_steps(make_trainer, tmp_path):
    class Manual(Tables):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            for _ in range(2):
                self.manual_backward(self.embedding(batch).sum())
                optimizer.step()

    profiler = TimelineProfiler(1, 1, 1, 1, tmp_path)
    make_trainer(profiler=profiler).fit(Manual())
    assert steps(profiler) == ["local-timeline-3"]
    assert named(profiler.trace_paths[0]).count("recis::row_update") == 2


def test_it_is_refused_beside_the_hook(make_trainer, tmp_path):
    trainer = make_trainer(ProfilerHook(), profiler=TimelineProfiler(output_dir=tmp_path))
    with pytest.raises(MisconfigurationException, match=r"profiler=TimelineProfiler.*remove one"):
        trainer.fit(Tables())


def test_a_used_profiler_can_be_copied_and_pickled(make_trainer, tmp_path):
    profiler = TimelineProfiler(0, 1, 1, 1, tmp_path)
    make_trainer(profiler=profiler).fit(Tables(num_batches=3))
    assert profiler.prof is not None
    for twin in (copy.deepcopy(profiler), pickle.loads(pickle.dumps(profiler))):
        assert twin.trace_paths == profiler.trace_paths
        assert twin.prof is None


def test_yaml(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
        trainer:
          accelerator: cpu
          max_steps: 3
          logger: false
          enable_checkpointing: false
          enable_progress_bar: false
          enable_model_summary: false
          profiler:
            class_path: recis_lightning.callbacks.TimelineProfiler
            init_args: {{wait: 0, warmup: 1, active: 1, repeat: 1, output_dir: {tmp_path}}}
        """
    )
    cli = LightningCLI(
        BoringModel,
        args=["fit", "--config", str(config)],
        save_config_callback=None,
        seed_everything_default=False,
    )
    assert steps(cli.trainer.profiler) == ["local-timeline-2"]


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [("wait", -1, ValueError), ("active", 0, ValueError), ("repeat", 1.5, TypeError)],
)
def test_arguments_are_checked(argument, value, error):
    with pytest.raises(error, match=f"{argument}: expected an int >= "):
        TimelineProfiler(**{argument: value})
