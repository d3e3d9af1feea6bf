"""Steps of a model on two ranks, with and without what travels while they compute.

Measures: ``recis_lightning.lookup.lookahead``, ``recis_lightning.lookup.prepared``,
``recis_lightning.lookup.early_gradients``, ``recis_lightning.distributed.ahead_channel``.

Kinds of steps: plain; "ids", with the next batch's ids exchanged ahead; "gradients", which travel
from the backward pass on; and "both".

Two processes of one thread each take Adam steps of a model under DDP on their own batches: 26
features, Zipf 1.05 over 2,000 known ids each, and a perceptron of 8 layers. Where the network is
played, each message of tables takes the time of a link on top, during which its thread sleeps.
Kinds of steps take turns in every round. Rows after the first steps are first checked to be equal.

    python benchmarks/bench_lookahead.py [--rounds N] [--dry]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import append_result, print_table, zipf_ranks
from recis_lightning import EmbeddingEngine, EmbeddingOption, hash_tables
from recis_lightning.lookup import look_ahead, overlap_backward
from recis_lightning.lookup.early_gradients import early_of
from recis_lightning.lookup.prepared import prepared_of
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer

FEATURES, KNOWN, EXPONENT, RANKS, LAYERS, WIDTH = 26, 2000, 1.05, 2, 8, 128
SHAPE = (256, 16)  # ids per feature and rank, dim
LINKS = {  # seconds a message, bytes a second
    "none": (0.0, float("inf")),
    "30 ms a message": (0.03, 1e9),
}
KINDS = ("plain", "ids", "gradients", "both")


class Step:
    """Training step of a model of its own.

    Args:
        shape: Ids of each feature, dim.
        known: Ids that each table has.
        kind: One of KINDS.
    """

    def __init__(self, shape: tuple[int, int], known: int, kind: str) -> None:
        batch, dim = shape
        rng = np.random.default_rng(distributed.get_rank())
        names = [f"c{n}" for n in range(FEATURES)]
        self.kind, self.num_steps = kind, 0
        self.engine = EmbeddingEngine(dict.fromkeys(names, EmbeddingOption(dim)))
        torch.manual_seed(0)
        widths = [FEATURES * dim, *[WIDTH] * (LAYERS - 1), 1]
        layers = [
            part for low, high in pairwise(widths) for part in (nn.Linear(low, high), nn.ReLU())
        ]
        self.tower = DistributedDataParallel(nn.Sequential(*layers[:-1]))
        self.optimizer = SparseDenseOptimizer(
            torch.optim.Adam(self.tower.parameters()), SparseAdam(hash_tables(self.engine), lr=1e-3)
        )
        ids = torch.arange(known) * 2654435761
        for table in hash_tables(self.engine):
            table.insert(ids, torch.zeros(known, dim))
        drawn = [zipf_ranks(rng, EXPONENT, known, (FEATURES, batch)) for _ in range(4)]
        self.batches = [dict(zip(names, ids[torch.from_numpy(d)], strict=True)) for d in drawn]

    def __call__(self) -> None:
        """Take one step."""
        number = self.num_steps % len(self.batches)
        self.num_steps += 1
        overlap_backward(self.kind in ("gradients", "both"))
        if self.kind in ("ids", "both"):
            look_ahead((self.engine, self.batches[self.num_steps % len(self.batches)]))
        self.tower(self.engine.concat(self.batches[number])).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _delayed(link: tuple[float, float]) -> Any:
    """Let each message of tables take the time of a link."""
    send = distributed.all_to_all_single

    def delayed(output: torch.Tensor, given: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        time.sleep(link[0] + given.nbytes / 2 / link[1])
        return send(output, given, *args, **kwargs)

    return patch.object(distributed, "all_to_all_single", send if link[0] == 0 else delayed)


def check(steps: dict[str, Step]) -> None:
    """Check that all kinds have the same rows, and that what was begun ahead was used."""
    assert prepared_of(None).num_used > 0
    assert early_of(None).num_used > 0
    first, *others = [hash_tables(step.engine) for step in steps.values()]
    for tables in others:
        for mine, its in zip(first, tables, strict=True):
            ids = mine.ids()
            assert torch.equal(ids.sort().values, its.ids().sort().values)
            assert torch.equal(mine.embeddings(ids), its.embeddings(ids))


def _measure(rank: int, folder: str, rounds: int, shape: Any, known: int, links: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    steps = {kind: Step(shape, known, kind) for kind in KINDS}
    for _ in range(5):
        for step in steps.values():
            step()
    check(steps)
    rows = []
    for name, link in links.items():
        spent: dict[str, list[float]] = {kind: [] for kind in steps}
        with _delayed(link):
            for _ in range(rounds):
                for kind, step in steps.items():
                    step()  # its first one follows another kind's
                    distributed.barrier()
                    start = time.perf_counter()
                    for _ in range(3):
                        step()
                    spent[kind].append(1e3 * (time.perf_counter() - start) / 3)
        rows.append(
            {"network": name} | {kind: quantiles(its, n=10)[0] for kind, its in spent.items()}
        )
    check(steps)
    if rank == 0:
        torch.save(rows, f"{folder}/rows.pt")
    distributed.destroy_process_group()


def measure(
    rounds: int, shape: Any = SHAPE, known: int = KNOWN, links: Any = LINKS
) -> dict[str, Any]:
    """Measure on two processes; return a line of results."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_measure, (folder, rounds, shape, known, links), nprocs=RANKS)
        rows = torch.load(f"{folder}/rows.pt")
    print_table(
        "A step (Adam, DDP, 8 layers) on two ranks, ms, tenth percentiles",
        [*rows[0]],
        [[*row.values()] for row in rows],
    )
    return {"part": "lookahead", "rows": rows}


def main() -> int:
    """Measure, print and append the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dry", action="store_true", help="append nothing to the results")
    given = parser.parse_args()
    line = measure(given.rounds)
    if not given.dry:
        append_result("bench_lookahead", line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
