"""What sharding costs: a training step on two ranks, against the same step without an exchange.

Two processes with a thread each take Adam steps on batches of their own: 26 features, Zipf 1.05
over 200,000 known ids each. First each has whole tables to itself and nothing is exchanged; then
the tables are sharded over both, through gloo on this machine. The difference, by the ids of a
rank's batch, is the price of the exchange: distinct ids, messages, and the owners' lookup. Before,
a few steps of sharded tables are checked against those of whole ones with the batches of both.

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
from benchmarks.targets import judge
from recis_lightning import EmbeddingEngine, EmbeddingOption, hash_tables
from recis_lightning.optim import SparseAdam

FEATURES, KNOWN, EXPONENT, RANKS = 26, 200_000, 1.05, 2
SHAPES = [(4096, 16), (4096, 64), (16384, 32)]  # ids a feature and rank, dim


class Step:
    """Engine, optimizer and a few batches."""

    def __init__(self, batch: int, dim: int, known: int, rank: int) -> None:
        rng = np.random.default_rng(rank)
        names = [f"c{n}" for n in range(FEATURES)]
        self.engine = EmbeddingEngine(dict.fromkeys(names, EmbeddingOption(dim)))
        self.sparse = SparseAdam(hash_tables(self.engine), lr=1e-3)
        ids = torch.arange(known) * 2654435761
        for table in hash_tables(self.engine):
            table.insert(ids, torch.zeros(known, dim))
        drawn = [zipf_ranks(rng, EXPONENT, known, (FEATURES, batch)) for _ in range(4)]
        self.batches = [dict(zip(names, ids[torch.from_numpy(d)], strict=True)) for d in drawn]
        self.gradient = torch.from_numpy(rng.standard_normal((batch, dim), np.float32))
        self.taken = 0

    def __call__(self) -> None:
        """Take one step."""
        found = self.engine(self.batches[self.taken % len(self.batches)])
        self.taken += 1
        torch.autograd.backward([*found.values()], [self.gradient] * len(found))
        self.sparse.step()

    def distinct(self) -> float:
        """Return the mean number of distinct ids of a batch, table by table."""
        counts = [sum(len(v.unique()) for v in batch.values()) for batch in self.batches]
        return float(np.mean(counts))


def _time(step: Step, rounds: int, together: Any) -> float:
    spent = []
    for number in range(rounds + 2):
        together.wait()
        start = time.perf_counter()
        step()
        if number >= 2:
            spent.append(time.perf_counter() - start)
    return median(spent)


def _whole(parts: Sequence[Step]) -> Step:
    """Return the step of one process that has the batches of all; gradients are averaged."""
    whole = parts[0]
    for number, batch in enumerate(whole.batches):
        for name in batch:
            batch[name] = torch.cat([part.batches[number][name] for part in parts])
    whole.gradient = torch.cat([part.gradient for part in parts]) / len(parts)
    return whole


def _join(rank: int, store: str) -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS
    )


def check(rank: int, store: str) -> None:
    """Refuse to time sharded tables whose rows are not those of whole ones."""
    shape = (64, 8, 300)
    whole, mine = _whole([Step(*shape, other) for other in range(RANKS)]), Step(*shape, rank)
    for _ in mine.batches:
        whole()
    _join(rank, store)
    for _ in mine.batches:
        mine()
    for table, wanted in zip(hash_tables(mine.engine), hash_tables(whole.engine), strict=True):
        ids = table.ids()
        assert 0 < len(ids) < len(wanted)
        torch.testing.assert_close(
            table.embeddings(ids), wanted.embeddings(ids), rtol=1e-4, atol=1e-6
        )
        count = torch.tensor(len(ids))
        distributed.all_reduce(count)
        assert int(count) == len(wanted)
    distributed.destroy_process_group()


def _measure(rank: int, folder: str, rounds: int, known: int, shapes: Any, together: Any) -> None:
    torch.set_num_threads(1)
    check(rank, f"{folder}/check")
    rows = []
    for batch, dim in shapes:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        step = Step(batch, dim, known, rank)
        alone = _time(step, rounds, together)
        _join(rank, f"{folder}/{batch}x{dim}")
        sharded = _time(step, rounds, together)
        ids, distinct = batch * FEATURES, step.distinct()
        travelling = distinct * (RANKS - 1) / RANKS  # the others are this rank's own
        row_bytes = 8 + 4 * dim + 4 * (dim + 1)  # id there, row home, gradient and its mark there
        rows.append(
            {
                "batch": batch,
                "dim": dim,
                "alone_ms": 1e3 * alone,
                "sharded_ms": 1e3 * sharded,
                "exchange_ns_an_id": 1e9 * (sharded - alone) / ids,
                "distinct_share": distinct / ids,
                "kib_a_step": travelling * row_bytes / 1024,
            }
        )
    if rank == 0:
        torch.save(rows, f"{folder}/rows.pt")
    distributed.destroy_process_group()


def measure(rounds: int, known: int = KNOWN, shapes: Any = SHAPES) -> dict[str, Any]:
    """Measure on two processes; return a line of results."""
    together = multiprocessing.get_context("spawn").Barrier(RANKS)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, rounds, known, shapes, together)
        multiprocessing.spawn(_measure, arguments, nprocs=RANKS)
        rows = torch.load(f"{folder}/rows.pt")
    columns = [*rows[0]]
    print_table(
        "A training step (Adam) on two ranks, one thread each",
        columns,
        [[*row.values()] for row in rows],
    )
    worst = max(row["exchange_ns_an_id"] for row in rows)
    return {"part": "exchange", "rows": rows, "figures": {"ns_an_id": worst}}


def main() -> int:
    """Measure, print and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dry", action="store_true", help="append nothing to the results")
    given = parser.parse_args()
    line = measure(given.rounds)
    good = judge("bench_sharding", line)
    if not given.dry:
        append_result("bench_sharding", line)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
