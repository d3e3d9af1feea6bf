"""Reports as pictures, drawn by matplotlib: a row of charts for the run and for each table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recis_lightning.monitoring.charts import Chart, number

__all__ = ["check_matplotlib", "draw"]

_COLOURS = (
    *("#2a78d6", "#eb6834", "#1baf7a", "#7a5fd0", "#d9a400"),
    *("#c2477f", "#1f9fb3", "#8a6d3b", "#7f8794"),
)
_INK, _FAINT = "#333333", "#dddddd"
_NAME_CHARS = 48
_CHART_INCHES, _DPI, _MAX_PIXELS = (3.2, 2.2), 110, 30_000


def check_matplotlib() -> None:
    """Raise an ImportError that says what to install if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "a report as a picture needs matplotlib: pip install 'recis-lightning[report]'; "
            "a report that ends in .html does not"
        ) from error


def draw(title: str, names: Sequence[str], rows: Sequence[Sequence[Chart]], path: Path) -> None:
    """Write a PNG.

    Args:
        title: Of the picture.
        names: Of the rows.
        rows: Charts, one row below the other.
        path: Of the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    width = max(len(row) for row in rows)
    inches = (_CHART_INCHES[0] * width, _CHART_INCHES[1] * len(rows) + 0.5)
    # Without pyplot, so that the caller's figures and settings stay as they are.
    figure = Figure(figsize=inches, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, color=_INK, x=0.01, ha="left")
    grid: Any = figure.subplots(len(rows), width, squeeze=False)
    for name, charts, line in zip(names, rows, grid, strict=True):
        for axes in line[len(charts) :]:
            axes.set_axis_off()
        for chart, axes in zip(charts, line, strict=False):
            shown = FuncFormatter(lambda value, _, unit=chart.unit: number(value, unit))
            axes.yaxis.set_major_formatter(shown)
            _draw_chart(axes, name, chart)
            if chart.kind != "bars":
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    figure.savefig(path, format="png", dpi=min(_DPI, _MAX_PIXELS / max(inches)))


def _draw_chart(axes: Any, name: str, chart: Chart) -> None:
    shown = name if len(name) <= _NAME_CHARS else f"{name[: _NAME_CHARS - 1]}…"
    axes.set_title(f"{shown}\n{chart.title}", fontsize=7.5, loc="left", color=_INK)
    axes.grid(color=_FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7, colors=_INK, length=2)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_edgecolor(_FAINT)
    if chart.kind == "bars":
        axes.bar(chart.x, chart.series[0].values, width=0.88, align="edge", color=_COLOURS[0])
        every = max(1, math.ceil(len(chart.bars) / 6))
        axes.set_xticks(chart.x[::every], chart.bars[::every])
        return
    if chart.kind == "layers":
        axes.stackplot(
            chart.x,
            *([0.0 if math.isnan(v) else v for v in series.values] for series in chart.series),
            colors=_COLOURS,
            labels=[series.label for series in chart.series],
        )
    for index, series in enumerate(chart.series if chart.kind == "lines" else ()):
        points = [p for p in zip(chart.x, series.values, strict=True) if math.isfinite(p[1])]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=_COLOURS[index % len(_COLOURS)],
            marker="o" if len(points) == 1 else None,
            linewidth=1.3,
            label=series.label,
        )
    if all(v >= 0 or math.isnan(v) for series in chart.series for v in series.values):
        axes.set_ylim(bottom=0, top=chart.cap)
    if len(chart.series) > 1:
        axes.legend(fontsize=6, framealpha=0.8, edgecolor=_FAINT, loc="upper right")
