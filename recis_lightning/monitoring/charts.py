"""Charts of a report as data; ``svg`` and ``png`` draw them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from recis_lightning.monitoring.history import RunHistory
from recis_lightning.monitoring.phases import PHASES
from recis_lightning.table.scan import AGE_EDGES, NORM_EDGES

__all__ = ["NUM_COLOURS", "Chart", "Series", "number", "run_charts", "table_charts", "ticks"]

COUNTERS = ("admitted", "refused", "evicted", "readmitted")
MEMORY = ("weight_bytes", "state_bytes", "index_bytes", "column_bytes")
_MEMORY_LABELS = ("weights", "optimizer state", "index", "policy columns")
_CHURN_LABELS = ("admitted", "refused", "evicted", "came back")
NUM_COLOURS = 9  # of series, which come again after that
_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Series(NamedTuple):
    """One line, layer or set of bars: a value for each x, NaN where there is none."""

    label: str
    values: list[float]


class Chart(NamedTuple):
    """A chart.

    Attributes:
        title: Of the chart.
        kind: Lines over x, layers stacked over x, or bars with names.
        x: Steps; for bars their index.
        series: At least one.
        unit: Of the values.
        bars: Names of the bars.
        cap: Upper end of the scale of lines, though a few early values lie above; None shows all.
    """

    title: str
    kind: Literal["lines", "layers", "bars"]
    x: list[float]
    series: list[Series]
    unit: str = ""
    bars: Sequence[str] = ()
    cap: float | None = None


def run_charts(history: RunHistory) -> list[Chart]:
    """Return the charts of a whole run: speed, loss and all tables together."""
    steps = [float(step) for step in history.steps]
    speed = Series("training", history.column("train_qps"))
    charts = [Chart("Training batches a second", "lines", steps, [speed])]
    evaluation = Series("evaluation", history.column("eval_qps"))
    if _any_known(evaluation.values):
        charts.append(Chart("Evaluation batches a second", "lines", steps, [evaluation]))
    charts += [
        Chart("Loss", "lines", steps, [Series("loss", history.column("loss"))]),
        *_step_charts(history, steps),
        *_table_charts(history, "tables"),
    ]
    skew = history.column("tables/rank_skew")
    if _any_known(skew):
        title = "Rows of the fullest rank over the mean"
        charts.append(Chart(title, "lines", steps, [Series("skew", skew)]))
    return charts


def _step_charts(history: RunHistory, steps: list[float]) -> list[Chart]:
    """Return the charts of validation metrics, learning rates and the phases of a step."""
    charts = []
    for name in history.names:
        if name.startswith("validation/"):
            label = name.removeprefix("validation/")
            series = Series(label, history.column(name))
            charts.append(Chart(f"Validation: {label}", "lines", steps, [series]))
    rates = [
        Series(name.removeprefix("lr/"), history.column(name))
        for name in history.names
        if name.startswith("lr/")
    ]
    for first in range(0, len(rates), NUM_COLOURS):
        charts.append(Chart("Learning rates", "lines", steps, rates[first : first + NUM_COLOURS]))
    phases = [
        Series(phase.replace("_", " "), history.column(f"step/{phase}_ms")) for phase in PHASES
    ]
    shown = [series for series in phases if any(value > 0 for value in series.values)]
    if shown:
        charts.append(Chart("Milliseconds of a batch by phase", "layers", steps, shown))
    return charts


def table_charts(history: RunHistory, table: str) -> list[Chart]:
    """Return the charts of one table."""
    prefix = f"table/{table}"
    charts = _table_charts(history, prefix)
    ages = history.distributions.get(f"{prefix}/ages")
    if ages is not None:
        charts.append(_histogram("Steps since a row was seen", ages, AGE_EDGES))
    norms = history.distributions.get(f"{prefix}/norms")
    if norms is not None:
        charts.append(_histogram("L2 norm of a row", norms, NORM_EDGES))
    return charts


def _table_charts(history: RunHistory, prefix: str) -> list[Chart]:
    steps = [float(step) for step in history.steps]
    churn = [
        Series(label, _increases(history.column(f"{prefix}/{name}")))
        for name, label in zip(COUNTERS, _CHURN_LABELS, strict=True)
    ]
    shown = [series for series in churn if any(v > 0 for v in series.values)] or churn[:2]
    cap = _cap(shown)
    memory = [
        Series(label, history.column(f"{prefix}/{name}"))
        for name, label in zip(MEMORY, _MEMORY_LABELS, strict=True)
    ]
    share = Series("share", history.column(f"{prefix}/unique_share"))
    charts = [
        Chart("Rows", "lines", steps, [Series("rows", history.column(f"{prefix}/rows"))]),
        Chart(
            "Came and went between reports" + (", the start off the scale" if cap else ""),
            "lines",
            steps,
            shown,
            cap=cap,
        ),
        Chart("Memory by kind", "layers", steps, memory, "B"),
    ]
    if _any_known(share.values):
        charts.append(Chart("Unique share of a batch's ids", "lines", steps, [share]))
    return charts


def _increases(counts: list[float]) -> list[float]:
    """Return the growth of a count since the last point that has one."""
    increases, before = [], 0.0
    for count in counts:
        increases.append(count - before)
        if not math.isnan(count):
            before = count
    return increases


def _any_known(values: Sequence[float]) -> bool:
    return any(not math.isnan(value) for value in values)


def _cap(series: Sequence[Series]) -> float | None:
    """Return the end of a scale that shows the settled run, if its start would hide it.

    A table that starts empty admits nearly all it will ever hold in its first batches.
    """
    known = [[v for v in part.values if math.isfinite(v)] for part in series]
    top = max((max(values) for values in known if values), default=0.0)
    settled = max((max(values[len(values) // 5 :]) for values in known if values), default=0.0)
    return 1.25 * settled if 0 < 4 * settled < top else None


def _histogram(title: str, counts: list[int], edges: Sequence[float]) -> Chart:
    used = [index for index, count in enumerate(counts) if count] or [0]
    bins = range(max(0, used[0] - 1), min(len(counts), used[-1] + 2))
    total = max(sum(counts), 1)
    return Chart(
        title,
        "bars",
        [float(index) for index in range(len(bins))],
        [Series("share of rows", [100 * counts[index] / total for index in bins])],
        "%",
        [number(edges[index]) for index in bins],
    )


def number(value: float, unit: str = "") -> str:
    """Return a number in few characters; "-" for NaN.

    Example:
        >>> number(1234567), number(0.03125), number(2048.0, "B"), number(float("nan"))
        ('1.23M', '0.0312', '2.05 kB', '-')
    """
    if math.isnan(value):
        return "-"
    space = " " if unit and unit != "%" else ""
    for size, suffix in _SUFFIXES:
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{space}{suffix}{unit}"
    shown = f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"
    return f"{shown}{space}{unit}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round numbers from at most ``low`` to at least ``high``, about ``count`` steps.

    Example:
        >>> ticks(0, 87)
        [0.0, 25.0, 50.0, 75.0, 100.0]
    """
    span = high - low or abs(high) or 1.0
    raw = span / count
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(scale * factor for factor in (1, 2, 2.5, 5, 10) if scale * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]
