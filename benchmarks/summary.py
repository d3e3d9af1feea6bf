"""One table and one chart of all benchmarks, from the newest result of each part.

    python -m benchmarks.summary [--results FOLDER]

The chart, ``benchmarks.png`` beside the results, has two panels. The first shows the speed-ups over
the peers, with a mark at each target. The second shows each other figure as a percentage of its
bound; for a lower bound it is the inverse, so that more than 100% always misses the target.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import RESULTS, print_table
from benchmarks.targets import TARGETS, Line, Target

MET, MISSED, PLAIN = "#2a7f62", "#c0392b", "#7f8c8d"


@dataclass(frozen=True)
class Entry:
    """A target, its measured value, and the line of results that the value comes from."""

    target: Target
    value: float
    line: Line

    @property
    def verdict(self) -> str:
        if self.target.bound is None:
            return ""
        return "met" if self.target.is_met(self.value) else "MISSED"

    @property
    def share(self) -> float:
        """Fraction of the bound; above 1 the target is missed, for lower and upper bounds."""
        bound = self.target.bound or 1
        return bound / self.value if self.target.at_least else self.value / bound


def newest_lines(folder: Path) -> dict[tuple[str, str], Line]:
    """Return the last line of each (benchmark, part) under ``folder`` that a CPU produced."""
    newest: dict[tuple[str, str], Line] = {}
    for path in sorted(folder.glob("bench_*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if line.get("device", "cpu") != "cpu":
                continue
            newest[path.stem, line.get("part", line.get("task", ""))] = line
    return newest


def entries(newest: dict[tuple[str, str], Line]) -> list[Entry]:
    """Return all measured figures, in the order of ``TARGETS``."""
    measured = []
    for target in TARGETS:
        line = newest.get((target.benchmark, target.part))
        value = None if line is None else target.read(line)
        if line is not None and value is not None:
            measured.append(Entry(target, value, line))
    return measured


def table(measured: list[Entry]) -> None:
    """Print the table, and the machines that its figures come from."""
    rows: list[list[Any]] = [
        [
            entry.target.label,
            f"{entry.value:.3g}{'x' if entry.target.unit == 'x' else ''}"
            f"{' s' if entry.target.unit == 's' else ''}",
            entry.target.bound_text(),
            entry.verdict,
            entry.line["commit"] + ("+" if entry.line["dirty"] else ""),
        ]
        for entry in measured
    ]
    print_table("Benchmarks", ["figure", "measured", "target", "", "commit"], rows)
    machines = {f"{e.line['cpu']}, {e.line['threads']} threads" for e in measured}
    print("  " + "; ".join(sorted(machines)) + "; + marks a commit with uncommitted changes")
    names = dict.fromkeys((t.benchmark, t.part, t.label) for t in TARGETS)
    seen = {(e.target.benchmark, e.target.part, e.target.label) for e in measured}
    for benchmark, part, label in names:
        if (benchmark, part, label) not in seen:
            print(f"  not measured: {label} ({benchmark})")


def quality(newest: dict[tuple[str, str], Line]) -> None:
    """Print the AUCs of ``bench_quality``, which has no times."""
    for (benchmark, task), line in newest.items():
        if benchmark == "bench_quality":
            means = "; ".join(f"{kind} {value:.4f}" for kind, value in line["mean"].items())
            print(f"  test AUC, {task}: {means}")


def chart(measured: list[Entry], path: Path) -> None:
    """Draw both panels into ``path``."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    faster = [entry for entry in measured if entry.target.unit == "x"][::-1]
    bounded = [e for e in measured if e.target.unit != "x" and e.target.bound is not None][::-1]
    sizes = [len(faster) + 1, len(bounded) + 1]
    figure, (top, bottom) = plt.subplots(
        2,
        1,
        figsize=(10, 1.6 + 0.33 * sum(sizes)),
        gridspec_kw={"height_ratios": sizes},
        layout="constrained",
    )
    _bars(top, faster, [entry.value for entry in faster], "{:.1f}x")
    for y, entry in enumerate(faster):
        if entry.target.bound is not None:
            top.plot([entry.target.bound] * 2, [y - 0.4, y + 0.4], color="black", lw=2)
    top.set_xscale("log")
    top.axvline(1, color="black", lw=0.8, ls=":")
    ticks = [tick for tick in (0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 50) if _inside(tick, faster)]
    top.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    top.minorticks_off()
    top.set_title("Speed-up over the peer (black mark: target)", loc="left")
    shares = [entry.share for entry in bounded]
    _bars(bottom, bounded, shares, "{:.0%}")
    bottom.axvline(1, color="black", lw=2, zorder=0)
    bottom.set_xlim(0, max([1.15, *(1.15 * share for share in shares)]))
    bottom.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    bottom.set_title("Percentage of the bound (above 100%: target missed)", loc="left")
    line = measured[0].line
    figure.supxlabel(f"{line['cpu']}, {line['threads']} threads, torch {line['torch']}", size=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _inside(tick: float, drawn: list[Entry]) -> bool:
    values = [entry.value for entry in drawn] + [1.0]
    values += [entry.target.bound for entry in drawn if entry.target.bound is not None]
    return min(values) / 1.5 <= tick <= max(values) * 1.5


def _bars(axes: Any, drawn: list[Entry], lengths: list[float], form: str) -> None:
    colours = {"met": MET, "MISSED": MISSED, "": PLAIN}
    bars = axes.barh(
        [entry.target.label for entry in drawn],
        lengths,
        color=[colours[entry.verdict] for entry in drawn],
        height=0.7,
    )
    labels = [form.format(length) for length in lengths]
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.bar_label(bars, labels, padding=6, size=9, bbox=paper)
    axes.margins(x=0.12, y=0.02)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> int:
    """Print the table and draw the chart; return 1 if there are no results."""
    parser = argparse.ArgumentParser(description="Summary of all benchmarks")
    parser.add_argument("--results", type=Path, default=RESULTS)
    folder = parser.parse_args().results
    newest = newest_lines(folder)
    measured = entries(newest)
    if not measured:
        print(f"no results under {folder}")
        return 1
    table(measured)
    quality(newest)
    try:
        chart(measured, folder / "benchmarks.png")
    except ImportError:
        print("  no chart: matplotlib is missing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
