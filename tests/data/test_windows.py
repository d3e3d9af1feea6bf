"""Windows of time: of paths, of columns, and their names."""

import datetime as dt

import pyarrow as pa
import pytest

from recis_lightning.data import Window
from recis_lightning.data.windows import check_window

HOUR = 1_796_014_800  # 2026-11-30T05:00 in seconds


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("logs/day=2026-11-30/hour=05/part-0.parquet", "2026-11-30T05"),
        ("logs/day=20261130/hour=5/x.parquet", "2026-11-30T05"),
        ("year=2026/month=11/day=30/hour=05/x.parquet", "2026-11-30T05"),
        ("dt=2026-11-30 05%3A30/x.parquet", "2026-11-30T05"),
        ("logs/2026-11-30T05/x.parquet", "2026-11-30T05"),
        ("logs/clicks-2026-11-30-05.parquet", "2026-11-30T05"),
        ("20200101/clicks_20261130T0530.parquet", "2026-11-30T05"),
        ("part-99999999/2026-11-30_05.parquet", "2026-11-30T05"),
    ],
)
def test_times_of_paths(path, name):
    window = Window("1h")
    assert window.of_path(path) == HOUR // 3600
    assert window.name(window.of_path(path)) == name


@pytest.mark.parametrize(
    ("length", "name"),
    [
        ("30m", "2026-11-30T05:30"),
        ("6h", "2026-11-30T00"),
        ("24h", "2026-11-30"),
        ("7d", "2026-11-26"),
    ],
)
def test_lengths_and_names(length, name):
    window = Window(length)
    assert window.name(window.of_path("day=2026-11-30/hour=05/minute=47/x.orc")) == name


def test_times_of_columns():
    """Of every unit, dates and seconds, before 1970 too."""
    seconds = [HOUR, HOUR + 3599, HOUR + 3600, -1]
    times = [dt.datetime.fromtimestamp(s, dt.timezone.utc) for s in seconds]
    arrays = [pa.array(times, pa.timestamp(unit, tz="UTC")) for unit in ("s", "ms", "us", "ns")]
    arrays += [pa.array(times, pa.timestamp("us", tz="Europe/Berlin")), pa.array(seconds)]
    for array in arrays:
        first = HOUR // 3600
        assert Window("1h", "at").of_times(array).tolist() == [first, first, first + 1, -1]
    days = [time.date() for time in times]
    for kind in (pa.date32(), pa.date64()):
        numbers = Window("1d", "at").of_times(pa.array(days, kind))
        assert numbers.tolist() == [HOUR // 86400] * 3 + [-1]
    assert Window("1d", "at").of_times(pa.array([], pa.int32())).tolist() == []
    assert Window("1d", "at").name(10**15) == str(10**15)  # no such year


@pytest.mark.parametrize(
    ("length", "path"),
    [("1h", "day=2026-11-30/x.parquet"), ("30m", "day=2026-11-30/hour=05/x"), ("1d", "logs/x")],
)
def test_paths_without_their_time_are_refused(length, path):
    with pytest.raises(ValueError, match=f"windows of {length} need a time in the path"):
        Window(length).of_path(path)


def test_dates_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="month must be in"):
        Window("1d").of_path("day=2026-13-30/x")


@pytest.mark.parametrize(
    ("array", "error", "words"),
    [
        (pa.array([1, None]), ValueError, "1 of 2 values are null, and have no window"),
        (pa.array([1.5]), TypeError, "expected times, dates or seconds as integers, got double"),
        (pa.array(["a"]), TypeError, "got string"),
    ],
)
def test_columns_without_times_are_refused(array, error, words):
    with pytest.raises(error, match=words):
        Window("1h", "at").of_times(array)


@pytest.mark.parametrize(
    ("window", "error", "words"),
    [
        ("1w", ValueError, "window: length: expected minutes, hours or days .* got '1w'"),
        ("0h", ValueError, "got '0h'"),
        (3600, TypeError, "window: expected a length such as '1h', Window or None, got int"),
    ],
)
def test_what_is_no_window_is_refused(window, error, words):
    with pytest.raises(error, match=words):
        check_window(window)
    assert check_window("2h") == Window("2h")


@pytest.mark.parametrize("name", ["2026-11-30-24", "20261130_99", "2026-11-30-00"])
def test_numbers_of_parts_are_no_hours(name):
    assert Window("1d").name(Window("1d").of_path(f"{name}.parquet")) == "2026-11-30"


def test_a_number_of_a_part_gives_no_hour():
    with pytest.raises(ValueError, match="windows of 1h need a time in the path"):
        Window("1h").of_path("2026-11-30-24.parquet")


def test_nulls_among_the_values_of_a_dictionary():
    times = pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array([5, None]))
    with pytest.raises(ValueError, match="1 of 2 values are null"):
        Window("1h", "at").of_times(times)
