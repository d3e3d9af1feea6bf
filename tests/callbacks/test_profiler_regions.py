"""Regions in torch's trace: none outlives the profiler that recorded it."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from lightning.pytorch.profilers import SimpleProfiler
from torch.profiler import ProfilerActivity, profile, record_function

from recis_lightning.callbacks.profiler_regions import RegionRecorder, end_open_regions

ROOT = Path(__file__).parents[2]


@pytest.fixture
def session(monkeypatch):
    """Record (region, entered or left) while a profiler runs; yield the list."""
    events = []
    enter, leave = record_function.__enter__, record_function.__exit__

    def entering(region):
        events.append((region.name, "entered"))
        return enter(region)

    def leaving(region, *args):
        events.append((region.name, "left"))
        return leave(region, *args)

    monkeypatch.setattr(record_function, "__enter__", entering)
    monkeypatch.setattr(record_function, "__exit__", leaving)
    return events


def test_closing_ends_what_is_open_and_never_again(session):
    inner = SimpleProfiler()
    recorder = RegionRecorder(inner)
    with profile(activities=[ProfilerActivity.CPU]):
        recorder.start("outer")
        recorder.start("inner")
        recorder.close()
    recorder.stop("inner")
    recorder.start("later")
    recorder.stop("later")
    recorder.stop("outer")
    assert session == [
        ("outer", "entered"),
        ("inner", "entered"),
        ("inner", "left"),
        ("outer", "left"),
    ]
    assert set(inner.recorded_durations) == {"outer", "inner", "later"}
    assert not inner.current_actions


def test_a_region_entered_before_the_recorder_is_not_left_by_it(session):
    inner = SimpleProfiler()
    inner.start("outer")
    recorder = RegionRecorder(inner)
    recorder.stop("outer")
    assert session == []
    assert not inner.current_actions


def test_regions_of_other_threads_pass_on(session):
    inner = SimpleProfiler()
    recorder = RegionRecorder(inner)
    recorder.start("same")

    def work():
        recorder.start("elsewhere")
        recorder.stop("elsewhere")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    recorder.stop("same")
    assert session == [("same", "entered"), ("same", "left")]
    assert set(inner.recorded_durations) == {"same", "elsewhere"}


def test_regions_that_others_opened_are_ended_and_may_be_left_again():
    region = record_function("theirs")
    with profile(activities=[ProfilerActivity.CPU]) as first:
        region.__enter__()
        torch.ones(2) + 1
        end_open_regions()
    with profile(activities=[ProfilerActivity.CPU]) as second:
        torch.ones(2) + 1
        region.__exit__(None, None, None)
    (event,) = [event for event in first.events() if event.name == "theirs"]
    assert event.time_range.elapsed_us() > 0
    assert "theirs" not in {event.name for event in second.events()}


SCRIPT = """
import logging, sys, warnings
import lightning as L
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.profiler import record_function
from torch.utils.data import DataLoader
from recis_lightning.callbacks import ProfilerHook

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Model(BoringModel):
    def on_train_epoch_start(self):
        self.region = record_function("epoch")
        self.region.__enter__()

    def on_train_epoch_end(self):
        self.region.__exit__(None, None, None)

    def train_dataloader(self):
        return DataLoader(torch.randn(7, 32))


for _ in range(3):
    hook = ProfilerHook(wait=0, warmup=0, active=2, repeat=0, output_dir=sys.argv[1])
    L.Trainer(
        accelerator="cpu", max_epochs=1, limit_val_batches=0, callbacks=[hook], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(Model())
    assert len(hook.trace_paths) == 4, hook.trace_paths
"""


@pytest.mark.slow
def test_windows_one_after_the_other_leave_the_heap_alone(tmp_path):
    """Regions of Lightning, and of the model, are open when each window but the first begins."""
    environment = {"MALLOC_PERTURB_": "165", "KINETO_LOG_LEVEL": "6"}
    if Path("/lib/x86_64-linux-gnu/libc_malloc_debug.so.0").exists():
        environment |= {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
