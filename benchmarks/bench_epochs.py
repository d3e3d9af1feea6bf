"""Test AUC and log loss of DeepFM after each of three epochs, with cures against overfitting.

Measures: ``recis_lightning.callbacks.reinitialize``, ``recis_lightning.optim.adam_ar``,
``recis_lightning.optim.clip_bounds``.

Rows of rare ids remember the labels of their first epoch, and the test's log loss rises from the
second on. Plain Adam is compared with ``ReinitializeRowsHook`` (MEDA), CowClip and AdamAR. Model,
data, order and seeds are the same for all; dense parameters are trained by AdamW. Nothing is
evicted. Criteo is trained on parts 0 to 2 and tested on part 3, MovieLens-100k on the first 80% and
the last 20%. CowClip has its authors' bounds. AdamAR's alpha was chosen with ``--search --seeds 1``
on Criteo, and taken over for MovieLens: the search tests six values, and uses no part of the
test's data (Criteo: train on parts 0 and 1, test on part 2; MovieLens: on the first 64% and the
next 16%).

Each task appends a JSON line to ``results/bench_epochs.jsonl``; ``--search`` writes none.

    python benchmarks/bench_epochs.py [--criteo FOLDER] [--only movielens|criteo] [--seeds N]
        [--search]
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for examples

import lightning as L
import torch
from typing_extensions import override

from benchmarks.harness import append_result, print_table
from examples.deepfm.criteo import CriteoDataModule
from examples.deepfm.model import DeepFM
from examples.deepfm.movielens import MovieLensDataModule
from examples.deepfm.train import criteo_model, movielens_model
from recis_lightning.callbacks import ReinitializeRowsHook
from recis_lightning.optim import SparseAdam, SparseAdamAR

NUM_EPOCHS = 3
COW_CLIP = (1.0, 1e-5)
ALPHAS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Kind:
    """An optimizer of tables, by its learning rate, and callbacks."""

    optimizer: Callable[[Any, float], Any]
    callbacks: Callable[[], list[L.Callback]] = field(default=list)


def adam_ar(alpha: float) -> Kind:
    """Return AdamAR with a base rate."""
    return Kind(lambda tables, lr: SparseAdamAR(tables, lr=lr, alpha=alpha))


def kinds(alpha: float) -> dict[str, Kind]:
    """Return what is compared; the first is none of the cures."""
    return {
        "Adam": Kind(lambda tables, lr: SparseAdam(tables, lr=lr)),
        "MEDA": Kind(
            lambda tables, lr: SparseAdam(tables, lr=lr), lambda: [ReinitializeRowsHook()]
        ),
        "CowClip": Kind(lambda tables, lr: SparseAdam(tables, lr=lr, cow_clip=COW_CLIP)),
        f"AdamAR, alpha={alpha:g}": adam_ar(alpha),
    }


@dataclass(frozen=True)
class Task:
    """A model, its data, whose validation is the test, and settings."""

    name: str
    model: Callable[[], DeepFM]
    data: Callable[[int, bool], L.LightningDataModule]  # of a seed, and whether it is for a search
    lr: float
    alpha: float


class Curve(L.Callback):
    """AUC and log loss of each validation."""

    def __init__(self) -> None:
        self.auc: list[float] = []
        self.log_loss: list[float] = []

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.auc.append(float(trainer.callback_metrics["val_auc"]))
        self.log_loss.append(float(trainer.callback_metrics["val_loss"]))


def run(task: Task, kind: Kind, seed: int, is_search: bool = False, **options: Any) -> Curve:
    """Train one model; return its test after each epoch.

    Args:
        task: What to train.
        kind: How.
        seed: Of all that is drawn.
        is_search: Leave the test's data alone.
        options: Of the Trainer.
    """
    L.seed_everything(seed, verbose=False)
    model = task.model()
    model.sparse_optimizer = lambda tables: kind.optimizer(tables, task.lr)
    curve = Curve()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=NUM_EPOCHS,
        callbacks=[*kind.callbacks(), curve],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(model, task.data(seed, is_search))
    return curve


def movielens() -> Task:
    """Return MovieLens-100k, likes in the order of time."""

    def data(seed: int, is_search: bool) -> L.LightningDataModule:
        root = str(ROOT / "data" / "ml-100k")
        if is_search:
            return MovieLensDataModule(root, batch_size=256, val_fraction=0.2, seed=seed)
        module = MovieLensDataModule(root, batch_size=256, val_fraction=0.0, seed=seed)
        module.val_dataloader = module.test_dataloader  # type: ignore[method-assign]
        return module

    return Task("movielens", movielens_model, data, lr=5e-4, alpha=1e-2)


def criteo(root: Path) -> Task:
    """Return a sample of Criteo."""

    def data(seed: int, is_search: bool) -> L.LightningDataModule:
        train, test = (
            (["part-[01].*"], ["part-2.*"]) if is_search else (["part-[0-2].*"], ["part-3.*"])
        )
        rest: dict[str, Any] = {"batch_size": 128, "shuffle_rows": 30000, "seed": seed}
        return CriteoDataModule(str(root), train, val=test, **rest)

    return Task("criteo", criteo_model, data, lr=2e-3, alpha=1e-2)


def compare(task: Task, of: dict[str, Kind], seeds: int, is_search: bool) -> dict[str, Any]:
    """Train each kind with each seed; print the table and return the figures."""
    curves = {
        name: [run(task, kind, seed, is_search) for seed in range(seeds)]
        for name, kind in of.items()
    }
    figures: dict[str, Any] = {"auc": {}, "log_loss": {}}
    for metric, values in figures.items():
        for name, runs in curves.items():
            values[name] = [getattr(curve, metric) for curve in runs]
        rows = []
        for name, runs in values.items():
            epochs = [list(epoch) for epoch in zip(*runs, strict=True)]
            rows.append([name, *(f"{mean(e):.4f} ({min(e):.4f}-{max(e):.4f})" for e in epochs)])
        head = [f"epoch {n + 1}" for n in range(NUM_EPOCHS)]
        print_table(
            f"{task.name}: test {metric}, mean and range of {seeds} seeds", ["", *head], rows
        )
    return {"task": task.name, "seeds": seeds, "lr": task.lr, "cow_clip": COW_CLIP, **figures}


def main() -> int:
    """Compare the cures on each task."""
    parser = argparse.ArgumentParser(description="AUC and log loss after each epoch")
    parser.add_argument("--criteo", type=Path, default=ROOT.parent / "shared" / "data" / "criteo")
    parser.add_argument("--only", choices=["movielens", "criteo"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--search", action="store_true", help="compare values of AdamAR's alpha")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "recis_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)  # as in the demo; results are the same with more
    tasks = [movielens()] if given.only != "criteo" else []
    if given.only != "movielens" and given.criteo.is_dir():
        tasks.append(criteo(given.criteo))
    elif given.only != "movielens":
        print(f"criteo: skipped, there is no folder {given.criteo}; set it with --criteo")
    for task in tasks:
        if given.search:
            of = {f"alpha={alpha:g}": adam_ar(alpha) for alpha in ALPHAS}
            compare(task, of, given.seeds, is_search=True)
        else:
            figures = compare(task, kinds(task.alpha), given.seeds, is_search=False)
            append_result("bench_epochs", figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
