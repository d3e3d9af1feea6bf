"""Charts as SVG: elements and descriptions."""

import math
import re

from recis_lightning.monitoring.charts import Chart, Series
from recis_lightning.monitoring.svg import chart_svg


def test_what_the_charts_say():
    svg = chart_svg(Chart("Rows", "lines", [0.0, 10.0], [Series("rows", [5.0, 10.0])]))
    assert 'aria-label="Rows: rows 10"' in svg
    left, right = re.search(r'<polyline class="c0" points="([\d.]+),[\d.]+ ([\d.]+),', svg).groups()
    assert (float(left), float(right)) == (46, 350)
    values = [math.nan, 2.0, math.nan]
    single = chart_svg(Chart("Rows", "lines", [0.0, 10.0, 20.0], [Series("rows", values)]))
    assert single.count("<circle") == 1
    nothing = chart_svg(Chart("Loss", "lines", [0.0], [Series("loss", [math.nan])]))
    assert "nothing to show" in nothing
    assert "loss not known" in nothing
    bars = Chart("Ages", "bars", [0.0, 1.0], [Series("rows", [25.0, 75.0])], "%", ["0", "1"])
    assert re.findall(r"from (\d): (\d+)%", chart_svg(bars)) == [("0", "25"), ("1", "75")]
    layers = [Series("a", [1.0, 1.0]), Series("b", [2.0, math.nan])]
    assert chart_svg(Chart("Memory", "layers", [0.0, 1.0], layers, "B")).count("<polygon") == 2


def test_values_show_under_the_pointer():
    """One column for each of a few points, the last among them, without a script."""
    values = [float(i) for i in range(500)]
    svg = chart_svg(Chart("Rows", "lines", values, [Series("a <b>", values)], "B"))
    spots = re.findall(r'<g class="spot">.*?</g>', svg)
    assert 40 <= len(spots) <= 50
    assert "step 499" in spots[-1]
    assert "a &lt;b&gt; 499 B" in spots[-1]
    bounds = [re.search(r'x="([\d.]+)" y="0" width="([\d.]+)"', spot).groups() for spot in spots]
    ends = [float(x) + float(width) for x, width in bounds]
    starts = [float(x) for x, _ in bounds]
    assert all(abs(a - b) < 0.2 for a, b in zip(ends, starts[1:], strict=False))
    assert (starts[0], round(ends[-1])) == (46, 350)
    two = [Series("a", [1.0, math.nan]), Series("b", [math.nan, math.nan])]
    svg = chart_svg(Chart("Rows", "lines", [0.0, 1.0], two))
    assert svg.count('class="spot"') == 1
    assert "<script" not in svg
