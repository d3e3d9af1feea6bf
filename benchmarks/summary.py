"""All benchmarks in one table and one picture, from the newest line of each part's results.

    python -m benchmarks.summary [--results FOLDER]

The picture, ``benchmarks.png`` beside the results, has two halves: how many times as fast as the
peer ours is, with what was promised as a mark; and what share of its bound each other figure takes:
more than all of it is too much, also where the figure is to be at least the bound.
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
    """A target, what was measured for it, and the line that says so."""

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
        """How much of what is allowed it takes: above 1 a bound is missed, whichever way it is."""
        bound = self.target.bound or 1
        return bound / self.value if self.target.least else self.value / bound


def newest_lines(folder: Path) -> dict[tuple[str, str], Line]:
    """Return the last line of each (benchmark, part) under ``folder``, of those of a CPU."""
    newest: dict[tuple[str, str], Line] = {}
    for path in sorted(folder.glob("bench_*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if line.get("device", "cpu") != "cpu":
                continue
            newest[path.stem, line.get("part", line.get("task", ""))] = line
    return newest


def entries(newest: dict[tuple[str, str], Line]) -> list[Entry]:
    """Return every figure that was measured, in the order of ``TARGETS``."""
    found = []
    for target in TARGETS:
        line = newest.get((target.benchmark, target.part))
        value = None if line is None else target.read(line)
        if line is not None and value is not None:
            found.append(Entry(target, value, line))
    return found


def table(found: list[Entry]) -> None:
    """Print one table, and the machines that its figures come from."""
    rows: list[list[Any]] = [
        [
            entry.target.what,
            f"{entry.value:.3g}{'x' if entry.target.unit == 'x' else ''}"
            f"{' s' if entry.target.unit == 's' else ''}",
            entry.target.wanted(),
            entry.verdict,
            entry.line["commit"] + ("+" if entry.line["dirty"] else ""),
        ]
        for entry in found
    ]
    print_table("Benchmarks", ["what", "measured", "target", "", "commit"], rows)
    machines = {f"{e.line['cpu']}, {e.line['threads']} threads" for e in found}
    print("  " + "; ".join(sorted(machines)) + "; + marks a commit with changes on top")
    names = dict.fromkeys((t.benchmark, t.part, t.what) for t in TARGETS)
    seen = {(e.target.benchmark, e.target.part, e.target.what) for e in found}
    for benchmark, _, what in names:
        if (benchmark, _, what) not in seen:
            print(f"  not measured: {what} ({benchmark})")


def quality(newest: dict[tuple[str, str], Line]) -> None:
    """Print the differences of ``bench_quality``, which are no times."""
    for (benchmark, task), line in newest.items():
        if benchmark == "bench_quality":
            means = "; ".join(f"{kind} {value:.4f}" for kind, value in line["mean"].items())
            print(f"  test AUC, {task}: {means}")


def picture(found: list[Entry], path: Path) -> None:
    """Draw both halves into ``path``."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    faster = [entry for entry in found if entry.target.unit == "x"][::-1]
    bounded = [e for e in found if e.target.unit != "x" and e.target.bound is not None][::-1]
    sizes = [len(faster) + 1, len(bounded) + 1]
    figure, (top, bottom) = plt.subplots(
        2,
        1,
        figsize=(10, 1.6 + 0.33 * sum(sizes)),
        gridspec_kw={"height_ratios": sizes},
        layout="constrained",
    )
    _bars(top, faster, [entry.value for entry in faster], "{:.1f}x")
    for place, entry in enumerate(faster):
        if entry.target.bound is not None:
            top.plot([entry.target.bound] * 2, [place - 0.4, place + 0.4], color="black", lw=2)
    top.set_xscale("log")
    top.axvline(1, color="black", lw=0.8, ls=":")
    ticks = [tick for tick in (0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 50) if _inside(tick, faster)]
    top.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    top.minorticks_off()
    top.set_title("Times as fast as the peer (black mark: target)", loc="left")
    shares = [entry.share for entry in bounded]
    _bars(bottom, bounded, shares, "{:.0%}")
    bottom.axvline(1, color="black", lw=2, zorder=0)
    bottom.set_xlim(0, max([1.15, *(1.15 * share for share in shares)]))
    bottom.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    bottom.set_title("Share of the bound (100%: as much as allowed)", loc="left")
    line = found[0].line
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
        [entry.target.what for entry in drawn],
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
    """Print and draw; return 1 if there is nothing to show."""
    parser = argparse.ArgumentParser(description="All benchmarks at a glance")
    parser.add_argument("--results", type=Path, default=RESULTS)
    folder = parser.parse_args().results
    newest = newest_lines(folder)
    found = entries(newest)
    if not found:
        print(f"no results under {folder}")
        return 1
    table(found)
    quality(newest)
    try:
        picture(found, folder / "benchmarks.png")
    except ImportError:
        print("  no picture: matplotlib is missing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
