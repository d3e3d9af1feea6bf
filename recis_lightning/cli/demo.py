"""``recis-lightning demo``: a small DeepFM on MovieLens-100k, from the installed package alone."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC

from recis_lightning.callbacks import (
    HashTableFilterHook,
    LoggerHook,
    MetricReportHook,
    ProfilerHook,
)
from recis_lightning.cli.command_parser import command_parser, guarded
from recis_lightning.cli.movielens import FEATURES, Examples, examples_of, find_texts
from recis_lightning.embedding_option import EmbeddingOption
from recis_lightning.engine import EmbeddingEngine
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.metrics.gauc import GAUC
from recis_lightning.optim import SparseAdamW, SparseDenseOptimizer
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.listing import hash_tables

_DIM, _BATCH, _LR = 17, 256, 5e-4  # a first-order weight and 16 factors
_EVICTING = ("user", "item", "zip")


class DemoModel(L.LightningModule):
    """DeepFM: a factorization machine and a perceptron over the rows of eight tables."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = EmbeddingEngine(
            {
                name: EmbeddingOption(
                    _DIM,
                    mode="mean" if name == "genres" else "none",
                    eviction=GlobalStepFilter(150) if name in _EVICTING else None,
                )
                for name in FEATURES
            }
        )
        width = len(FEATURES) * (_DIM - 1)
        self.perceptron = nn.Sequential(
            *(nn.Linear(width, 128), nn.ReLU(), nn.Dropout(0.2)),
            *(nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1)),
        )
        self.auc, self.gauc = BinaryAUROC(), GAUC()
        self.losses: list[float] = []

    def forward(self, batch: Examples) -> Tensor:
        """Return logits [B]."""
        rows = self.engine.concat(batch.features).unflatten(1, (len(FEATURES), _DIM))
        weights, factors = rows.split([1, _DIM - 1], 2)
        pairs = (factors.sum(1).square() - factors.square().sum(1)).sum(1) / 2
        deep: Tensor = self.perceptron(factors.flatten(1)).squeeze(1)
        logits: Tensor = weights.sum((1, 2)) + pairs + deep
        return logits

    def training_step(self, batch: Examples, batch_idx: int) -> Tensor:
        """Return the loss."""
        loss = nn.functional.binary_cross_entropy_with_logits(self(batch), batch.label)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Examples, batch_idx: int) -> None:
        """Update AUC and GAUC."""
        self._evaluate("val", batch)

    def test_step(self, batch: Examples, batch_idx: int) -> None:
        """Update AUC and GAUC."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Examples) -> None:
        logits, user = self(batch), cast(Tensor, batch.features["user"])
        self.auc.update(logits.sigmoid(), batch.label.long())
        self.gauc.update(logits, batch.label, user)
        for name, metric in (("auc", self.auc), ("gauc", self.gauc)):
            self.log(f"{stage}_{name}", metric, prog_bar=True, batch_size=len(batch.label))

    def configure_optimizers(self) -> Any:
        """Return one optimizer for the perceptron and one for tables, as one."""
        dense = torch.optim.AdamW(self.parameters(), lr=_LR)
        return SparseDenseOptimizer(dense, SparseAdamW(hash_tables(self), lr=_LR))


class Batches:
    """Batches of examples, in their order or shuffled anew at each pass.

    Args:
        examples: The examples.
        seed: Of the order; None keeps it.
    """

    def __init__(self, examples: Examples, seed: int | None = None) -> None:
        self.examples, self.seed = examples, seed
        self._generator = torch.Generator().manual_seed(seed or 0)

    def __len__(self) -> int:
        return -(-len(self.examples.label) // _BATCH)

    def __iter__(self) -> Iterator[Examples]:
        order = torch.arange(len(self.examples.label), device="cpu")
        if self.seed is not None:
            order = torch.randperm(len(order), generator=self._generator, device="cpu")
        return (self.examples.part(index) for index in order.split(_BATCH))


def demo_command(args: Sequence[str]) -> None:
    """Train, test and print a summary.

    Args:
        args: The command line behind ``demo``.
    """
    parser = command_parser("demo")
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="has MovieLens-100k as recbole's wheel has it, or that wheel "
        "(default: the data of the package recbole, if it is installed)",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(args)
    if given.epochs < 1:
        parser.error(f"--epochs: expected a number >= 1, got {given.epochs}")
    examples: Examples = guarded("demo", lambda: examples_of(find_texts(given.data)))
    print(_train(examples, given.output_dir, given.epochs, given.seed))


def _train(examples: Examples, folder: Path, epochs: int, seed: int) -> str:
    """Return the summary of a run that writes to a folder."""
    torch.set_num_threads(1)  # a second one gains nothing for such batches, beside other processes
    for name in ("lightning.pytorch", "lightning.fabric"):  # their lines would hide ours
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning.*")
    L.seed_everything(seed, verbose=False)
    num = len(examples.label)
    every = torch.arange(num, device="cpu")
    train, val, test = every.split(
        [num * 72 // 100, num * 80 // 100 - num * 72 // 100, num - num * 80 // 100]
    )
    model = DemoModel()
    report, profiler = (
        folder / "report.html",
        ProfilerHook(1, 48, 1, 2, output_dir=folder / "timeline"),
    )
    keeper = ModelCheckpoint(folder, filename="demo", enable_version_counter=False)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        callbacks=[
            *(HashTableFilterHook(filter_interval=50), LoggerHook(log_step=50), profiler),
            *(
                MetricReportHook(interval=50, report=report),
                TQDMProgressBar(refresh_rate=10),
                keeper,
            ),
        ],
    )
    start = time.perf_counter()
    trainer.fit(model, Batches(examples.part(train), seed), Batches(examples.part(val)))
    seconds = time.perf_counter() - start
    scores = trainer.test(model, Batches(examples.part(test)), verbose=False)[0]
    tenth = max(1, len(model.losses) // 10)
    first, last = model.losses[:tenth], model.losses[-tenth:]
    return "\n".join(
        [
            f"\nDeepFM on MovieLens-100k: {len(model.losses)} batches in {seconds:.0f} s\n",
            f"  training loss  {sum(first) / tenth:.4f} in the first tenth of the run, "
            f"{sum(last) / tenth:.4f} in the last",
            f"  test AUC       {scores['test_auc']:.4f}",
            f"  test GAUC      {scores['test_gauc']:.4f}\n",
            *_tables(hash_tables(model)),
            "",
            f"  report      {report}",
            f"  timelines   {folder / 'timeline'}, for ui.perfetto.dev",
            f"  checkpoint  {keeper.best_model_path}, for recis-lightning inspect",
        ]
    )


def _tables(tables: Sequence[HashTable]) -> list[str]:
    lines = [f"  {'table':<12}{'rows':>8}{'evicted':>9}{'KiB':>8}"]
    for table in tables:
        evicted = table.statistics().evicted
        lines.append(f"  {table.name:<12}{len(table):>8,}{evicted:>9,}{table.nbytes / 1024:>8,.0f}")
    return lines
