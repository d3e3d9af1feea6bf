"""Test AUC of DeepFM with dynamic tables, compared with ``nn.Embedding`` over a known vocabulary.

Measures: ``recis_lightning.engine``, ``recis_lightning.optim``,
``recis_lightning.initializers``, ``recis_lightning.callbacks.filter``.

The static model knows the vocabulary of its training data in advance and reads zeros for any other
id; ours adds ids as they occur. Both have the same perceptron, data, order of data and seeds, and
the same kind of Adam (``torch.optim.SparseAdam`` and ours), which updates the rows of a batch.

MovieLens-100k is downloaded if it is missing. Criteo needs a folder with ``part-0`` to ``part-3``.
Its settings were chosen with ``--validation`` (train on parts 0 and 1, test on part 2); the final
test uses part 3. Each task appends a JSON line to ``results/bench_quality.jsonl``.

    python benchmarks/bench_quality.py [--criteo FOLDER] [--only movielens|criteo] [--validation]
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for examples

import lightning as L
import torch
from torch import Tensor, nn

from benchmarks.harness import append_result
from examples.deepfm.batch import Batch
from examples.deepfm.criteo import CriteoDataModule
from examples.deepfm.model import DeepFM
from examples.deepfm.movielens import MovieLensDataModule
from examples.deepfm.train import criteo_data, criteo_model, movielens_model
from recis_lightning import EmbeddingOption, Jagged
from recis_lightning.callbacks import HashTableFilterHook
from recis_lightning.optim import SparseAdam

DEMO, OURS, STATIC = "tables, as in the demo", "tables, SparseAdam", "nn.Embedding, SparseAdam"


class StaticEngine(nn.Module):
    """``EmbeddingEngine`` with ``nn.Embedding`` tables and ids known in advance."""

    def __init__(self, options: dict[str, EmbeddingOption], batches: Iterable[Batch]) -> None:
        super().__init__()
        seen: dict[str, list[Tensor]] = {name: [] for name in options}
        for batch in batches:
            for name in options:
                seen[name].append(_ids(batch["features"][name]))
        self.vocabulary = {name: torch.cat(ids).unique() for name, ids in seen.items()}
        self.tables = nn.ModuleDict()
        for name, option in options.items():
            # Unknown ids read the last row: zeros, never trained.
            num_rows, dim = len(self.vocabulary[name]) + 1, option.embedding_dim
            common: dict[str, Any] = {"padding_idx": num_rows - 1, "sparse": True}
            if option.mode == "none":
                table: nn.Module = nn.Embedding(num_rows, dim, **common)
            else:
                common["include_last_offset"] = True
                table = nn.EmbeddingBag(num_rows, dim, mode=option.mode, **common)
            nn.init.normal_(table.weight, std=0.01)
            nn.init.zeros_(table.weight[-1])
            self.tables[name] = table

    def concat(self, features: dict[str, Tensor | Jagged]) -> Tensor:
        """Return one row per feature and example, side by side."""
        rows = []
        for name, table in self.tables.items():
            feature, vocabulary = features[name], self.vocabulary[name]
            ids = _ids(feature)
            index = torch.searchsorted(vocabulary, ids).clamp(max=len(vocabulary) - 1)
            index = index.where(vocabulary[index] == ids, len(vocabulary))
            rows.append(
                table(index, feature.offsets) if isinstance(feature, Jagged) else table(index)
            )
        return torch.cat(rows, 1)


def _ids(feature: Tensor | Jagged) -> Tensor:
    return feature.values if isinstance(feature, Jagged) else feature


class StaticDeepFM(DeepFM):
    """DeepFM over a ``StaticEngine``, with two optimizers under manual optimization."""

    def __init__(self, ours: DeepFM, batches: Iterable[Batch], lr: float, **kwargs: Any) -> None:
        super().__init__(ours.engine.options, **kwargs)
        self.engine = StaticEngine(ours.engine.options, batches)
        self.automatic_optimization = False
        self.lr = lr

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Train on one batch."""
        loss = super().training_step(batch, batch_idx)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return loss

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return AdamW for the perceptron and SparseAdam for the tables."""
        tables = list(self.engine.parameters())
        table_ids = {id(table) for table in tables}
        dense = [p for p in self.parameters() if id(p) not in table_ids]
        return [
            torch.optim.AdamW(dense, lr=self.lr),
            torch.optim.SparseAdam(tables, lr=self.lr),
        ]


@dataclass(frozen=True)
class Task:
    """Model, data and settings of a comparison, and its limits."""

    name: str
    model: Callable[[float], DeepFM]
    data: Callable[[int], L.LightningDataModule]
    lr: float
    epochs: int
    num_dense: int
    seeds: Sequence[int]
    floor: float  # lower bound of our mean AUC
    below: float  # largest allowed AUC loss of ours relative to the static model
    above: float  # largest allowed AUC gain of ours relative to the static model


def run(task: Task, kind: str, seed: int) -> float:
    """Train one model; return its test AUC."""
    L.seed_everything(seed, verbose=False)
    data = task.data(seed)
    data.prepare_data()
    data.setup("fit")
    model = task.model(task.lr)
    callbacks: list[L.Callback] = []
    if kind == DEMO:
        callbacks.append(HashTableFilterHook(filter_interval=50))
    elif kind == OURS:
        model.sparse_optimizer = lambda tables: SparseAdam(tables, lr=task.lr)
    else:
        L.seed_everything(seed, verbose=False)
        batches = data.train_dataloader()
        model = StaticDeepFM(model, batches, task.lr, num_dense=task.num_dense)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=task.epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(model, data)
    return float(trainer.test(model, data, verbose=False)[0]["test_auc"])


def movielens(seeds: Sequence[int]) -> Task:
    """Return the demo's task, trained on the whole first 80%."""

    def data(seed: int) -> L.LightningDataModule:
        root = str(ROOT / "data" / "ml-100k")
        return MovieLensDataModule(root, batch_size=256, val_fraction=0.0, seed=seed)

    return Task("movielens", movielens_model, data, 5e-4, 2, 0, seeds, 0.0, 0.005, 0.005)


def criteo(root: Path, seeds: Sequence[int], validation: bool) -> Task:
    """Return one epoch over parts 0 to 2, tested on part 3; for validation over 0 and 1, and 2."""

    def data(seed: int) -> L.LightningDataModule:
        if not validation:
            return criteo_data(str(root), seed)
        train, test = ["part-[01].*"], ["part-2.*"]
        rest: dict[str, Any] = {"batch_size": 128, "shuffle_rows": 30000, "seed": seed}
        return CriteoDataModule(str(root), train, test=test, **rest)

    task = Task("criteo", criteo_model, data, 2e-3, 1, 26, seeds, 0.65, 0.01, float("inf"))
    return replace(task, name="criteo, validation") if validation else task


def compare(task: Task) -> dict[str, Any]:
    """Train each kind of model with each seed; print the table and return the figures."""
    aucs = {kind: [run(task, kind, seed) for seed in task.seeds] for kind in (DEMO, OURS, STATIC)}
    means = {kind: mean(values) for kind, values in aucs.items()}
    print(f"\n{task.name}: test AUC, {len(task.seeds)} seeds")
    print(f"  {'':<26}{'mean':>8}{'difference':>12}   each seed")
    in_bounds = True
    for kind, values in aucs.items():
        difference = means[kind] - means[STATIC]
        in_bounds &= -task.below <= difference <= task.above and means[kind] >= task.floor
        each = " ".join(f"{value:.4f}" for value in values)
        print(f"  {kind:<26}{means[kind]:>8.4f}{difference:>+12.4f}   {each}")
    print(f"  {'within' if in_bounds else 'OUT OF'} bounds")
    line = {"task": task.name, "seeds": list(task.seeds), "auc": aucs, "mean": means}
    return {**line, "good": in_bounds}


def main() -> int:
    """Compare the models on each task; return 1 if an AUC is out of bounds."""
    parser = argparse.ArgumentParser(description="AUC compared with nn.Embedding")
    parser.add_argument("--criteo", type=Path, default=ROOT.parent / "shared" / "data" / "criteo")
    parser.add_argument("--only", choices=["movielens", "criteo"])
    parser.add_argument("--validation", action="store_true", help="Criteo: test on part 2, not 3")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("recis_lightning").setLevel(logging.ERROR)

    torch.set_num_threads(1)  # as in the demo; results are the same with more
    tasks = []
    if given.only != "criteo":
        tasks.append(movielens(range(3)))
    if given.only != "movielens" and given.criteo.is_dir():
        tasks.append(criteo(given.criteo, range(5), given.validation))
    elif given.only != "movielens":
        print(f"criteo: skipped, there is no folder {given.criteo}; set it with --criteo")
    all_met = True
    for task in tasks:
        figures = compare(task)
        all_met &= figures["good"]
        append_result("bench_quality", figures)
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
