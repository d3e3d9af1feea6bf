"""Overhead of the hooks for a step of the demo, outside the profiler's active window.

Measures: ``recis_lightning.callbacks``, ``recis_lightning.monitoring.watch``,
``recis_lightning.table.scan``, ``recis_lightning.ops.distinct_rows``.

The time of the demo's step (DeepFM on MovieLens-100k) varies by more than the hooks' overhead. The
overhead is therefore measured with a model that only looks up the demo's batches in the demo's
tables, and then compared with the demo's step, in one process. Each round runs one short fit per
variant, and rotates their order. The overhead includes the hooks' own work, Lightning's calls of
them, and Lightning's handling of the values they log. Time is measured over blocks of 50 steps, so
that each block contains one report of ``LoggerHook`` and one filtering; the first block of a fit is
dropped. ``ProfilerHook`` stays in its warm-up: torch's profiler is on, but its active window is
not. Evictions find no row to evict, because inserting rows again is not a cost of a hook.

``MetricReportHook`` does all its work in one step of its interval. Each of its calls is timed, with
gradients in which it counts unique ids. The overhead per step is the median report divided by the
interval, plus the median call that only counts, plus Lightning's call of a callback.

A JSON line is appended to ``results/bench_hooks.jsonl``.

    python benchmarks/bench_hooks.py [--rounds N]
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.call import _call_callback_hooks
from torch.utils.data import DataLoader

from benchmarks.harness import append_result
from examples.deepfm.batch import Batch
from examples.deepfm.model import DeepFM
from examples.deepfm.train import movielens_data, movielens_model
from recis_lightning import hash_tables
from recis_lightning.callbacks import (
    HashTableFilterHook,
    LoggerHook,
    MetricReportHook,
    ProfilerHook,
)
from recis_lightning.eviction import GlobalStepFilter

BLOCK = 50  # steps; equals the demo's intervals
DEMO_BLOCKS, BARE_BLOCKS = 4, 13  # per fit; the first one is dropped
LIMIT, REPORT_LIMIT = 0.02, 0.01
SHAPE = {"model": "DeepFM of the demo", "batch_size": 256, "interval": BLOCK}


class LookUp(L.LightningModule):
    """Module that looks up the demo's batches in the demo's tables, and trains nothing."""

    def __init__(self, demo: DeepFM) -> None:
        super().__init__()
        self.engine = demo.engine
        for table in hash_tables(self):
            if table.eviction is not None:
                table.eviction = GlobalStepFilter(filter_step=10**9)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        with torch.no_grad():
            self.engine(batch["features"])
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Blocks(L.Callback):
    """Callback that times blocks of steps, from the start of a step to that of another."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step % BLOCK == 0:
            self.starts.append(time.perf_counter())

    def step_ms(self) -> float:
        return median(1e3 * (end - start) / BLOCK for start, end in pairwise(self.starts[1:]))


def filter_hook(folder: Path) -> HashTableFilterHook:
    return HashTableFilterHook(filter_interval=BLOCK)


def logger_hook(folder: Path) -> LoggerHook:
    return LoggerHook(log_step=BLOCK)


def profiler_hook(folder: Path) -> ProfilerHook:
    return ProfilerHook(wait=0, warmup=10**6, output_dir=folder / "timeline")


VARIANTS: dict[str, list[Callable[[Path], L.Callback]]] = {
    "none": [],
    "HashTableFilterHook": [filter_hook],
    "LoggerHook": [logger_hook],
    "ProfilerHook": [profiler_hook],
    "all three": [filter_hook, logger_hook, profiler_hook],
}


def fit(
    model: L.LightningModule, variant: str, num_blocks: int, batches: list[Batch], folder: Path
) -> float:
    """Train for a few blocks; return the milliseconds per step."""
    blocks = Blocks()
    hooks = [make(folder) for make in VARIANTS[variant]]
    before = [table.step for table in hash_tables(model)]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=num_blocks * BLOCK + 1,
        limit_val_batches=0,
        logger=CSVLogger(folder),
        callbacks=[blocks, *hooks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(batches, batch_size=None))
    # The figure is valid only if the hooks did their work.
    num_steps = trainer.global_step if filter_hook in VARIANTS[variant] else 0
    assert [table.step for table in hash_tables(model)] == [step + num_steps for step in before]
    assert ("qps" in trainer.callback_metrics) == (logger_hook in VARIANTS[variant])
    assert not (folder / "timeline").exists()
    return blocks.step_ms()


class Timed(MetricReportHook):
    """``MetricReportHook`` that times its calls in us: reports, other batches, unique counts."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: list[float] = []
        self.others: list[float] = []
        self.unique_counts: list[float] = []

    def on_after_backward(self, *args: Any) -> None:
        start = time.perf_counter()
        super().on_after_backward(*args)
        self.unique_counts.append(1e6 * (time.perf_counter() - start))

    def on_train_batch_end(self, *args: Any) -> None:
        before = len(self.history)
        start = time.perf_counter()
        super().on_train_batch_end(*args)
        spent_us = 1e6 * (time.perf_counter() - start)
        (self.others if len(self.history) == before else self.reports).append(spent_us)


class EmptyCallback(L.Callback):
    """Callback that does nothing after each batch."""

    def on_train_batch_end(self, *args: Any) -> None:
        pass


def report_us(demo: DeepFM, batches: list[Batch], folder: Path) -> dict[str, float]:
    """Train the demo with ``MetricReportHook``; return the hook's microseconds by kind of call."""
    hook = Timed()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=8 * hook.interval,
        max_epochs=-1,
        limit_val_batches=0,
        logger=CSVLogger(folder),
        callbacks=[hook],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(demo, DataLoader(batches, batch_size=None))
    assert len(hook.reports) == len(hook.unique_counts) == 8
    assert "tables/unique_share" in hook.history.names
    trainer.callbacks = [EmptyCallback()]
    spent = []
    for _ in range(500):
        start = time.perf_counter()
        _call_callback_hooks(trainer, "on_train_batch_end", None, None, 0)
        spent.append(1e6 * (time.perf_counter() - start))
    cost = {
        "report": median(hook.reports) + median(hook.unique_counts),
        "count": median(hook.others),
        "call": median(spent),
    }
    step = cost["report"] / hook.interval + cost["count"] + cost["call"]
    return {**cost, "step": step}


def main() -> int:
    """Measure, print and append the results; return 1 if the overhead exceeds its limit."""
    parser = argparse.ArgumentParser(description="Overhead of the hooks")
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    warnings.filterwarnings("ignore")
    logging.basicConfig(stream=open(os.devnull, "w"), level=logging.INFO)  # noqa: SIM115
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    torch.set_num_threads(1)  # as the demo does
    L.seed_everything(0, verbose=False)
    data = movielens_data(str(ROOT / "data" / "ml-100k"))
    data.prepare_data()
    data.setup("fit")
    batches = [*data.train_dataloader()]
    demo = movielens_model()
    bare = LookUp(demo)
    step_ms: list[float] = []
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i in range(-1, rounds):  # the first round compiles and warms up
            demo_ms = fit(demo, "none", DEMO_BLOCKS, batches, folder)
            shift = i % len(VARIANTS)
            order = [*VARIANTS][shift:] + [*VARIANTS][:shift]
            of_round = {v: fit(bare, v, BARE_BLOCKS, batches, folder) for v in order}
            if i >= 0:
                step_ms.append(demo_ms)
                for variant, ms in of_round.items():
                    times[variant].append(ms - of_round["none"])
        cost = report_us(demo, batches, folder)

    step = median(step_ms)
    added = {name: 1e3 * median(values) for name, values in times.items() if name != "none"}
    ratio = {name: 1 + us / 1e3 / step for name, us in added.items()}
    added["MetricReportHook"] = cost["step"]
    ratio["MetricReportHook"] = 1 + cost["step"] / 1e3 / step
    all_met = ratio["all three"] - 1 < LIMIT
    report_met = ratio["MetricReportHook"] - 1 < REPORT_LIMIT
    print(f"\nthe demo's step: {step:.3f} ms (medians of {rounds} rounds)")
    for name, us in added.items():
        print(f"  {name:<20} adds {us:>7.1f} us, ratio {ratio[name]:.4f}")
    for name, met, limit in (
        ("all three", all_met, LIMIT),
        ("MetricReportHook", report_met, REPORT_LIMIT),
    ):
        print(f"  {name}: {'under' if met else 'NOT UNDER'} {limit:.0%}")
    print("  us per report, per other batch, per call by Lightning, per step in total:")
    print("  " + ", ".join(f"{us:.1f}" for us in cost.values()))
    figures = {
        "lightning": L.__version__,
        "shape": SHAPE,
        "rounds": rounds,
        "step_ms": round(step, 4),
        "added_us": {name: round(us, 2) for name, us in added.items()},
        "ratio": {name: round(value, 5) for name, value in ratio.items()},
        "report_us": {name: round(us, 2) for name, us in cost.items()},
        "good": all_met and report_met,
    }
    append_result("bench_hooks", figures)
    return 0 if all_met and report_met else 1


if __name__ == "__main__":
    sys.exit(main())
