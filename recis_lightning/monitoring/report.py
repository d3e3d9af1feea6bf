"""``TableReport``: what a run's tables did, as one page that needs nothing else, or a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from recis_lightning.monitoring.charts import MEMORY, Chart, number, run_charts, table_charts
from recis_lightning.monitoring.checkpoint_history import read_run
from recis_lightning.monitoring.history import RunHistory
from recis_lightning.monitoring.svg import chart_svg
from recis_lightning.monitoring.watch import TableWatch
from recis_lightning.table.hash_table import HashTable, hash_tables

__all__ = ["TableReport", "report"]

_SUFFIXES = (".html", ".png")


class TableFacts(NamedTuple):
    """What of a table does not change in a run."""

    name: str
    embedding_dim: int
    dtype: str


class TableReport:
    """Charts of a run: speed, loss, rows, admissions and evictions, memory, ages and norms.

    Made by ``report``, by ``MetricReportHook(report=...)``, or here from a history.

    Args:
        history: Figures under the names of ``TableWatch``.
        tables: What else to say of each table.
        title: Of the page.

    Example:
        >>> import torch
        >>> table = HashTable(2, name="user")
        >>> table.insert(torch.tensor([7]), torch.ones(1, 2))
        >>> page = TableReport.of_tables([table]).html()
        >>> page.count("<svg"), "http" in page
        (9, False)
    """

    def __init__(
        self, history: RunHistory, tables: Sequence[TableFacts], title: str = "Tables"
    ) -> None:
        self.history, self.tables, self.title = history, list(tables), title

    @classmethod
    def of_watch(cls, watch: TableWatch, title: str = "Tables") -> TableReport:
        """Report what a ``TableWatch`` saw."""
        facts = [
            TableFacts(t.name, t.embedding_dim, str(t.dtype).removeprefix("torch."))
            for t in watch.tables
        ]
        return cls(watch.history, facts, title)

    @classmethod
    def of_tables(cls, tables: Sequence[HashTable], title: str = "Tables") -> TableReport:
        """Report how tables are now."""
        watch = TableWatch(tables)
        watch.look(max((table.step for table in tables), default=0), full=True)
        return cls.of_watch(watch, title)

    @classmethod
    def of_checkpoint(cls, path: str | os.PathLike[str]) -> TableReport:
        """Report what a checkpoint holds: its tables, and the history of ``MetricReportHook``.

        Args:
            path: A checkpoint of Lightning, or a folder with some: then the newest.

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
        """Return the page: one file, no scripts, nothing to fetch."""
        parts = [_summary(self.history), "<h2>All tables</h2>", _figures(run_charts(self.history))]
        parts.append(_overview(self.history, self.tables))
        for table in self.tables:
            about = f"dim {table.embedding_dim}, {escape(table.dtype)}"
            charts = _figures(table_charts(self.history, table.name))
            parts.append(
                f"<section><h2>{escape(table.name)} <small>{about}</small></h2>{charts}</section>"
            )
        steps = self.history.steps
        span = f"steps {steps[0]:,} to {steps[-1]:,}" if len(steps) > 1 else "one look"
        points = f"{len(steps):,} point{'s' if len(steps) != 1 else ''}"
        return _PAGE.format(
            title=escape(self.title), about=f"{span}, {points}", body="\n".join(parts), style=_STYLE
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page or the picture, as the path's suffix says; folders are made.

        Args:
            path: Ends in ``.html`` or ``.png``.

        Raises:
            ValueError: It ends in something else.
            ImportError: A picture without matplotlib.
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


def report(source: Any, path: str | os.PathLike[str]) -> Path:
    """Write a report of a run's tables: one HTML page, or a PNG.

    Args:
        source: A Lightning Trainer (whose ``MetricReportHook`` has kept the history; without one
            the report shows the tables as they are now), a module with tables, a list of tables,
            or the path of a checkpoint or of a folder with checkpoints.
        path: Where to write; ends in ``.html`` or ``.png``.

    Returns:
        The path.

    Raises:
        TypeError, ValueError: An argument is not what it should be (names it).
        FileNotFoundError: No checkpoint is where ``source`` says.

    Example:
        >>> import tempfile
        >>> table = HashTable(2, name="user")
        >>> report([table], f"{tempfile.mkdtemp()}/report.html").name
        'report.html'
    """
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
        watch = getattr(callback, "watch", None)
        if isinstance(watch, TableWatch) and len(watch.history):
            return TableReport.of_watch(watch, title)
    if module is None:
        raise ValueError("source: the Trainer has no module yet; expected one that has run")
    return TableReport.of_tables(hash_tables(module), title)


def check_path(argument: str, path: str | os.PathLike[str]) -> Path:
    """Return a report's path, or raise if it is of no kind that a report can have."""
    target = Path(path)
    if target.suffix not in _SUFFIXES:
        raise ValueError(f"{argument}: expected a path ending in .html or .png, got {str(path)!r}")
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
            f'<span><i class="k{place % 4}"></i>{escape(series.label)}</span>'
            for place, series in enumerate(chart.series)
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
        ruined = history.last(f"table/{table.name}/nonfinite_rows", 0.0) > 0
        cells = "".join(f"<td>{cell}</td>" for cell in shown)
        rows.append(
            f"<tr{' class=bad' if ruined else ''}><th>{escape(table.name)}</th>{cells}</tr>"
        )
    return (
        f'<div class="wide"><table><thead><tr><th>table</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


_STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #666; --line: #e3e3e3; --back: #fff;
  --card: #fafafa; --c0: #2a78d6; --c1: #eb6834; --c2: #1baf7a; --c3: #7a5fd0; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --soft: #a0a0a0; --line: #3a3a3a;
  --back: #161616; --card: #1f1f1f; --c0: #5a9cec; --c1: #f28a5f; --c2: #3ccb97; --c3: #a594f0;
  --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1240px; color: var(--ink); background: var(--back);
  font: 15px/1.45 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 28px 0 8px; }
small, header p { color: var(--soft); font-weight: normal; font-size: .85rem; margin: 2px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(104px, 1fr)); gap: 8px;
  margin-top: 16px; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 8px 10px; }
.tiles b { display: block; font-size: 1.05rem; white-space: nowrap; }
.tiles span { color: var(--soft); font-size: .8rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr));
  gap: 12px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px; display: flex; flex-direction: column; break-inside: avoid; }
figcaption { font-size: .85rem; font-weight: 600; }
figure svg { width: 100%; height: auto; display: block; margin-top: auto; }
.legend { margin: 2px 0 0; font-size: .75rem; color: var(--soft); display: flex; flex-wrap: wrap;
  gap: 0 10px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  margin-right: 4px; }
svg text { font-size: 11px; fill: var(--soft); } .end { text-anchor: end; }
.mid { text-anchor: middle; } .grid { stroke: var(--line); stroke-width: 1; }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); }
.f0 { fill: var(--c0); } .f1 { fill: var(--c1); } .f2 { fill: var(--c2); } .f3 { fill: var(--c3); }
.k0 { background: var(--c0); } .k1 { background: var(--c1); } .k2 { background: var(--c2); }
.k3 { background: var(--c3); }
.wide { overflow-x: auto; margin-top: 16px; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; overflow-wrap: normal; }
th, td { padding: 4px 8px; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child { text-align: left; } thead th { color: var(--soft); font-weight: normal; }
.bad th, .bad td { color: var(--bad); }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #ccc; --back: #fff;
  --card: #fff; --c0: #2a78d6; --c1: #eb6834; --c2: #1baf7a; --c3: #7a5fd0; --bad: #b3261e; }
  body { padding: 0; max-width: none; font-size: 12px; }
  .charts { grid-template-columns: 1fr 1fr; gap: 8px; } .wide { overflow: visible; }
  .tiles { grid-template-columns: repeat(4, 1fr); }
  h2 { break-after: avoid; } tr, .tiles { break-inside: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><header><h1>{title}</h1><p>{about}</p></header>
{body}
</body></html>
"""
