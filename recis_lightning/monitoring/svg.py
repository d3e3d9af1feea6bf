"""Charts as SVG, coloured by the page's style sheet: classes ``c0`` to ``c3`` for the series."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from recis_lightning.monitoring.charts import Chart, number, ticks

__all__ = ["chart_svg"]

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 22


def chart_svg(chart: Chart) -> str:
    """Return a chart as one ``<svg>`` element."""
    name = escape(f"{chart.title}: {_description(chart)}", quote=True)
    body = "".join(_bars(chart) if chart.kind == "bars" else _curves(chart))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">'
        f"<title>{name}</title>{body}</svg>"
    )


def _description(chart: Chart) -> str:
    if chart.kind == "bars":
        return "a histogram"
    ends = [[v for v in series.values if not math.isnan(v)] for series in chart.series]
    return ", ".join(
        f"{series.label} {number(known[-1], chart.unit)}" if known else f"{series.label} not known"
        for series, known in zip(chart.series, ends, strict=True)
    )


def _curves(chart: Chart) -> Iterator[str]:
    layers = _layers(chart) if chart.kind == "layers" else [s.values for s in chart.series]
    known = [v for values in layers for v in values if math.isfinite(v)]
    if not known:
        yield f'<text x="{_WIDTH / 2}" y="{_HEIGHT / 2}" class="mid">nothing to show</text>'
        return
    low = 0.0 if chart.kind == "layers" or min(known) >= 0 else min(known)
    marks = ticks(low, max(known) if chart.cap is None else chart.cap)
    yield from _y_axis(marks, chart.unit)
    first, last = min(chart.x), max(chart.x)
    yield from _x_axis(first, last)

    def x(step: float) -> float:
        share = (step - first) / (last - first) if last > first else 0.5
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        return _y(min(value, marks[-1]), marks)

    below = [0.0] * len(chart.x)
    for index, values in enumerate(layers):
        points = [
            (x(step), y(v), y(b))
            for step, v, b in zip(chart.x, values, below, strict=True)
            if math.isfinite(v)
        ]
        line = " ".join(f"{px},{py}" for px, py, _ in points)
        if chart.kind == "layers":
            if len(points) == 1:  # widened, since one point has no width
                points = [(px + dx, py, pb) for px, py, pb in points for dx in (-20.0, 20.0)]
                line = " ".join(f"{px},{py}" for px, py, _ in points)
            floor = " ".join(f"{px},{pb}" for px, _, pb in reversed(points))
            yield f'<polygon class="f{index % 4}" points="{line} {floor}"/>'
            below = [v if math.isfinite(v) else b for v, b in zip(values, below, strict=True)]
        elif len(points) == 1:
            yield f'<circle class="f{index % 4}" cx="{points[0][0]}" cy="{points[0][1]}" r="3"/>'
        elif points:
            yield f'<polyline class="c{index % 4}" points="{line}"/>'


def _layers(chart: Chart) -> list[list[float]]:
    """Return each layer's upper edge: NaN from the first unknown layer on."""
    edges: list[list[float]] = []
    below = [0.0] * len(chart.x)
    for series in chart.series:
        below = [a + b for a, b in zip(below, series.values, strict=True)]
        edges.append(below)
    return edges


def _bars(chart: Chart) -> Iterator[str]:
    (series,) = chart.series
    marks = ticks(0.0, max(series.values) or 1.0)
    yield from _y_axis(marks, chart.unit)
    width = (_WIDTH - _LEFT - _RIGHT) / len(series.values)
    every = max(1, math.ceil(len(series.values) / 6))
    for index, value in enumerate(series.values):
        left, top = _LEFT + index * width, _y(value, marks)
        name = escape(f"from {chart.bars[index]}: {number(value, chart.unit)}")
        yield (
            f'<rect class="f0" x="{left + width * 0.06:.1f}" y="{top}" width="{width * 0.88:.1f}" '
            f'height="{_HEIGHT - _BOTTOM - top:.1f}"><title>{name}</title></rect>'
        )
        if index % every == 0:
            text = escape(chart.bars[index])
            yield f'<text x="{left:.1f}" y="{_HEIGHT - 7}" class="mid">{text}</text>'


def _y(value: float, marks: list[float]) -> float:
    share = (value - marks[0]) / (marks[-1] - marks[0])
    return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)


def _y_axis(marks: list[float], unit: str) -> Iterator[str]:
    for mark in marks:
        y = _y(mark, marks)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{_LEFT - 5}" y="{y + 3.5}" class="end">{number(mark, unit)}</text>'


def _x_axis(first: float, last: float) -> Iterator[str]:
    y = _HEIGHT - 7
    if last == first:
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        yield f'<text x="{middle}" y="{y}" class="mid">step {number(first)}</text>'
        return
    yield f'<text x="{_LEFT}" y="{y}">step {number(first)}</text>'
    yield f'<text x="{_WIDTH - _RIGHT}" y="{y}" class="end">{number(last)}</text>'
