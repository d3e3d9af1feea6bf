"""Train DeepFM in Python, as the YAML files in ``configs`` configure it.

From the root of the repository: ``python -m examples.deepfm.train movielens`` or
``python -m examples.deepfm.train criteo --root FOLDER``. ``--devices 2`` trains on two processes.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from examples.deepfm.criteo import CATEGORIES, CriteoDataModule
from examples.deepfm.model import DeepFM
from examples.deepfm.movielens import MovieLensDataModule
from recis_lightning import EmbeddingOption, HashTable
from recis_lightning.callbacks import CheckpointHook, HashTableFilterHook, LoggerHook, ProfilerHook
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.initializers import Normal
from recis_lightning.optim import SparseAdamW, SparseOptimizer

DIM = 1 + 16  # a first-order weight and 16 factors
WINDOW = {"wait": 1, "warmup": 48, "active": 1, "repeat": 4}  # batches that are profiled


def option(
    filter_step: int | None = None, mode: Literal["none", "mean"] = "none"
) -> EmbeddingOption:
    """Return a feature's option; rows not seen in ``filter_step`` batches are evicted."""
    eviction = None if filter_step is None else GlobalStepFilter(filter_step=filter_step)
    return EmbeddingOption(DIM, mode=mode, initializer=Normal(std=0.01), eviction=eviction)


def movielens_model(lr: float = 5e-4) -> DeepFM:
    """Return the model for MovieLens-100k."""
    evicting = dict.fromkeys(("user", "item", "zip"), option(filter_step=150))
    keeping = dict.fromkeys(("age", "gender", "occupation", "year", "hour"), option())
    embeddings = {**evicting, **keeping, "genres": option(mode="mean")}
    return _model(embeddings, lr)


def criteo_model(lr: float = 2e-3) -> DeepFM:
    """Return the model for Criteo: 26 categories, 13 counts and 13 flags of missing counts."""
    return _model(dict.fromkeys(CATEGORIES, option(filter_step=2000)), lr, num_dense=26)


def _model(embeddings: dict[str, EmbeddingOption], lr: float, num_dense: int = 0) -> DeepFM:
    def adamw(params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=lr)

    def sparse_adamw(tables: Iterable[HashTable]) -> SparseOptimizer:
        return SparseAdamW(tables, lr=lr)

    return DeepFM(
        embeddings,
        num_dense=num_dense,
        hidden=(128, 64),
        dropout=0.2,
        dense_optimizer=adamw,
        sparse_optimizer=sparse_adamw,
    )


def movielens_data(
    root: str = "data/ml-100k", seed: int = 0, ranks: int = 1
) -> MovieLensDataModule:
    """Return MovieLens-100k, the last 20% for the test; ``ranks`` share a batch of 256."""
    return MovieLensDataModule(root, batch_size=256 // ranks, val_fraction=0.1, seed=seed)


def criteo_data(root: str = "data/criteo", seed: int = 0, ranks: int = 1) -> CriteoDataModule:
    """Return four Criteo files: three to train on, one to test on; ``ranks`` share a batch."""
    return CriteoDataModule(
        root,
        train=["part-[0-2].*"],
        test=["part-3.*"],
        batch_size=128 // ranks,
        shuffle_rows=30000,
        seed=seed,
    )


def hooks(timeline: Path) -> list[Callback]:
    """Return the three RecIS hooks and a progress bar."""
    return [
        HashTableFilterHook(filter_interval=50),
        LoggerHook(log_step=50),
        ProfilerHook(**WINDOW, output_dir=timeline),
        TQDMProgressBar(refresh_rate=10),
    ]


def trainer(
    output_dir: Path,
    callbacks: Sequence[Callback],
    devices: int = 1,
    num_nodes: int = 1,
    **options: Any,
) -> L.Trainer:
    """Return a Trainer that writes to ``output_dir``; tables are sharded over all its devices."""
    ranks = devices * num_nodes
    if ranks > 1:  # each rank saves its shard
        callbacks = [*callbacks, CheckpointHook()]
    return L.Trainer(
        accelerator="auto",
        devices=devices,
        num_nodes=num_nodes,
        strategy="ddp" if ranks > 1 else "auto",
        num_sanity_val_steps=0,
        logger=CSVLogger(output_dir.parent, name=output_dir.name),
        callbacks=list(callbacks),
        **options,
    )


def one_thread() -> None:
    """Use one CPU thread; results do not change.

    Batches of a few hundred rows gain nothing from a second thread; with other processes on the
    cores, waiting for it made a step 5 to 25 times as long (2 cores, 6 processes).
    """
    torch.set_num_threads(1)


def main(args: Sequence[str] | None = None) -> L.Trainer:
    """Train, then test; return the Trainer."""
    parser = argparse.ArgumentParser("python -m examples.deepfm.train", description=main.__doc__)
    parser.add_argument("data", choices=["movielens", "criteo"])
    parser.add_argument("--root", help="folder of the data (default: data/ml-100k, data/criteo)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, help="default: outputs/movielens or .../criteo")
    parser.add_argument("--devices", type=int, default=1, help="processes on each node")
    parser.add_argument("--num-nodes", type=int, default=1, help="of torchrun")
    parser.add_argument(
        "--fast-dev-run", type=int, default=0, help="number of batches; writes no files"
    )
    given = parser.parse_args(args)
    one_thread()
    # The data is in memory or read in big chunks: workers would only cost time.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")

    L.seed_everything(given.seed)
    ranks = given.devices * given.num_nodes
    root = {"root": given.root} if given.root else {}
    model: L.LightningModule
    data: L.LightningDataModule
    if given.data == "movielens":
        model, data = movielens_model(), movielens_data(**root, seed=given.seed, ranks=ranks)
        options: dict[str, Any] = {"max_epochs": 2, "val_check_interval": 0.25}
    else:
        model, data = criteo_model(), criteo_data(**root, seed=given.seed, ranks=ranks)
        options = {"max_epochs": 1}
    output_dir = given.output_dir or Path("outputs") / given.data
    if given.fast_dev_run:
        options["fast_dev_run"] = given.fast_dev_run
    processes = {"devices": given.devices, "num_nodes": given.num_nodes}
    runner = trainer(output_dir, hooks(output_dir / "timeline"), **processes, **options)
    runner.fit(model, data)
    runner.test(model, data)
    return runner


if __name__ == "__main__":
    main()
