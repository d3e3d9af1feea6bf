"""Overhead of sharding: training steps on two ranks with and without the all-to-all exchange.

Measures: ``recis_lightning.lookup.sharded``, ``recis_lightning.lookup.dedup``,
``recis_lightning.lookup.exchange``, ``recis_lightning.distributed``.

Two processes of one thread each take Adam steps on their own batches: 26 features, Zipf 1.05 over
200,000 known ids each. First each process has unsharded tables of its own, and nothing is
exchanged. Then the tables are sharded over both processes, with gloo on this machine. The
difference, divided by the number of ids in a rank's batch, is the cost of deduplication, messages
and the owners' lookups, which is to be at most 0.7 of what it was. In the first shape 26 separate
modules take the same steps, too, by ``look_up_together`` (at most 1.3 of the engine's time) and
called one by one. A few steps of the sharded tables are first checked
against those of unsharded tables with the batches of both.

    python benchmarks/bench_sharding.py [--rounds N] [--dry]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import distributed, multiprocessing

from benchmarks.harness import append_result, print_table, zipf_ranks
from benchmarks.targets import meets_targets
from recis_lightning import (
    DynamicEmbedding,
    EmbeddingEngine,
    EmbeddingOption,
    hash_tables,
    look_up_together,
)
from recis_lightning.optim import SparseAdam

FEATURES, KNOWN, EXPONENT, RANKS = 26, 200_000, 1.05, 2
SHAPES = [(4096, 16), (4096, 64), (16384, 32)]  # ids per feature and rank, dim
# Nanoseconds an id on November 22, 2026: medians of the four runs in results, on two Xeon cores.
BEFORE_NS = {(4096, 16): 290, (4096, 64): 442, (16384, 32): 269}


class Step:
    """Training step: an engine or separate modules, their optimizer and a few batches.

    Args:
        batch: Ids of each feature.
        dim: Weights of a row.
        known: Ids that each table has.
        rank: Draws the batches.
        kind: "engine", "together" or "one by one".
    """

    def __init__(self, batch: int, dim: int, known: int, rank: int, kind: str = "engine") -> None:
        rng = np.random.default_rng(rank)
        names = [f"c{n}" for n in range(FEATURES)]
        self.kind = kind
        self.engine: torch.nn.Module = (
            EmbeddingEngine(dict.fromkeys(names, EmbeddingOption(dim)))
            if kind == "engine"
            else torch.nn.ModuleDict({name: DynamicEmbedding(dim, name=name) for name in names})
        )
        self.sparse = SparseAdam(hash_tables(self.engine), lr=1e-3)
        ids = torch.arange(known) * 2654435761
        for table in hash_tables(self.engine):
            table.insert(ids, torch.zeros(known, dim))
        drawn = [zipf_ranks(rng, EXPONENT, known, (FEATURES, batch)) for _ in range(4)]
        self.batches = [dict(zip(names, ids[torch.from_numpy(d)], strict=True)) for d in drawn]
        self.gradient = torch.from_numpy(rng.standard_normal((batch, dim), np.float32))
        self.num_steps = 0

    def __call__(self) -> None:
        """Take one step."""
        out = self._look_up(self.batches[self.num_steps % len(self.batches)])
        self.num_steps += 1
        torch.autograd.backward(out, [self.gradient] * len(out))
        self.sparse.step()

    def _look_up(self, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        if self.kind == "engine":
            return [*self.engine(batch).values()]
        pairs = [(self.engine[name], ids) for name, ids in batch.items()]
        if self.kind == "together":
            return look_up_together(*pairs)
        return [module(ids) for module, ids in pairs]

    def num_unique(self) -> float:
        """Return the mean number of unique ids of a batch, counted per table."""
        counts = [sum(len(v.unique()) for v in batch.values()) for batch in self.batches]
        return float(np.mean(counts))


def _time(step: Step, rounds: int, barrier: Any) -> float:
    spent = []
    for i in range(rounds + 2):
        barrier.wait()
        start = time.perf_counter()
        step()
        if i >= 2:
            spent.append(time.perf_counter() - start)
    return median(spent)


def _unsharded(steps: Sequence[Step]) -> Step:
    """Return the step of one process with the batches of all ranks; gradients are averaged."""
    unsharded = steps[0]
    for i, batch in enumerate(unsharded.batches):
        for name in batch:
            batch[name] = torch.cat([step.batches[i][name] for step in steps])
    unsharded.gradient = torch.cat([step.gradient for step in steps]) / len(steps)
    return unsharded


def _init_process_group(rank: int, store: str) -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS
    )


def check(rank: int, store: str) -> None:
    """Check the rows of sharded tables against those of unsharded ones."""
    shape = (64, 8, 300)
    unsharded, sharded = _unsharded([Step(*shape, i) for i in range(RANKS)]), Step(*shape, rank)
    for _ in sharded.batches:
        unsharded()
    _init_process_group(rank, store)
    for _ in sharded.batches:
        sharded()
    pairs = zip(hash_tables(sharded.engine), hash_tables(unsharded.engine), strict=True)
    for table, expected in pairs:
        ids = table.ids()
        assert 0 < len(ids) < len(expected)
        torch.testing.assert_close(
            table.embeddings(ids), expected.embeddings(ids), rtol=1e-4, atol=1e-6
        )
        count = torch.tensor(len(ids))
        distributed.all_reduce(count)
        assert int(count) == len(expected)
    distributed.destroy_process_group()


def _measure(rank: int, folder: str, rounds: int, known: int, shapes: Any, barrier: Any) -> None:
    torch.set_num_threads(1)
    check(rank, f"{folder}/check")
    rows = []
    for batch, dim in shapes:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        step = Step(batch, dim, known, rank)
        unsharded = _time(step, rounds, barrier)
        _init_process_group(rank, f"{folder}/{batch}x{dim}")
        sharded = _time(step, rounds, barrier)
        num_ids, num_unique = batch * FEATURES, step.num_unique()
        num_sent = num_unique * (RANKS - 1) / RANKS  # this rank owns the others
        row_bytes = 8 + 4 * dim + 4 * (dim + 1)  # id to its owner, row back, gradient and its flag
        rows.append(
            {
                "batch": batch,
                "dim": dim,
                "alone_ms": 1e3 * unsharded,
                "sharded_ms": 1e3 * sharded,
                "exchange_ns_an_id": 1e9 * (sharded - unsharded) / num_ids,
                "distinct_share": num_unique / num_ids,
                "kib_a_step": num_sent * row_bytes / 1024,
            }
        )
    separate = _measure_separate(*shapes[0], known, rank, rounds, barrier)
    if rank == 0:
        torch.save((rows, separate), f"{folder}/rows.pt")
    distributed.destroy_process_group()


def _measure_separate(
    batch: int, dim: int, known: int, rank: int, rounds: int, barrier: Any
) -> dict[str, float]:
    """Return the milliseconds of a sharded step of each kind; they take turns."""
    kinds = ("engine", "together", "one by one")
    steps = {kind: Step(batch, dim, known, rank, kind) for kind in kinds}
    spent: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(3):
        for kind, step in steps.items():
            spent[kind].append(1e3 * _time(step, max(rounds // 3, 1), barrier))
    return {kind: median(times) for kind, times in spent.items()}


def measure(rounds: int, known: int = KNOWN, shapes: Any = SHAPES) -> dict[str, Any]:
    """Measure on two processes; return a line of results."""
    barrier = multiprocessing.get_context("spawn").Barrier(RANKS)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, rounds, known, shapes, barrier)
        multiprocessing.spawn(_measure, arguments, nprocs=RANKS)
        rows, separate = torch.load(f"{folder}/rows.pt")
    columns = [*rows[0]]
    print_table(
        "A training step (Adam) on two ranks, one thread each",
        columns,
        [[*row.values()] for row in rows],
    )
    print_table(f"{FEATURES} modules, a sharded step in ms", [*separate], [[*separate.values()]])
    worst = max(row["exchange_ns_an_id"] for row in rows)
    figures = {
        "ns_an_id": worst,
        "to_before": _to_before(rows),
        "together": separate["together"] / separate["engine"],
        "one_by_one": separate["one by one"] / separate["engine"],
    }
    return {"part": "exchange", "rows": rows, "separate_ms": separate, "figures": figures}


def _to_before(rows: Sequence[dict[str, float]]) -> float | None:
    """Return the cost of the exchange over that of before, the geometric mean of the shapes.

    None where a shape was not measured before, or the exchange was lost in noise.
    """
    shapes = [(int(row["batch"]), int(row["dim"])) for row in rows]
    costs = [row["exchange_ns_an_id"] for row in rows]
    if min(costs) <= 0 or not all(shape in BEFORE_NS for shape in shapes):
        return None
    ratios = [cost / BEFORE_NS[shape] for cost, shape in zip(costs, shapes, strict=True)]
    return float(np.exp(np.mean(np.log(ratios))))


def main() -> int:
    """Measure, print and append the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dry", action="store_true", help="append nothing to the results")
    given = parser.parse_args()
    line = measure(given.rounds)
    all_met = meets_targets("bench_sharding", line)
    if not given.dry:
        append_result("bench_sharding", line)
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
