"""Host time of a training step of sharded tables, by number of ranks, with a network that is free.

Measures: ``recis_lightning.lookup.exchange``, ``recis_lightning.lookup.regrouping``,
``recis_lightning.lookup.dedup``, ``recis_lightning.lookup.gradient_exchange``.

One process is rank 0 of all, on one thread; the other ranks are played: each asks rank 0 for the
ids that rank 0 asks of itself, and all messages arrive at once. Each table gets a few ids a step,
so that what is measured is the time for each table and rank, not for each id. Each number of ranks
has a process of its own; the numbers take turns in every round.

    python benchmarks/bench_many_ranks.py [--rounds N] [--dry]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, distributed

from benchmarks.harness import append_result, print_table
from benchmarks.targets import meets_targets
from recis_lightning import EmbeddingEngine, EmbeddingOption, hash_tables
from recis_lightning.optim import SparseAdam

RANKS, TABLES, BATCH, DIM, NUM_IDS = (1, 8, 128, 512), 200, 16, 16, 2000
WARMUP = 4


class Arrived:
    """Message that has arrived."""

    def wait(self) -> bool:
        """Return at once."""
        return True


def play(
    output: Tensor,
    message: Tensor,
    output_splits: list[int] | None = None,
    input_splits: list[int] | None = None,
    group: Any = None,
    async_op: bool = False,
) -> Arrived | None:
    """Play ``all_to_all_single``: each rank sends to rank 0 what rank 0 sends to itself."""
    num_ranks = distributed.get_world_size()
    own = message[: input_splits[0] if input_splits else len(message) // num_ranks]
    if output_splits is None or set(output_splits) == {len(own)}:
        output.view(num_ranks, *own.shape).copy_(own.expand(num_ranks, *own.shape))
    else:  # an answer, whose values do not matter
        size = min(output.numel(), message.numel())
        output.view(-1)[:size] = message.reshape(-1)[:size]
    return Arrived() if async_op else None


def run(num_ranks: int, num_tables: int, rounds: int) -> list[float]:
    """Return the median milliseconds of a lookup, its backward pass and the optimizer's step."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if num_ranks == 1:
        return _time_steps(num_tables, rounds)
    distributed.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    try:
        with patch.object(distributed, "all_to_all_single", play):
            return _time_steps(num_tables, rounds)
    finally:
        distributed.destroy_process_group()


def _time_steps(num_tables: int, rounds: int) -> list[float]:
    names = [f"c{i}" for i in range(num_tables)]
    engine = EmbeddingEngine({name: EmbeddingOption(DIM) for name in names})
    sparse = SparseAdam(hash_tables(engine), lr=1e-3)
    for table in hash_tables(engine):
        table.insert(torch.arange(NUM_IDS), torch.zeros(NUM_IDS, DIM))
    generator = torch.Generator().manual_seed(0)
    times = []
    for step in range(-WARMUP, rounds):
        drawn = torch.randint(NUM_IDS, (num_tables, BATCH), generator=generator)
        start = time.perf_counter()
        out = engine(dict(zip(names, drawn, strict=True)))
        looked_up = time.perf_counter()
        loss = torch.stack([*out.values()]).sum()
        summed = time.perf_counter()
        loss.backward()
        passed = time.perf_counter()
        sparse.step()
        if step >= 0:
            times.append((looked_up - start, passed - summed, time.perf_counter() - passed))
    return [1e3 * median(part) for part in zip(*times, strict=True)]


def measure(rounds: int, num_tables: int = TABLES, runs: int = 3) -> dict[str, Any]:
    """Time all numbers of ranks in turn; return a line of results."""
    found: dict[int, list[list[float]]] = {number: [] for number in RANKS}
    for _ in range(runs):
        for number, parts in found.items():
            call = [sys.executable, __file__, "--run", str(number), str(num_tables), str(rounds)]
            done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
            parts.append(json.loads(done.stdout.splitlines()[-1]))
    columns = ["ranks", "lookup ms", "backward ms", "step ms", "together ms", "least", "most"]
    rows = []
    for number, parts in found.items():
        sums = [sum(part) for part in parts]
        medians = [median(part) for part in zip(*parts, strict=True)]
        rows.append([number, *medians, median(sums), min(sums), max(sums)])
    print_table(f"{num_tables} tables, {BATCH} ids of each a step, one thread", columns, rows)
    together = {row[0]: row[4] for row in rows}
    one, few, *_, many = (together[number] for number in RANKS)
    figures = {"few_to_one": few / one, "many_to_few": many / few}
    return {"part": "host", "columns": columns, "rows": rows, "figures": figures}


def main(given: list[str] | None = None) -> int:
    """Measure, print and append the results; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="steps of a run")
    parser.add_argument("--dry", action="store_true", help="append nothing to the results")
    parser.add_argument("--run", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.run:
        torch.set_num_threads(1)
        print(json.dumps(run(*arguments.run)))
        return 0
    line = measure(arguments.rounds)
    all_met = meets_targets("bench_many_ranks", line)
    if not arguments.dry:
        append_result("bench_many_ranks", line)
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
