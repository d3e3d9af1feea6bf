"""What the benchmarks are to reach, and how a figure is read from a line of their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import is_on_gpu

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """One figure and its bound.

    Attributes:
        benchmark: Whose results hold it.
        part: Which of their lines.
        what: What is measured, in words.
        read: Takes the figure from a line; None where the peer was missing.
        bound: What it is to reach, None where nothing was promised.
        least: Whether the figure is to be at least the bound (else at most).
        unit: What the figure counts; "x" for times as fast as the peer.
    """

    benchmark: str
    part: str
    what: str
    read: Callable[[Line], float | None]
    bound: float | None = None
    least: bool = True
    unit: str = "x"

    def is_met(self, value: float) -> bool:
        """Return whether ``value`` is within the bound."""
        if self.bound is None:
            return True
        return value >= self.bound if self.least else value <= self.bound

    def wanted(self) -> str:
        """Return the bound in words."""
        return "" if self.bound is None else f"{'>=' if self.least else '<='} {self.bound:g}"


def figure(name: str) -> Callable[[Line], float | None]:
    """Read one of the figures that a line names."""

    def read(line: Line) -> float | None:
        value = line["figures"].get(name)
        return None if value is None else float(value)

    return read


def mean_of(column: int) -> Callable[[Line], float | None]:
    """Read the geometric mean of a column of the line's table."""

    def read(line: Line) -> float | None:
        product = 1.0
        for row in line["rows"]:
            product *= row[column]
        return None if product != product else float(product ** (1 / len(line["rows"])))

    return read


def cell(row: int, column: int) -> Callable[[Line], float | None]:
    """Read one cell of the line's table."""
    return lambda line: float(line["rows"][row][column])


def worst(column: int) -> Callable[[Line], float | None]:
    """Read the largest value of a column of the line's table."""
    return lambda line: float(max(row[column] for row in line["rows"]))


_BAG, _INDEX, _FILTER = "bench_embedding_bag", "bench_hash_index", "bench_filter"
_UPDATE, _TRAINING, _SAVING = "bench_row_update", "bench_training", "bench_checkpoint"
TARGETS = [
    Target(_BAG, "train", "training step / nn.Embedding + SparseAdam", mean_of(3), 5),
    Target(_BAG, "train", "training step / FBGEMM, Adagrad", mean_of(8), 2.5),
    Target(_BAG, "train", "training step at dim 64 over its limit", cell(1, 5), 2.5, False, "of"),
    Target(_BAG, "multi_hot", "20 ids a bag / nn.EmbeddingBag + SparseAdam", mean_of(3), 3),
    Target(
        _BAG, "evaluation", "evaluation lookup, cost / static table", worst(3), 1.3, False, "of"
    ),
    Target(_BAG, "features", "400 features, cost / 26", cell(0, 3), 1.5, False, "of"),
    Target(
        _BAG, "features", "400 features joined by torch, cost / 26", cell(1, 3), None, False, "of"
    ),
    Target(_INDEX, "find", "find in 10M ids / C++ map, two threads", figure("ratio"), 2),
    Target(_INDEX, "find", "find in 10M ids / C++ map, one thread", figure("ratio_one"), 2),
    Target(_INDEX, "insert", "insert 10M ids / C++ map", figure("ratio"), 10),
    Target(_INDEX, "insert", "insert 10M ids / C++ map with reserve", figure("ratio_reserved")),
    Target(_INDEX, "insert", "insert 10M ids, rows too / C++ map", figure("ratio_rows")),
    Target(_UPDATE, "adam", "row update / torch.optim.SparseAdam", figure("ratio")),
    Target(_UPDATE, "adagrad", "row update / torch.optim.Adagrad", figure("ratio")),
    Target(_UPDATE, "sgd", "row update / torch.optim.SGD", figure("ratio")),
    Target(_TRAINING, "lightning", "Lightning step, DLRM / nn.Embedding", figure("ratio")),
    Target(_TRAINING, "lightning", "embeddings' share of it", figure("share"), None, False, "of"),
    Target(_SAVING, "save", "checkpoint saved / safetensors", figure("ratio"), 0.7),
    Target(_SAVING, "load", "checkpoint loaded / safetensors, in cache", figure("ratio"), 0.7),
    Target(_SAVING, "cold", "checkpoint loaded / safetensors, from disk", figure("ratio"), 0.7),
    Target(_SAVING, "state_dict save", "state_dict saved / safetensors", figure("ratio")),
    Target(_SAVING, "state_dict load", "state_dict loaded / safetensors", figure("ratio")),
    Target(_FILTER, "evict", "evict 1M of 10M rows", figure("seconds"), 0.5, False, "s"),
    Target("bench_memory", "grow", "peak memory over payload", figure("peak"), 1.35, False, "of"),
    Target("bench_memory", "grow", "longest step on the way up", figure("longest"), 2, False, "s"),
    Target(
        "bench_compaction",
        "shrink",
        "nbytes given back by evicting 9M of 10M rows, of all rows' share",
        figure("counted"),
        0.8,
        True,
        "of",
    ),
    Target(
        "bench_compaction",
        "shrink",
        "resident memory given back, of all rows' share",
        figure("returned"),
        0.8,
        True,
        "of",
    ),
    Target(
        "bench_drift",
        "drift",
        "growth of bounded tables after warm-up",
        figure("growth"),
        0.1,
        False,
        "of",
    ),
    Target(
        "bench_drift",
        "drift",
        "AUC that bounded tables lose on a drifting stream",
        figure("auc_lost"),
        0.005,
        False,
        "AUC",
    ),
    Target(
        "bench_hooks",
        "",
        "what all three hooks add to the demo's step, of it",
        lambda line: float(line["ratio"]["all three"]) - 1,
        0.02,
        False,
        "of",
    ),
    Target(
        "bench_hooks",
        "",
        "what MetricReportHook adds to it",
        lambda line: line["ratio"].get("MetricReportHook", 1) - 1,
        0.01,
        False,
        "of",
    ),
]


def judge(benchmark: str, line: Line) -> bool:
    """Print which targets a line of results meets; return whether it meets all of its own.

    The bounds are those of a CPU: figures of a GPU are not judged by them.
    """
    good = True
    if is_on_gpu():
        return good
    for target in TARGETS:
        if (target.benchmark, target.part) != (benchmark, line.get("part", "")):
            continue
        value = target.read(line)
        if value is None or target.bound is None:
            continue
        met = target.is_met(value)
        good &= met
        verdict = "met" if met else "MISSED"
        print(f"  {target.what}: {value:.3g} {target.unit}, target {target.wanted()}: {verdict}")
    return good
