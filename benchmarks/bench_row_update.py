"""Optimizer steps: sort, reduce and apply gradients, without lookup or backward.

Measures: ``recis_lightning.ops.row_update``, ``recis_lightning.optim.fused_update``.

26 features, Zipf 1.05, 200,000 known ids per feature, one id each, as in ``bench_embedding_bag``.
Timing starts when the gradients exist: for ours, backward has stored (row, position of its
gradient); for torch they are the uncoalesced sparse gradients of ``nn.Embedding(sparse=True)``,
which its optimizers coalesce. The bandwidth limit is the number of bytes that an update must move,
divided by the machine's copy rate.

    python benchmarks/bench_row_update.py [--rounds N] [--device D] [--dry]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.bench_embedding_bag import LR, NUM_IDS, SPREAD, TRAIN_SHAPES, Data, Ours, Static
from benchmarks.harness import (
    add_device,
    append_result,
    copy_gb_per_s,
    geometric_mean,
    print_table,
    time_prepared,
    use_device,
)
from benchmarks.targets import meets_targets
from recis_lightning import hash_tables
from recis_lightning.optim import SparseAdagrad, SparseAdam, SparseSGD

# Our optimizer, torch's, and the number of state values per weight.
RULES: dict[str, tuple[Callable[..., Any], Callable[..., Any], int]] = {
    "adam": (SparseAdam, torch.optim.SparseAdam, 2),
    "adagrad": (SparseAdagrad, torch.optim.Adagrad, 1),
    "sgd": (SparseSGD, torch.optim.SGD, 0),
}


def limit_bytes(data: Data, state_words: int) -> float:
    """Return the bytes that an update must move.

    Gradients and their row numbers are read once; unique rows are read and written.
    """
    num_ids = data.num_features * data.batch
    return num_ids * (8 + 4 * data.dim) + data.num_unique() * 8 * data.dim * (1 + state_words)


def prepare_update(step: Ours | Static, data: Data) -> Callable[[], Callable[[], None]]:
    """Return a function that runs lookup and backward, and returns the update."""

    def prepare() -> Callable[[], None]:
        step.optimizer.zero_grad()
        i = step.num_calls % len(data.ranks)
        if isinstance(step, Ours):
            out = [*step.engine(step.batches[i]).values()]
        else:
            pairs = zip(step.tables, data.ranks[i], strict=True)
            out = [table(ranks) for table, ranks in pairs]
        step.num_calls += 1
        torch.autograd.backward(out, data.gradients)
        return step.optimizer.step

    return prepare


def check(data: Data) -> None:
    """Check three updates of each optimizer against torch's."""
    for our_optimizer, torch_optimizer, _ in RULES.values():
        ours, peer = Ours(data, our_optimizer), Static(data, torch_optimizer)
        for _ in range(3):
            prepare_update(ours, data)()()
            prepare_update(peer, data)()()
        known = torch.arange(NUM_IDS)
        for table, static in zip(hash_tables(ours.engine), peer.tables, strict=True):
            weights = table.embeddings(known * SPREAD)
            assert weights.any()
            torch.testing.assert_close(weights, static.weight.data)


def measure(name: str, rounds: int, rate: float) -> dict[str, Any]:
    """Time one optimizer on all shapes."""
    our_optimizer, torch_optimizer, state_words = RULES[name]
    rows = []
    for batch, dim in TRAIN_SHAPES:
        data = Data(26, batch, dim)
        contenders = {
            "ours": prepare_update(Ours(data, our_optimizer), data),
            "torch": prepare_update(Static(data, torch_optimizer), data),
        }
        times = time_prepared(contenders, rounds, warmup=2)
        limit = limit_bytes(data, state_words) / rate / 1e6
        ratio = times["torch"] / times["ours"]
        row = [f"{batch} x 26, dim {dim}", times["ours"], times["torch"], ratio, limit]
        rows.append([*row, times["ours"] / limit])
    columns = [name, "ours ms", "torch ms", "ratio", "limit ms", "of limit"]
    print_table(f"Row update, {name}", columns, rows)
    mean = geometric_mean([row[3] for row in rows])
    print(f"  geometric mean: {mean:.2f}")
    figures = {"ratio": mean, "of_limit": geometric_mean([row[5] for row in rows])}
    return {"part": name, "columns": columns, "rows": rows, "figures": figures}


def main(arguments: list[str] | None = None) -> int:
    """Check, time and append the results; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description="Row updates and torch's sparse optimizers")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rule", choices=[*RULES])
    parser.add_argument("--dry", action="store_true", help="append nothing to the results")
    add_device(parser)
    given = parser.parse_args(arguments)
    use_device(given.device)
    check(Data(3, 512, 16))
    rate = copy_gb_per_s()
    print(f"copy rate {rate:.1f} GB/s, {torch.get_num_threads()} threads, lr {LR}")
    all_met = True
    for name in RULES if given.rule is None else [given.rule]:
        line = {**measure(name, given.rounds, rate), "copy_gb_per_s": rate}
        all_met &= meets_targets("bench_row_update", line)
        if not given.dry:
            append_result("bench_row_update", line)
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
