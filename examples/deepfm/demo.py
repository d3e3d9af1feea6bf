"""Train DeepFM on MovieLens-100k with the three hooks, test it, and print a summary.

From the root of the repository: ``python -m examples.deepfm.demo``, or ``make demo``.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl

from examples.deepfm.history import History
from examples.deepfm.train import hooks, movielens_data, movielens_model, one_thread, trainer
from recis_lightning import HashTable, hash_tables
from recis_lightning.callbacks import ProfilerHook

LOUD = ("lightning.pytorch", "lightning.fabric")  # loggers that would hide our lines
_COLOURS = ("#2a78d6", "#eb6834", "#1baf7a", "#4a3aa7")
_INK, _FAINT = "#333333", "#dddddd"


def main(args: Sequence[str] | None = None) -> None:
    """Train, test and print a summary."""
    parser = argparse.ArgumentParser("python -m examples.deepfm.demo", description=main.__doc__)
    parser.add_argument("--root", default="data/ml-100k", help="folder of the data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/demo"))
    given = parser.parse_args(args)
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning.*")

    one_thread()
    L.seed_everything(given.seed, verbose=False)
    print(f"MovieLens-100k in {given.root} (downloaded if missing)")
    data = movielens_data(given.root, seed=given.seed)
    model, history = movielens_model(), History()
    profiler: ProfilerHook
    callbacks = [history, *hooks(given.output_dir / "timeline")]
    profiler = next(hook for hook in callbacks if isinstance(hook, ProfilerHook))
    runner = trainer(
        given.output_dir,
        callbacks,
        max_epochs=given.epochs,
        val_check_interval=0.25,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    runner.fit(model, data)
    seconds = time.perf_counter() - start
    scores = runner.test(model, data, verbose=False)[0]

    picture = given.output_dir / "history.png"
    draw(history, picture)
    print(f"\nDeepFM on MovieLens-100k: {len(history.losses)} batches in {seconds:.0f} s\n")
    print(f"  test AUC   {scores['test_auc']:.4f}")
    print(f"  test GAUC  {scores['test_gauc']:.4f}\n")
    print(table_summary(hash_tables(model), history.evicted))
    print("\n  traces, for chrome://tracing or ui.perfetto.dev:")
    for path in profiler.trace_paths:
        print(f"    {path}")
    print(f"  picture:\n    {picture}")


def table_summary(tables: Sequence[HashTable], evicted: dict[str, int]) -> str:
    """Return a line for each table and one for all of them.

    Example:
        >>> print(table_summary([HashTable(2, name="user")], {"user": 3}))
          table             rows   evicted       KiB
          user                 0         3         1
          all                  0         3         1
    """
    lines = [f"  {'table':<12}{'rows':>10}{'evicted':>10}{'KiB':>10}"]
    figures = [(t.name, len(t), evicted.get(t.name, 0), t.nbytes / 1024) for t in tables]
    totals = [sum(column) for column in list(zip(*figures, strict=True))[1:]]
    for name, rows, num_evicted, kib in [*figures, ("all", *totals)]:
        lines.append(f"  {name:<12}{rows:>10,}{num_evicted:>10,}{kib:>10,.0f}")
    return "\n".join(lines)


def draw(history: History, path: Path) -> None:
    """Write a picture of loss, validation AUC and table sizes over training batches."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    style: dict[Any, Any] = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _FAINT,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.titlecolor": _INK,
        "grid.color": _FAINT,
        "grid.linewidth": 0.6,
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
    }
    with plt.rc_context(style):
        figure, (loss, auc, rows) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
        batches = range(1, len(history.losses) + 1)
        loss.set_title("Training loss")
        loss.plot(batches, history.losses, color=_COLOURS[0], alpha=0.25, linewidth=0.8)
        loss.plot(batches, smooth(history.losses), color=_COLOURS[0], linewidth=2)

        auc.set_title("Validation AUC and GAUC")
        for name, colour in zip(("auc", "gauc"), _COLOURS, strict=False):
            points = [(n, s[f"val_{name}"]) for n, s in history.scores if f"val_{name}" in s]
            if points:
                line: dict[str, Any] = {
                    "color": colour,
                    "linewidth": 2,
                    "marker": "o",
                    "label": name.upper(),
                }
                auc.plot([n for n, _ in points], [value for _, value in points], **line)
                auc.legend(loc="lower right", frameon=False, fontsize=9)

        rows.set_title("Rows of the largest tables")
        largest = sorted(history.rows, key=lambda name: max(history.rows[name]), reverse=True)
        for name, colour in zip(largest, _COLOURS, strict=False):
            sizes = history.rows[name]
            rows.plot(batches, sizes, color=colour, linewidth=2)
            _label(rows, (len(sizes), sizes[-1]), name, colour)
        rows.set_ylim(bottom=0)
        for axes in (loss, auc, rows):
            axes.set_xlabel("training batches", fontsize=9)
            axes.set_xlim(0, len(history.losses) * 1.02)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _label(axes: mpl.axes.Axes, point: tuple[float, float], text: str, colour: str) -> None:
    offset: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, point, color=colour, fontsize=9, annotation_clip=False, **offset)


def smooth(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """Return the exponential moving average with weight ``keep`` on the past, bias-corrected.

    Example:
        >>> smooth([1.0, 1.0, 4.0], keep=0.5)
        [1.0, 1.0, 2.7142857142857144]
    """
    sums = accumulate(values, lambda past, x: keep * past + (1 - keep) * x, initial=0.0)
    weights = (1 - keep**n for n in range(len(values) + 1))
    return [s / w for s, w in list(zip(sums, weights, strict=True))[1:]]


if __name__ == "__main__":
    main()
