"""Filters: the rows they keep, and what is refused."""

import pyarrow as pa
import pytest

from recis_lightning.data.filter import columns_of, parse_filter

TABLE = pa.table({"a": [1, 2, None, 4], "b": ["x", "y", "x", None]})


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("a == 2", [1]),
        ("a != 2", [0, 3]),
        ("1 < a <= 4", [1, 3]),
        ("a >= 2 and b == 'y'", [1]),
        ("a < 2 or b == 'x'", [0, 2]),
        ("not a == 1", [1, 3]),
        ("a in (1, 4)", [0, 3]),
        ("b not in ['x']", [1, 3]),
        ("b is None", [3]),
        ("a is not None", [0, 1, 3]),
        ("a > -1.5", [0, 1, 3]),
    ],
)
def test_rows_kept(text, rows):
    table = TABLE.append_column("i", pa.array(range(4)))
    assert table.filter(parse_filter(text))["i"].to_pylist() == rows


@pytest.mark.parametrize(
    "text",
    ["", "a ==", "a", "f(a) == 1", "__import__('os')", "1 == 1", "a is 3", "a in 3", "a == None"],
)
def test_what_is_no_filter_is_refused(text):
    with pytest.raises(ValueError, match="filter: expected comparisons"):
        parse_filter(text)


def test_columns():
    assert columns_of("b == 'x' or not (a < 3 and b != 'y')") == ["a", "b"]
