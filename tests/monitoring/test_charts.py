"""Charts as data: the scale's marks and the writing of numbers."""

import pytest

from recis_lightning.monitoring.charts import number, ticks


@pytest.mark.parametrize("low", [0, -3, 7, 1e6])
@pytest.mark.parametrize("span", [1e-6, 0.3, 1, 99, 12345, 3e12])
def test_ticks_hold_all_values_and_are_few(low, span):
    marks = ticks(low, low + span)
    assert marks[0] <= low + 1e-9 * span
    assert marks[-1] >= low + span - 1e-8 * max(abs(low), span)
    assert 2 <= len(marks) <= 7


def test_numbers():
    shown = [number(v) for v in (0, 5, 999, 999.7, 1000, 1.5e9, -2500, 1e-5)]
    assert shown == ["0", "5", "999", "1k", "1k", "1.5G", "-2.5k", "1e-05"]
    assert number(12.0, "%") == "12%"
