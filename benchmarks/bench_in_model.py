"""Training steps of embeddings inside a model: what a user of them gets.

Measures: ``recis_lightning.engine``, ``recis_lightning.lookup.joined``,
``recis_lightning.ops.embedding_bag``, ``recis_lightning.optim.fused_update``.

26 features, Zipf 1.05 over 200,000 known ids in random order, a fresh batch in every step, all
outputs joined to one [B, 26 dim] input of a perceptron with one hidden layer, whose forward and
backward pass and AdamW run between lookup and update and fill the caches. Contenders step in turn,
each on batches of its own, in one process; several processes, one after the other, are the runs.

Ours is ``EmbeddingEngine.concat``, and for comparison the engine's outputs joined by ``torch.cat``,
and ``concat`` alone: lookup, backward and update of fresh batches without a perceptron; the three
train the same tables. Peers are one ``nn.Embedding`` for all features, one for each, both with
``torch.optim.SparseAdam``, and FBGEMM's static CPU tables with Adagrad if they are installed.

The embedding part is lookup, joining, their backward pass and the update. The bandwidth limit is
the number of bytes that it must move, divided by the machine's copy rate.

    python benchmarks/bench_in_model.py [--runs N] [--rounds N] [--dry]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.bench_embedding_bag import EXPONENT, LR, NUM_IDS, SPREAD, TRAIN_SHAPES
from benchmarks.harness import (
    append_result,
    copy_gb_per_s,
    geometric_mean,
    print_table,
    zipf_ranks,
)
from benchmarks.targets import meets_targets
from recis_lightning import EmbeddingEngine, EmbeddingOption, hash_tables
from recis_lightning.optim import SparseAdagrad, SparseAdam, SparseOptimizer

NUM_FEATURES, HIDDEN, WARMUP = 26, 256, 3
NAMES = [f"f{i}" for i in range(NUM_FEATURES)]


class Batches:
    """Fresh batches of row numbers; an id of ours is SPREAD times its row."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self._rng = size, np.random.default_rng(seed)
        self._orders = [self._rng.permutation(NUM_IDS) for _ in NAMES]

    def draw(self) -> list[Tensor]:
        """Return int64 [size] for each feature."""
        drawn = zipf_ranks(self._rng, EXPONENT, NUM_IDS, (NUM_FEATURES, self.size))
        pairs = zip(self._orders, drawn, strict=True)
        return [torch.from_numpy(order[ranks]) for order, ranks in pairs]


class Mark(torch.autograd.Function):
    """Border between embeddings and perceptron, which notes when each pass crosses it."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, times: dict[str, float]) -> Tensor:
        times["looked up"] = time.perf_counter()
        ctx.times = times
        return joined.view_as(joined)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.times["perceptron done"] = time.perf_counter()
        return gradients[0], None


class Contender:
    """Embeddings under a perceptron of their own.

    Args:
        dim: Columns of a feature.
        read: Makes of a batch's row numbers what ``look_up`` takes; not timed.
        look_up: Returns [B, 26 dim].
        update: Updates the embeddings.
    """

    def __init__(
        self,
        dim: int,
        read: Callable[[list[Tensor]], Any],
        look_up: Callable[[Any], Tensor],
        update: Callable[[], None],
    ) -> None:
        torch.manual_seed(1)
        self.read, self.look_up, self.update = read, look_up, update
        layers = nn.Linear(NUM_FEATURES * dim, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)
        self.perceptron = nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.perceptron.parameters(), lr=LR)

    def loss(self, joined: Tensor, label: Tensor) -> Tensor:
        logits = self.perceptron(joined).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, label)

    def step(self, ranks: list[Tensor], label: Tensor) -> tuple[float, float]:
        """Train on a batch; return the milliseconds of the embedding part, and of the step."""
        batch, times = self.read(ranks), {}
        start = time.perf_counter()
        joined = Mark.apply(self.look_up(batch), times)  # type: ignore[no-untyped-call]
        self.loss(joined, label).backward()
        backward = time.perf_counter()
        self.update()
        updated = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.perf_counter()
        embeddings = times["looked up"] - start + updated - times["perceptron done"]
        assert times["perceptron done"] < backward
        return 1e3 * embeddings, 1e3 * (end - start)


def engine_of(dim: int) -> EmbeddingEngine:
    """Return an engine whose tables know all ids."""
    engine = EmbeddingEngine({name: EmbeddingOption(dim) for name in NAMES})
    known = torch.arange(NUM_IDS) * SPREAD
    for table in hash_tables(engine):
        table.insert(known, torch.zeros(NUM_IDS, dim))
    return engine


def ours(
    engine: EmbeddingEngine,
    sparse: SparseOptimizer,
    joins: bool = True,
    alone: bool = False,
) -> Contender:
    """Return an engine under a perceptron or ``alone``, updated by ``sparse``."""
    dim = sum(engine.widths.values()) // NUM_FEATURES

    def read(ranks: list[Tensor]) -> dict[str, Tensor]:
        return {name: rank * SPREAD for name, rank in zip(NAMES, ranks, strict=True)}

    def concatenated(batch: dict[str, Tensor]) -> Tensor:
        return torch.cat([*engine(batch).values()], 1)

    contender = Contender(dim, read, engine.concat if joins else concatenated, sparse.step)
    contender.engine = engine  # type: ignore[attr-defined]
    if alone:  # torch makes a gradient for it, too
        contender.loss = lambda joined, label: joined.mul(1e-3).sum()  # type: ignore[method-assign]
    return contender


def static(dim: int, fused: bool) -> Contender:
    """Return ``nn.Embedding`` tables, one for all features or one for each."""
    sizes = [NUM_IDS * NUM_FEATURES] if fused else [NUM_IDS] * NUM_FEATURES
    tables = [nn.Embedding(size, dim, sparse=True) for size in sizes]
    for table in tables:
        nn.init.zeros_(table.weight)
    sparse = torch.optim.SparseAdam([table.weight for table in tables], lr=LR)

    def read(ranks: list[Tensor]) -> Any:
        if not fused:
            return ranks
        return torch.stack([rank + i * NUM_IDS for i, rank in enumerate(ranks)], 1)

    def look_up(batch: Any) -> Tensor:
        if fused:
            return tables[0](batch).flatten(1)
        return torch.cat([table(rank) for table, rank in zip(tables, batch, strict=True)], 1)

    def update() -> None:
        sparse.step()
        sparse.zero_grad()

    contender = Contender(dim, read, look_up, update)
    contender.tables = tables  # type: ignore[attr-defined]
    return contender


def fbgemm(dim: int) -> Contender | None:
    """Return FBGEMM's static CPU tables, which are updated in backward; None if not installed."""
    try:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )
    except ImportError:
        return None
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(NUM_IDS, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * NUM_FEATURES,
        optimizer=EmbOptimType.EXACT_ADAGRAD,
        learning_rate=LR,
    )

    def read(ranks: list[Tensor]) -> tuple[Tensor, Tensor]:
        indices = torch.cat(ranks)
        return indices, torch.arange(indices.numel() + 1)

    return Contender(dim, read, lambda batch: tables(*batch), lambda: None)


def check(size: int = 64, dim: int = 4) -> None:
    """Check rows after three steps of ours against both static peers."""
    batches = Batches(size, 0)
    engines = [engine_of(dim), engine_of(dim)]
    adams = [SparseAdam(hash_tables(engine), lr=LR) for engine in engines]
    both = [ours(*pair, joins=i == 0) for i, pair in enumerate(zip(engines, adams, strict=True))]
    contenders = [*both, static(dim, True), static(dim, False)]
    for _ in range(3):
        ranks, label = batches.draw(), torch.randint(2, (size,)).float()
        for contender in contenders:
            contender.step(ranks, label)
    known = torch.arange(NUM_IDS)
    found = []
    for contender in contenders[:2]:
        tables = hash_tables(contender.engine)  # type: ignore[attr-defined]
        found.append(torch.cat([table.embeddings(known * SPREAD) for table in tables]))
    assert torch.equal(found[0], found[1])
    assert found[0].any()
    for contender in contenders[2:]:
        weights = [table.weight.data for table in contender.tables]  # type: ignore[attr-defined]
        torch.testing.assert_close(found[0], torch.cat(weights), rtol=1e-3, atol=1e-5)


def limit_bytes(ranks: list[Tensor], dim: int) -> float:
    """Return the bytes that a step with Adam must move.

    Ids, index entries, unique rows (read, then read and written with their state), outputs and
    gradients, once.
    """
    unique = sum(rank.unique().numel() for rank in ranks)
    outputs = sum(rank.numel() for rank in ranks) * 4 * dim
    return 8 * outputs / (4 * dim) + 16 * unique + unique * 4 * dim * 7 + 2 * outputs


def run(size: int, dim: int, rounds: int) -> dict[str, Any]:
    """Time all contenders once; return medians of the embedding part and of the step."""
    batches = Batches(size, 0)
    engine, other = engine_of(dim), engine_of(dim)
    adam = SparseAdam(hash_tables(engine), lr=LR)
    adagrad = SparseAdagrad(hash_tables(other), lr=LR)
    contenders: dict[str, Contender | None] = {  # one engine thrice: memory holds no three of it
        "ours": ours(engine, adam),
        "fused": static(dim, True),
        "alone": ours(engine, adam, alone=True),
        "26 tables": static(dim, False),
        "ours, torch.cat": ours(engine, adam, joins=False),
        "FBGEMM": fbgemm(dim),
        "ours, Adagrad": ours(other, adagrad),
    }
    present = {name: one for name, one in contenders.items() if one is not None}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in present}
    names, num_bytes = [*present], []
    for i in range(-WARMUP, rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            ranks, label = batches.draw(), torch.randint(2, (size,)).float()
            num_bytes.append(limit_bytes(ranks, dim))
            taken = present[name].step(ranks, label)
            if i >= 0:
                times[name].append(taken)
    medians = {
        name: [median(part) for part in zip(*steps, strict=True)] for name, steps in times.items()
    }
    return {"ms": medians, "limit": float(np.mean(num_bytes)) / copy_gb_per_s() / 1e6}


def measure(runs: int, rounds: int) -> dict[str, Any]:
    """Time all shapes in several processes, one after the other; return a line of results."""
    shapes = [f"{size} x {NUM_FEATURES}, dim {dim}" for size, dim in TRAIN_SHAPES]
    found: list[list[dict[str, Any]]] = [[] for _ in shapes]  # by shape, then run
    for _ in range(runs):  # all shapes in turn, so that each run has its hour of the machine
        for part, (size, dim) in zip(found, TRAIN_SHAPES, strict=True):
            call = [sys.executable, __file__, "--run", str(size), str(dim)]
            done = subprocess.run(
                [*call, "--rounds", str(rounds)], check=True, stdout=subprocess.PIPE, text=True
            )
            part.append(json.loads(done.stdout.splitlines()[-1]))
    names = [*found[0][0]["ms"]]
    for index, title in enumerate(("Embedding part, in a model", "Whole step")):
        rows = [
            [shape, *(span([one["ms"][name][index] for one in part]) for name in names)]
            for shape, part in zip(shapes, found, strict=True)
        ]
        print_table(f"{title}, ms: median of the runs, and their range", ["step", *names], rows)
    figures: dict[str, Any] = {}
    for key, ratio in {
        "fused": lambda one: one["ms"]["fused"][0] / one["ms"]["ours"][0],
        "tables": lambda one: one["ms"]["26 tables"][0] / one["ms"]["ours"][0],
        "cat": lambda one: one["ms"]["ours, torch.cat"][0] / one["ms"]["ours"][0],
        "fbgemm": lambda one: one["ms"]["FBGEMM"][0] / one["ms"]["ours, Adagrad"][0],
        "alone": lambda one: one["ms"]["ours"][0] / one["ms"]["alone"][0],
        "step": lambda one: one["ms"]["fused"][1] / one["ms"]["ours"][1],
        "limit": lambda one: one["ms"]["ours"][0] / one["limit"],
    }.items():
        if key == "fbgemm" and "FBGEMM" not in names:
            print("FBGEMM: skipped, it is not installed")
            continue
        by_run = [[ratio(part[i]) for part in found] for i in range(runs)]
        means = [geometric_mean(values) for values in by_run]
        figures[key], figures[f"{key}_runs"] = median(means), means
        figures[f"{key}_shapes"] = [median(values) for values in zip(*by_run, strict=True)]
        print(f"  {LABELS[key]}: {span(means)}")
    return {"part": "in_model", "figures": figures, "shapes": shapes, "runs": found}


LABELS = {
    "fused": "one nn.Embedding + SparseAdam / ours",
    "tables": "26 nn.Embedding + SparseAdam / ours",
    "cat": "ours with torch.cat / ours",
    "fbgemm": "FBGEMM / ours, both Adagrad",
    "alone": "ours in the model / alone",
    "step": "whole step, one nn.Embedding / ours",
    "limit": "ours / bandwidth limit",
}


def span(values: list[float]) -> str:
    """Return the median of some values, and their range.

    Example:
        >>> span([3.0, 1.0, 2.0])
        '2 (1-3)'
    """
    return f"{median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def main(given: list[str] | None = None) -> int:
    """Check, time and append the results; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description="Training steps of embeddings inside a model")
    parser.add_argument("--runs", type=int, default=3, help="processes that time each shape")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each contender in a run")
    parser.add_argument("--run", type=int, nargs=2, metavar=("BATCH", "DIM"), help="time one run")
    parser.add_argument("--dry", action="store_true", help="append nothing to the results")
    arguments = parser.parse_args(given)
    if arguments.run:
        print(json.dumps(run(*arguments.run, arguments.rounds)))
        return 0
    check()
    line = measure(arguments.runs, arguments.rounds)
    all_met = meets_targets("bench_in_model", line)
    if not arguments.dry:
        append_result("bench_in_model", line)
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
