"""``TableReport``: a run's tables as one self-contained HTML page, or as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, NamedTuple, overload

from torch import nn

from recis_lightning.monitoring.charts import (
    MEMORY,
    NUM_COLOURS,
    Chart,
    number,
    run_charts,
    table_charts,
)
from recis_lightning.monitoring.checkpoint_history import read_run
from recis_lightning.monitoring.history import RunHistory
from recis_lightning.monitoring.png import check_matplotlib
from recis_lightning.monitoring.step_costs import WIDE, StepCosts
from recis_lightning.monitoring.svg import chart_svg
from recis_lightning.monitoring.watch import TableMonitor
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.listing import hash_tables

__all__ = ["TableReport", "report"]

_SUFFIXES = (".html", ".png")


class TableFacts(NamedTuple):
    """Properties of a table that do not change in a run."""

    name: str
    embedding_dim: int
    dtype: str


class TableReport:
    """Charts of a run: speed, loss, validation, learning rates, phases of a step, and its tables.

    A notebook shows it inline. Made by ``report``, by ``MetricReportHook(report=...)``, or here
    from a history.

    Args:
        history: Figures under the names of ``TableMonitor``.
        tables: Fixed properties of each table.
        title: Of the page.
        costs: Of inspected steps, for the end of the page.

    Example:
        >>> import torch
        >>> table = HashTable(2, name="user")
        >>> table.insert(torch.tensor([7]), torch.ones(1, 2))
        >>> page = TableReport.of_tables([table]).html()
        >>> page.count("<svg"), "http" in page
        (9, False)
    """

    def __init__(
        self,
        history: RunHistory,
        tables: Sequence[TableFacts],
        title: str = "Tables",
        costs: Sequence[StepCosts] = (),
    ) -> None:
        self.history, self.tables, self.title = history, list(tables), title
        self.costs = list(costs)

    @classmethod
    def of_monitor(
        cls, monitor: TableMonitor, title: str = "Tables", costs: Sequence[StepCosts] = ()
    ) -> TableReport:
        """Return the report of what a ``TableMonitor`` recorded."""
        facts = [
            TableFacts(t.name, t.embedding_dim, str(t.dtype).removeprefix("torch."))
            for t in monitor.tables
        ]
        return cls(monitor.history, facts, title, costs)

    of_watch = of_monitor  # an alias

    @classmethod
    def of_tables(cls, tables: Sequence[HashTable], title: str = "Tables") -> TableReport:
        """Return the report of tables as they are now."""
        monitor = TableMonitor(tables)
        monitor.record(max((table.step for table in tables), default=0), full=True)
        return cls.of_monitor(monitor, title)

    @classmethod
    def of_checkpoint(cls, path: str | os.PathLike[str]) -> TableReport:
        """Return the report of a checkpoint: its tables and the history of ``MetricReportHook``.

        Args:
            path: Lightning's file, a folder that ``checkpoint.save`` wrote to, or a folder with
                checkpoints of Lightning: then the newest.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It holds no tables.
        """
        run = read_run(path)
        facts = [
            TableFacts(name, t.embedding_dim, str(t.dtype).removeprefix("torch."))
            for name, t in run.tables.items()
        ]
        return cls(run.history, facts, f"Tables of {run.path.name}")

    def html(self) -> str:
        """Return the page: one file, without scripts, that loads nothing else."""
        parts = [_summary(self.history), "<h2>All tables</h2>", _figures(run_charts(self.history))]
        parts.append(_overview(self.history, self.tables))
        for table in self.tables:
            about = f"dim {table.embedding_dim}, {escape(table.dtype)}"
            charts = _figures(table_charts(self.history, table.name))
            parts.append(
                f"<section><h2>{escape(table.name)} <small>{about}</small></h2>{charts}</section>"
            )
        parts += [costs.html() for costs in self.costs]
        parts.append(_facts(self.history.facts))
        steps = self.history.steps
        span = f"steps {steps[0]:,} to {steps[-1]:,}" if len(steps) > 1 else "one look"
        points = f"{len(steps):,} point{'s' if len(steps) != 1 else ''}"
        page = resources.files("recis_lightning.monitoring").joinpath("page.html")
        return Template(page.read_text("utf-8")).substitute(
            title=escape(self.title), about=f"{span}, {points}", body="\n".join(parts)
        )

    def _repr_html_(self) -> str:
        """Return the page in a frame, for a notebook: its styles touch nothing else there."""
        page = escape(self.html(), quote=True)
        return (
            f'<iframe srcdoc="{page}" sandbox="" title="{escape(self.title, quote=True)}" '
            'style="width: 100%; height: 720px; border: 0"></iframe>'
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page or the picture, by the path's suffix; missing folders are made.

        Args:
            path: Ends in ``.html`` or ``.png``.

        Raises:
            ValueError: ``path`` ends in something else.
            ImportError: ``path`` is a picture's, and matplotlib is not installed.
        """
        target = check_path("path", path)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.part")
        if target.suffix == ".html":
            unfinished.write_text(self.html(), encoding="utf-8")
        else:
            from recis_lightning.monitoring.png import draw

            rows = [run_charts(self.history)]
            rows += [table_charts(self.history, table.name) for table in self.tables]
            draw(self.title, ["all tables", *(t.name for t in self.tables)], rows, unfinished)
        unfinished.replace(target)
        return target


@overload
def report(source: Any) -> TableReport: ...


@overload
def report(source: Any, path: str | os.PathLike[str]) -> Path: ...


def report(source: Any, path: str | os.PathLike[str] | None = None) -> TableReport | Path:
    """Write a report of a run's tables, one HTML page or a PNG, or show it in a notebook.

    Args:
        source: A Lightning Trainer (whose ``MetricReportHook`` has kept the history; without one
            the report shows the tables as they are now), a module with tables, a list of tables,
            or a path: Lightning's checkpoint, a folder that ``checkpoint.save`` wrote to, or a
            folder with checkpoints of Lightning, of which the newest is shown.
        path: Of the report; ends in ``.html`` or ``.png``. None writes none.

    Returns:
        ``path`` as a ``Path``; without one a ``TableReport``, which notebooks show inline.

    Raises:
        TypeError, ValueError: An argument is of a wrong type or out of range; the error names it.
        FileNotFoundError: ``source`` is a path without a checkpoint.

    Example:
        >>> import tempfile
        >>> table = HashTable(2, name="user")
        >>> report([table], f"{tempfile.mkdtemp()}/report.html").name
        'report.html'
    """
    if path is None:
        return _report_of(source)
    check_path("path", path)
    return _report_of(source).write(path)


def _report_of(source: Any) -> TableReport:
    if isinstance(source, str | os.PathLike):
        return TableReport.of_checkpoint(source)
    if isinstance(source, nn.Module):
        return TableReport.of_tables(hash_tables(source), f"Tables of {type(source).__name__}")
    if isinstance(source, Sequence) and all(isinstance(t, HashTable) for t in source):
        return TableReport.of_tables(source)
    if not hasattr(source, "callbacks") or not hasattr(source, "lightning_module"):
        raise TypeError(
            "source: expected a Trainer, a module, a list of tables or a checkpoint's path, "
            f"got {type(source).__name__}"
        )
    module = source.lightning_module
    title = f"Tables of {type(module).__name__}" if module is not None else "Tables"
    for callback in source.callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, TableMonitor) and len(monitor.history):
            return TableReport.of_monitor(monitor, title, costs_of(source))
    if module is None:
        raise ValueError("source: the Trainer has no module yet; expected one that has run")
    return TableReport.of_tables(hash_tables(module), title)


def costs_of(trainer: Any) -> list[StepCosts]:
    """Return the costs that callbacks of a Trainer have found."""
    found = [getattr(callback, "costs", None) for callback in trainer.callbacks]
    return [costs for costs in found if isinstance(costs, StepCosts)]


def check_path(argument: str, path: str | os.PathLike[str]) -> Path:
    """Return a report's path.

    Raises:
        ValueError: Its suffix is no report's.
        ImportError: It is a picture, and matplotlib is not installed.
    """
    target = Path(path)
    if target.suffix not in _SUFFIXES:
        raise ValueError(f"{argument}: expected a path ending in .html or .png, got {str(path)!r}")
    if target.suffix == ".png":
        check_matplotlib()
    return target


def _summary(history: RunHistory) -> str:
    memory = sum(history.last(f"tables/{kind}", 0.0) for kind in MEMORY)
    tiles = [
        ("rows", number(history.last("tables/rows"))),
        ("memory", number(memory, "B")),
        ("admitted", number(history.last("tables/admitted"))),
        ("refused", number(history.last("tables/refused"))),
        ("evicted", number(history.last("tables/evicted"))),
        ("came back", number(history.last("tables/readmitted"))),
        ("batches a second", number(history.last("train_qps"))),
        ("loss", number(history.last("loss"))),
    ]
    cells = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles)
    return f'<div class="tiles">{cells}</div>'


def _figures(charts: Sequence[Chart]) -> str:
    return f'<div class="charts">{"".join(map(_figure, charts))}</div>'


def _figure(chart: Chart) -> str:
    legend = ""
    if len(chart.series) > 1:
        keys = (
            f'<span><i class="k{index % NUM_COLOURS}"></i>{escape(series.label)}</span>'
            for index, series in enumerate(chart.series)
        )
        legend = f'<p class="legend">{"".join(keys)}</p>'
    title = escape(chart.title)
    return f"<figure><figcaption>{title}</figcaption>{legend}{chart_svg(chart)}</figure>"


_COLUMNS = (
    ("rows", "rows"),
    ("load", "load"),
    ("memory", "memory"),
    ("admitted", "admitted"),
    ("refused", "refused"),
    ("evicted", "evicted"),
    ("readmitted", "came back"),
    ("nonfinite_rows", "NaN rows"),
)


def _overview(history: RunHistory, tables: Sequence[TableFacts]) -> str:
    if not tables:
        return "<p>The module has no tables.</p>"
    head = "".join(f"<th>{label}</th>" for _, label in _COLUMNS)
    rows = []
    for table in tables:
        values: Mapping[str, str] = {
            "memory": number(
                sum(history.last(f"table/{table.name}/{kind}", 0.0) for kind in MEMORY), "B"
            )
        }
        shown = [
            values.get(name) or number(history.last(f"table/{table.name}/{name}"))
            for name, _ in _COLUMNS
        ]
        is_bad = history.last(f"table/{table.name}/nonfinite_rows", 0.0) > 0
        cells = "".join(f"<td>{cell}</td>" for cell in shown)
        rows.append(
            f"<tr{' class=bad' if is_bad else ''}><th>{escape(table.name)}</th>{cells}</tr>"
        )
    return (
        f"{WIDE}<table><thead><tr><th>table</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _facts(facts: Mapping[str, str]) -> str:
    """Return what is known of the run as a whole."""
    if not facts:
        return ""
    lines = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in facts.items()
    )
    return (
        "<details open><summary>This run: date, host, versions and settings</summary>"
        f'<table class="facts"><tbody>{lines}</tbody></table></details>'
    )
