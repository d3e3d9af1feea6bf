"""Charts as SVG, coloured by the page's style sheet: classes ``c0`` to ``c8`` for the series."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from html import escape
from itertools import pairwise

from recis_lightning.monitoring.charts import NUM_COLOURS, Chart, number, ticks

__all__ = ["chart_svg"]

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 22
_MOST_SPOTS = 48  # of a chart: places that show their values under the pointer


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
            yield f'<polygon class="f{index % NUM_COLOURS}" points="{line} {floor}"/>'
            below = [v if math.isfinite(v) else b for v, b in zip(values, below, strict=True)]
        elif len(points) == 1:
            (px, py, _), colour = points[0], index % NUM_COLOURS
            yield f'<circle class="f{colour}" cx="{px}" cy="{py}" r="3"/>'
        elif points:
            yield f'<polyline class="c{index % NUM_COLOURS}" points="{line}"/>'
    yield from _spots(chart, x)


def _spots(chart: Chart, x: Callable[[float], float]) -> Iterator[str]:
    """Yield the columns of a chart that show their values while the pointer is over them."""
    known = [
        index
        for index in range(len(chart.x))
        if any(math.isfinite(series.values[index]) for series in chart.series)
    ]
    every = math.ceil(len(known) / _MOST_SPOTS)
    shown = sorted({*known[::every], *known[-1:]})
    middles = [x(chart.x[index]) for index in shown]
    bounds = [(a + b) / 2 for a, b in pairwise(middles)]
    edges = [float(_LEFT), *bounds, float(_WIDTH - _RIGHT)]
    for index, middle, (left, right) in zip(shown, middles, pairwise(edges), strict=True):
        lines = [f"step {chart.x[index]:,.0f}"]
        for series in chart.series:
            value = series.values[index]
            if math.isfinite(value):
                lines.append(f"{series.label[-24:]} {number(value, chart.unit)}")
        is_left = middle < _WIDTH / 2
        at, side = (middle + 5, "") if is_left else (middle - 5, " end")
        text = "".join(
            f'<tspan x="{at:.1f}" dy="{0 if row == 0 else 11}">{escape(line)}</tspan>'
            for row, line in enumerate(lines)
        )
        height = _HEIGHT - _BOTTOM
        yield (
            f'<g class="spot"><rect x="{left:.1f}" y="0" width="{max(right - left, 0.1):.1f}" '
            f'height="{height}"/><path d="M{middle} {_TOP}V{height}"/>'
            f'<text class="tip{side}" y="{_TOP + 8}">{text}</text></g>'
        )


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
