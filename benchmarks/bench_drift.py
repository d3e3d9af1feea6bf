"""AUC loss and memory growth of bounded tables on a drifting stream.

Measures: ``recis_lightning.admission``, ``recis_lightning.eviction``,
``recis_lightning.ops.admission``, ``recis_lightning.table.admission_counter``.

The stream has 2M events of a user and an item. Both are drawn as Zipf ranks over slots. Every slot
changes its id every 250,000 events, with an offset of its own, so frequent and rare ids disappear
alike, and most ids never return. A teacher model (a bias per id, and a dot product of user and
item) draws the labels. The student has the same form and learns online: each batch is predicted
before it is learned. AUC is that of the predictions of the second half of the stream. All policies
see the same events and start from the same initial rows. Memory is ``nbytes`` of both tables after
every batch; its growth is measured after the warm-up, a quarter of the stream.

    python benchmarks/bench_drift.py [--num-events N] [--batch N] [--dry]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import RESULTS, append_result, print_table, zipf_ranks
from benchmarks.targets import meets_targets
from recis_lightning import EmbeddingEngine, EmbeddingOption, hash_tables
from recis_lightning.admission import Admission, BloomCount, MinCount
from recis_lightning.eviction import AnyOf, Eviction, GlobalStepFilter, MaxRows
from recis_lightning.initializers import Normal
from recis_lightning.optim import SparseAdagrad

SLOTS, LIFETIME, DIM, EVICT_EVERY = 20_000, 250_000, 8, 25
WARM_UP = 0.25  # fraction of the stream
POLICIES: dict[str, tuple[Admission | None, Eviction | None]] = {
    "unbounded": (None, None),
    "GlobalStepFilter(125)": (None, GlobalStepFilter(125)),
    "MaxRows(20k), LRU": (None, MaxRows(20_000)),
    "MaxRows(20k), LFU behind GlobalStepFilter(125)": (
        None,
        AnyOf([GlobalStepFilter(125), MaxRows(20_000, by="count")]),
    ),
    "MinCount(2), GlobalStepFilter(125)": (
        MinCount(2, forget_after=125),
        GlobalStepFilter(125),
    ),
    "BloomCount(2), MaxRows(12k), LRU": (BloomCount(2, 1 << 20), MaxRows(12_000)),
}


class Stream:
    """Sequence of events.

    Args:
        num_events: Number of events.
        seed: Seed of the random events.
    """

    def __init__(self, num_events: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.features = {}
        for name in ("user", "item"):
            slots = rng.permutation(SLOTS)[zipf_ranks(rng, 1.05, SLOTS, (num_events,))]
            births = rng.integers(0, LIFETIME, SLOTS)[slots]
            generation = (np.arange(num_events) + births) // LIFETIME
            self.features[name] = torch.from_numpy(slots + SLOTS * generation)
        teacher = _factors({"user": (None, None), "item": (None, None)}, 0.6, "teacher")
        with torch.no_grad():
            self.logits = torch.cat([_score(teacher, ids) for ids in self.batches(20_000)])
        chance = torch.from_numpy(rng.random(num_events))
        self.labels = (chance < torch.sigmoid(self.logits.double())).float()

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield the ids of each ``size`` events in turn."""
        batches = [ids.split(size) for ids in self.features.values()]
        for user, item in zip(*batches, strict=True):
            yield {"user": user, "item": item}


def _factors(
    policies: dict[str, tuple[Admission | None, Eviction | None]], std: float, kind: str
) -> EmbeddingEngine:
    return EmbeddingEngine(
        {
            name: EmbeddingOption(
                DIM,
                table=f"{kind}_{name}",
                initializer=Normal(std=std),
                admission=admission,
                eviction=eviction,
            )
            for name, (admission, eviction) in policies.items()
        }
    )


def _score(engine: EmbeddingEngine, ids: dict[str, Tensor]) -> Tensor:
    rows = engine(ids)
    user, item = rows["user"], rows["item"]
    return user[:, 0] + item[:, 0] + (user[:, 1:] * item[:, 1:]).sum(1)


def auc(scores: Tensor, labels: Tensor) -> float:
    """Return the area under the ROC curve; ties count half."""
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts - 1) / 2)[inverse]
    positives, total = float(labels.sum()), len(labels)
    above = float(ranks[labels > 0].sum()) - positives * (positives + 1) / 2
    return above / (positives * (total - positives))


def learn(
    stream: Stream, batch: int, admission: Admission | None, eviction: Eviction | None
) -> dict[str, Any]:
    """Train on the stream once; return the predictions, and bytes and rows after each batch."""
    policies = {name: (admission, eviction) for name in stream.features}
    engine = _factors(policies, 0.01, "student")
    tables = hash_tables(engine)
    optimizer = SparseAdagrad(tables, lr=0.15)
    scores, sizes, rows, evicting = [], [], [], 0.0
    start = time.perf_counter()
    for i, (ids, labels) in enumerate(
        zip(stream.batches(batch), stream.labels.split(batch), strict=True), start=1
    ):
        logits = _score(engine, ids)
        scores.append(logits.detach())
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        loss.backward()
        optimizer.step()
        evict_start = time.perf_counter()
        for table in tables:
            table.update_step()
            if i % EVICT_EVERY == 0:
                table.evict()
        evicting += time.perf_counter() - evict_start
        sizes.append(sum(table.nbytes for table in tables))
        rows.append(sum(map(len, tables)))
    return {
        "scores": torch.cat(scores),
        "sizes": np.array(sizes),
        "rows": np.array(rows),
        "seconds": time.perf_counter() - start,
        "evicting": evicting,
    }


def growth(sizes: np.ndarray[Any, Any]) -> float:
    """Return the largest size after the warm-up relative to that at its end, minus 1."""
    after = sizes[int(WARM_UP * len(sizes)) :]
    return float(after.max() / after[0] - 1)


def check() -> None:
    """Check the AUC, the stream's ids and labels, and the growth."""
    labels = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    assert abs(auc(torch.tensor([0.1, 0.4, 0.1, 0.2, 0.9]), labels) - 4.5 / 6) < 1e-9
    stream = Stream(3 * LIFETIME // 100)
    for ids in stream.features.values():
        assert len(ids) == 3 * LIFETIME // 100
        assert int(ids.max()) < 2 * SLOTS
    assert 0.2 < float(stream.labels.mean()) < 0.8
    assert growth(np.array([1, 2, 4, 4, 5, 4, 4, 4])) == 0.25


def measure(num_events: int, batch: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train with every policy; return the line of results, and the runs for the chart."""
    stream = Stream(num_events)
    second_half = slice(num_events // 2, None)
    distinct = sum(len(ids.unique()) for ids in stream.features.values())
    runs = {name: learn(stream, batch, *policy) for name, policy in POLICIES.items()}
    rows = []
    for name, run in runs.items():
        run["auc"] = auc(run["scores"][second_half], stream.labels[second_half])
        lost = runs["unbounded"]["auc"] - run["auc"]
        per_batch = 1e3 * run["seconds"] / len(run["sizes"])
        rows.append(
            [
                name,
                f"{run['rows'][-1]:,}",
                run["sizes"].max() / 1e6,
                growth(run["sizes"]),
                f"{run['auc']:.4f}",
                f"{lost:+.4f}",
                per_batch,
            ]
        )
    columns = ["policy", "rows", "peak MB", "growth", "AUC", "AUC loss", "ms per batch"]
    print_table(f"{num_events:,} events, {distinct:,} ids, batches of {batch}", columns, rows)
    best = auc(stream.logits[second_half], stream.labels[second_half])
    print(f"  AUC of the teacher: {best:.4f}")
    bounded = [name for name in runs if name != "unbounded"]
    figures = {
        "growth": max(growth(runs[name]["sizes"]) for name in bounded),
        "auc_lost": max(runs["unbounded"]["auc"] - runs[name]["auc"] for name in bounded),
        "growth_unbounded": growth(runs["unbounded"]["sizes"]),
        "auc_unbounded": runs["unbounded"]["auc"],
        "auc_teacher": best,
    }
    shape = {"num_events": num_events, "batch": batch, "distinct": distinct}
    line = {"part": "drift", "shape": shape, "columns": columns, "rows": rows, "figures": figures}
    return line, runs


def chart(runs: dict[str, Any], batch: int, path: Path) -> None:
    """Draw memory over events, and AUC over peak memory."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, run in runs.items():
        events = batch * np.arange(1, len(run["sizes"]) + 1) / 1e6
        (drawn,) = left.plot(events, run["sizes"] / 1e6, lw=1.6, label=name)
        right.plot(run["sizes"].max() / 1e6, run["auc"], "o", color=drawn.get_color(), ms=9)
    left.axvline(WARM_UP * events[-1], color="black", lw=0.8, ls=":")
    left.set(xlabel="million events", ylabel="MB of both tables", title="Memory")
    left.set_ylim(bottom=0)
    right.set(xlabel="peak MB of both tables", ylabel="AUC, second half", title="Quality")
    best = runs["unbounded"]["auc"]
    right.axhspan(best - 0.005, best, color="black", alpha=0.07, lw=0)
    right.set_ylim(best - 0.012, max(run["auc"] for run in runs.values()) + 0.004)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    """Check, measure, draw and append the results; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description="Bounded tables on a drifting stream")
    parser.add_argument("--num-events", type=int, default=2_000_000)
    parser.add_argument("--batch", type=int, default=2000)
    parser.add_argument("--dry", action="store_true", help="append nothing to the results")
    given = parser.parse_args()
    check()
    line, runs = measure(given.num_events, given.batch)
    all_met = meets_targets("bench_drift", line)
    if not given.dry:
        append_result("bench_drift", line)
        try:
            chart(runs, given.batch, RESULTS / "drift.png")
        except ImportError:
            print("  no chart: matplotlib is missing")
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
