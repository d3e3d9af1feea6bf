"""Training steps of a DLRM under Lightning: 26 sparse and 13 dense features, batch 4096.

Measures: ``recis_lightning.engine``, ``recis_lightning.optim.sparse_dense``.

Bottom perceptron 512-256-dim, dot interaction, top perceptron 512-256-1. Ours is an
``EmbeddingEngine`` with ``SparseDenseOptimizer(AdamW, SparseAdam)`` under automatic optimization.
The peer has ``nn.Embedding(sparse=True)`` tables and two optimizers under manual optimization,
which torch requires for them. A third model has constant vectors instead of embeddings; the
difference in time between ours and this model is the embeddings' share of the step. Each round
trains each model for a few steps, and rotates the order of the models. A step lasts from the start
of a batch to the start of the next; on a GPU all work of the previous batch is finished first.

    python benchmarks/bench_training.py [--rounds N] [--dim D ...] [--device D] [--dry]
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.bench_embedding_bag import NUM_IDS, SPREAD, Data
from benchmarks.harness import (
    add_device,
    append_result,
    geometric_mean,
    is_on_gpu,
    no_default_device,
    print_table,
    use_device,
)
from benchmarks.targets import meets_targets
from recis_lightning import EmbeddingEngine, EmbeddingOption, hash_tables
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer

NUM_SPARSE, NUM_DENSE, BATCH, LR = 26, 13, 4096, 1e-3
WARMUP, STEPS = 4, 16  # per fit


def perceptron(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class DLRM(L.LightningModule):
    """Dense part of the model; a subclass provides the embeddings."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        count = NUM_SPARSE + 1
        self.bottom = perceptron([NUM_DENSE, 512, 256, dim])
        self.top = perceptron([dim + count * (count - 1) // 2, 512, 256, 1])
        self.pairs = torch.tril_indices(count, count, -1)
        self.losses: list[Tensor] = []

    def embed(self, batch: dict[str, Any]) -> list[Tensor]:
        raise NotImplementedError

    def loss(self, batch: dict[str, Any]) -> Tensor:
        dense = self.bottom(batch["dense"])
        stacked = torch.stack([dense, *self.embed(batch)], 1)
        dots = torch.bmm(stacked, stacked.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        logits = self.top(torch.cat([dense, dots], 1)).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch["label"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        return loss

    def dense_optimizer(self) -> torch.optim.Optimizer:
        layers = [*self.bottom.parameters(), *self.top.parameters()]
        return torch.optim.AdamW(layers, lr=LR)


def initial(dim: int) -> Tensor:
    """Return the initial rows of every table."""
    generator = torch.Generator().manual_seed(2)
    return 0.1 * torch.randn(NUM_IDS, dim, generator=generator, device="cpu")


class Ours(DLRM):
    """DLRM with dynamic tables that know all ids."""

    def __init__(self, dim: int, names: list[str]) -> None:
        super().__init__(dim)
        self.engine = EmbeddingEngine({name: EmbeddingOption(dim) for name in names})
        self.sparse = SparseAdam(hash_tables(self), lr=LR)  # lays out the state before rows exist
        known, rows = torch.arange(NUM_IDS) * SPREAD, initial(dim)
        for table in hash_tables(self):
            table.insert(known, rows)

    def embed(self, batch: dict[str, Any]) -> list[Tensor]:
        return [*self.engine(batch["ids"]).values()]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SparseDenseOptimizer(self.dense_optimizer(), self.sparse)


class Static(DLRM):
    """DLRM with ``nn.Embedding`` tables and two optimizers under manual optimization."""

    def __init__(self, dim: int, names: list[str]) -> None:
        super().__init__(dim)
        self.automatic_optimization = False
        rows = initial(dim)
        self.tables = nn.ModuleList(
            nn.Embedding.from_pretrained(rows.clone(), freeze=False, sparse=True) for _ in names
        )

    def embed(self, batch: dict[str, Any]) -> list[Tensor]:
        return [table(ranks) for table, ranks in zip(self.tables, batch["ranks"], strict=True)]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return loss

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        sparse = torch.optim.SparseAdam(list(self.tables.parameters()), lr=LR)
        return [self.dense_optimizer(), sparse]


class NoEmbeddings(DLRM):
    """DLRM with constant vectors as embeddings; their gradients are computed and discarded."""

    def __init__(self, dim: int, names: list[str]) -> None:
        super().__init__(dim)
        self.constant = [torch.randn(BATCH, dim).requires_grad_() for _ in names]

    def embed(self, batch: dict[str, Any]) -> list[Tensor]:
        for vector in self.constant:
            vector.grad = None
        return self.constant

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.dense_optimizer()


class Clock(L.Callback):
    """Callback that records the start times of batches."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        if is_on_gpu():
            torch.cuda.synchronize()
        self.starts.append(time.perf_counter())

    def step_ms(self) -> list[float]:
        return [1e3 * (end - start) for start, end in pairwise(self.starts[WARMUP:])]


def make_batches(data: Data) -> list[dict[str, Any]]:
    """Return batches: ids for ours, row numbers for the peer, dense features and labels."""
    batches = []
    for i, ranks in enumerate(data.ranks):
        ids = data.features(i)
        label = torch.randint(2, (data.batch,)).float()
        dense = torch.randn(data.batch, NUM_DENSE)
        batches.append({"ids": ids, "ranks": ranks, "dense": dense, "label": label})
    return batches


def fit(model: DLRM, batches: list[dict[str, Any]], num_steps: int) -> list[float]:
    """Train for a few steps; return the milliseconds of each after the warm-up."""
    clock = Clock()
    trainer = L.Trainer(
        accelerator="gpu" if is_on_gpu() else "cpu",
        devices=1,
        max_steps=-1,
        max_epochs=1,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rounds = -(-num_steps // len(batches))
    with no_default_device():
        trainer.fit(model, DataLoader((batches * rounds)[:num_steps], batch_size=None))
    return clock.step_ms()


def quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def check(batch: int = 64, dim: int = 8) -> None:
    """Check losses and rows of ours against the peer's."""
    data = Data(NUM_SPARSE, batch, dim)
    batches = make_batches(data)[:3]
    ours, peer = Ours(dim, data.names), Static(dim, data.names)
    for model in (ours, peer):
        fit(model, batches, 3)
    torch.testing.assert_close(torch.stack(ours.losses), torch.stack(peer.losses))
    assert ours.losses[0] != ours.losses[2]
    for table, static, ranks in zip(
        hash_tables(ours), peer.tables, batches[0]["ranks"], strict=True
    ):
        ranks = ranks.cpu()  # Lightning has moved the models there
        rows = table.embeddings(ranks * SPREAD)
        torch.testing.assert_close(rows, static.weight.data[ranks], rtol=1e-3, atol=1e-5)


def measure(dims: list[int], rounds: int) -> dict[str, Any]:
    """Time all models with each dim."""
    kinds: dict[str, Callable[..., DLRM]] = {
        "ours": Ours,
        "torch": Static,
        "none": NoEmbeddings,
    }
    rows, shares = [], []
    for dim in dims:
        data = Data(NUM_SPARSE, BATCH, dim)
        batches = make_batches(data)
        models = {name: kind(dim, data.names) for name, kind in kinds.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        names = [*models]
        for i in range(rounds):
            shift = i % len(names)
            for name in names[shift:] + names[:shift]:
                times[name] += fit(models[name], batches, WARMUP + STEPS)
        ms = {name: median(values) for name, values in times.items()}
        shares.append(1 - ms["none"] / ms["ours"])
        row = [f"{BATCH} x {NUM_SPARSE}, dim {dim}", ms["ours"], ms["torch"]]
        row += [ms["torch"] / ms["ours"], ms["none"], shares[-1], 1 - ms["none"] / ms["torch"]]
        rows.append(row)
    columns = ["Lightning step", "ours ms", "torch ms", "ratio", "without embeddings ms"]
    columns += ["share of ours", "share of torch's"]
    print_table("DLRM under Lightning", columns, rows)
    figures = {"ratio": geometric_mean([row[3] for row in rows]), "share": max(shares)}
    line = {"part": "lightning", "lightning": L.__version__, "columns": columns, "rows": rows}
    return {**line, "figures": figures}


def main(arguments: list[str] | None = None) -> int:
    """Check, time and append the results; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description="Training steps of a DLRM under Lightning")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--dim", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--dry", action="store_true", help="append nothing to the results")
    add_device(parser)
    given = parser.parse_args(arguments)
    use_device(given.device)
    quiet()
    check()
    line = measure(given.dim, given.rounds)
    all_met = meets_targets("bench_training", line)
    if not given.dry:
        append_result("bench_training", line)
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
