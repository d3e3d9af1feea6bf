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
