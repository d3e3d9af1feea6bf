"""Targets of the benchmarks, and readers of the figures in a line of their results."""

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
        benchmark: Name of the benchmark, and of its results file.
        part: The benchmark's part that measures it.
        label: Description of the figure.
        read: Returns the figure of a line; None if the peer was missing.
        bound: The bound; None if there is no target.
        at_least: Whether the bound is a lower one (else an upper one).
        unit: Unit of the figure; "x" for the speed-up over the peer, "of" for a fraction.
    """

    benchmark: str
    part: str
    label: str
    read: Callable[[Line], float | None]
    bound: float | None = None
    at_least: bool = True
    unit: str = "x"

    def is_met(self, value: float) -> bool:
        """Return whether ``value`` is within the bound."""
        if self.bound is None:
            return True
        return value >= self.bound if self.at_least else value <= self.bound

    def bound_text(self) -> str:
        """Return the bound with its relation, such as ">= 2"; "" if there is none."""
        return "" if self.bound is None else f"{'>=' if self.at_least else '<='} {self.bound:g}"


def figure(name: str) -> Callable[[Line], float | None]:
    """Return a reader of the line's figure ``name``."""

    def read(line: Line) -> float | None:
        value = line["figures"].get(name)
        return None if value is None else float(value)

    return read


def mean_of(column: int) -> Callable[[Line], float | None]:
    """Return a reader of the geometric mean of a column of the line's table."""

    def read(line: Line) -> float | None:
        product = 1.0
        for row in line["rows"]:
            product *= row[column]
        return None if product != product else float(product ** (1 / len(line["rows"])))

    return read


def cell(row: int, column: int) -> Callable[[Line], float | None]:
    """Return a reader of one cell of the line's table."""
    return lambda line: float(line["rows"][row][column])


def maximum(column: int) -> Callable[[Line], float | None]:
    """Return a reader of the largest value of a column of the line's table."""
    return lambda line: float(max(row[column] for row in line["rows"]))


_BAG, _INDEX, _FILTER = "bench_embedding_bag", "bench_hash_index", "bench_filter"
_MODEL, _RANKS, _SHARDING = "bench_in_model", "bench_many_ranks", "bench_sharding"
_UPDATE, _TRAINING, _SAVING = "bench_row_update", "bench_training", "bench_checkpoint"
TARGETS = [
    Target(_MODEL, "in_model", "in a model / one nn.Embedding + SparseAdam", figure("fused"), 5),
    Target(_MODEL, "in_model", "in a model / FBGEMM, Adagrad", figure("fbgemm"), 4),
    Target(_MODEL, "in_model", "time in a model / alone", figure("alone"), 1.2, False, "of"),
    Target(
        _MODEL,
        "in_model",
        "in a model at dim 64 / bandwidth limit",
        lambda line: float(line["figures"]["limit_shapes"][1]),
        2,
        False,
        "of",
    ),
    Target(_MODEL, "in_model", "in a model / 26 nn.Embedding + SparseAdam", figure("tables")),
    Target(_MODEL, "in_model", "whole step / one nn.Embedding + SparseAdam", figure("step")),
    Target(_BAG, "train", "training step / nn.Embedding + SparseAdam", mean_of(3), 5),
    Target(_BAG, "train", "training step / FBGEMM, Adagrad", mean_of(8), 2.5),
    Target(
        _BAG, "train", "training step at dim 64 / bandwidth limit", cell(1, 5), 2.5, False, "of"
    ),
    Target(_BAG, "multi_hot", "bags of 20 ids / nn.EmbeddingBag + SparseAdam", mean_of(3), 3),
    Target(
        _BAG, "evaluation", "time of evaluation lookup / static table", maximum(3), 1.3, False, "of"
    ),
    Target(_BAG, "features", "time of 400 features / 26", cell(0, 3), 1.5, False, "of"),
    Target(_BAG, "features", "time of 400 features, concat / 26", cell(1, 3), 1.15, False, "of"),
    Target(_BAG, "features", "time of 400 features, torch.cat / 26", cell(2, 3), None, False, "of"),
    Target(_INDEX, "find", "find in 10M ids / C++ map, two threads", figure("ratio"), 2),
    Target(_INDEX, "find", "find in 10M ids / C++ map, one thread", figure("ratio_one"), 2),
    Target(_INDEX, "insert", "insert 10M ids / C++ map", figure("ratio"), 10),
    Target(_INDEX, "insert", "insert 10M ids / C++ map with reserve", figure("ratio_reserved")),
    Target(_INDEX, "insert", "insert 10M ids with rows / C++ map", figure("ratio_rows")),
    Target(_UPDATE, "adam", "row update / torch.optim.SparseAdam", figure("ratio")),
    Target(_UPDATE, "adagrad", "row update / torch.optim.Adagrad", figure("ratio")),
    Target(_UPDATE, "sgd", "row update / torch.optim.SGD", figure("ratio")),
    Target(_TRAINING, "lightning", "Lightning step, DLRM / nn.Embedding", figure("ratio")),
    Target(
        _TRAINING,
        "lightning",
        "embeddings' share of the Lightning step",
        figure("share"),
        None,
        False,
        "of",
    ),
    Target(_SAVING, "save", "save checkpoint / safetensors", figure("ratio"), 0.7),
    Target(_SAVING, "load", "load checkpoint / safetensors, in cache", figure("ratio"), 0.7),
    Target(_SAVING, "cold", "load checkpoint / safetensors, from disk", figure("ratio"), 0.7),
    Target(_SAVING, "state_dict save", "save state_dict / safetensors", figure("ratio"), 0.7),
    Target(_SAVING, "state_dict load", "load state_dict / safetensors", figure("ratio")),
    Target(
        _SAVING,
        "state_dict mapped load",
        "load state_dict, mapped / safetensors",
        figure("ratio"),
        0.7,
    ),
    Target(_FILTER, "evict", "evict 1M of 10M rows", figure("seconds"), 0.5, False, "s"),
    Target(_RANKS, "host", "host, 8 ranks / unsharded", figure("few_to_one"), 3, False, "of"),
    Target(_RANKS, "host", "host, 512 ranks / 8", figure("many_to_few"), 2, False, "of"),
    Target(_SHARDING, "exchange", "exchange / before", figure("to_before"), 0.7, False, "of"),
    Target(_SHARDING, "exchange", "together / engine", figure("together"), 1.3, False, "of"),
    Target(_SHARDING, "exchange", "one by one / engine", figure("one_by_one"), None, False, "of"),
    Target("bench_memory", "grow", "peak memory / payload", figure("peak"), 1.35, False, "of"),
    Target(
        "bench_memory", "grow", "longest step of a growing table", figure("longest"), 2, False, "s"
    ),
    Target(
        "bench_mapped_rows",
        "zipf 1.2",
        "speed with a tenth of the rows' bytes in memory / all, Zipf 1.2",
        figure("ratio"),
        0.5,
        True,
        "of",
    ),
    Target(
        "bench_mapped_rows",
        "zipf 1.05",
        "speed with a tenth of the rows' bytes in memory / all, Zipf 1.05",
        figure("ratio"),
        None,
        True,
        "of",
    ),
    Target(
        "bench_compaction",
        "shrink",
        "nbytes freed by evicting 9M of 10M rows / bytes of all rows",
        figure("counted"),
        0.8,
        True,
        "of",
    ),
    Target(
        "bench_compaction",
        "shrink",
        "resident memory freed by it / bytes of all rows",
        figure("returned"),
        0.8,
        True,
        "of",
    ),
    Target(
        "bench_drift",
        "drift",
        "growth of bounded tables after the warm-up",
        figure("growth"),
        0.1,
        False,
        "of",
    ),
    Target(
        "bench_drift",
        "drift",
        "AUC loss of bounded tables on a drifting stream",
        figure("auc_lost"),
        0.005,
        False,
        "AUC",
    ),
    Target(
        "bench_hooks",
        "",
        "overhead of all three hooks / the demo's step",
        lambda line: float(line["ratio"]["all three"]) - 1,
        0.02,
        False,
        "of",
    ),
    Target(
        "bench_hooks",
        "",
        "overhead of MetricReportHook / the demo's step",
        lambda line: line["ratio"].get("MetricReportHook", 1) - 1,
        0.01,
        False,
        "of",
    ),
]


def meets_targets(benchmark: str, line: Line) -> bool:
    """Print the targets of a line of results, met or missed; return whether all are met.

    The bounds apply to a CPU; figures of a GPU always pass.
    """
    all_met = True
    if is_on_gpu():
        return all_met
    for target in TARGETS:
        if (target.benchmark, target.part) != (benchmark, line.get("part", "")):
            continue
        value = target.read(line)
        if value is None or target.bound is None:
            continue
        met = target.is_met(value)
        all_met &= met
        verdict = "met" if met else "MISSED"
        bound = target.bound_text()
        print(f"  {target.label}: {value:.3g} {target.unit}, target {bound}: {verdict}")
    return all_met
