"""Filters: the rows they keep, and what is refused."""

import re
from datetime import UTC, date, datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import acero, dataset, parquet

from recis_lightning.data import ColumnarDataset, DataFileError, Id
from recis_lightning.data.filter import (
    columns_of,
    normal_filter,
    parse_filter,
    trusts_statistics,
)

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
        ("b not in ['x']", [1]),
        ("not (b in ['x'])", [1]),
        ("not (b not in ['x'])", [0, 2]),
        ("b in ['x', None]", [0, 2, 3]),
        ("b not in ['x', None]", [1]),
        ("not (a in (1,) or b == 'y')", []),
        ("not (a > 1 and b == 'y')", [0, 2]),
        ("a > 2 or a in ()", [3]),
        (f"a < {2**70}", [0, 1, 3]),
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
    [
        "",
        "a ==",
        "a",
        "f(a) == 1",
        "__import__('os')",
        "1 == 1",
        "a is 3",
        "a in 3",
        "a == None",
        f"a > {10**400}",
    ],
)
def test_what_is_no_filter_is_refused(text):
    with pytest.raises(ValueError, match="filter: expected comparisons"):
        parse_filter(text)


KINDS = {
    "view": pa.array(["x", "y", None], pa.string_view()),
    "word": pa.array(["x", "y", None]).dictionary_encode(),
    "price": pa.array([Decimal("1.50"), Decimal("2.00"), None], pa.decimal128(9, 2)),
    "day": pa.array([date(2026, 11, 29), date(2026, 11, 30), None]),
    "at": pa.array([datetime(2026, 11, 29), datetime(2026, 11, 30, 5), None], pa.timestamp("ms")),
    "utc": pa.array([datetime(2026, 11, 29, tzinfo=UTC), None, None], pa.timestamp("us", "UTC")),
}


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("view == 'y'", [1]),
        ("view in ['x', 'z']", [0]),
        ("view is None", [2]),
        ("word == 'x'", [0]),
        ("word in ('y', 'x')", [0, 1]),
        ("price > 1", [0, 1]),
        ("price >= 1.75", [1]),
        ("price == 1.5", [0]),
        ("price in [2, 7]", [1]),
        ("day >= '2026-11-30'", [1]),
        ("'2026-11-29' == day", [0]),
        ("day in ['2026-11-29', '2026-12-01']", [0]),
        ("at < '2026-11-30 05:00:01'", [0, 1]),
        ("at < '2026-11-30'", [0]),
        ("utc <= '2026-11-29T00:00:00Z'", [0]),
    ],
)
def test_constants_become_what_a_column_holds(text, rows):
    """Times and dates are written as strings, decimals as numbers."""
    table = pa.table(KINDS)
    kinds = dict(zip(table.schema.names, table.schema.types, strict=True))
    source = acero.Declaration("table_source", acero.TableSourceNodeOptions(table))
    options = acero.ProjectNodeOptions([parse_filter(text, kinds)], ["kept"])
    kept = acero.Declaration("project", options, [source]).to_table()["kept"].to_pylist()
    assert [row for row, passes in enumerate(kept) if passes] == rows


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("d == '5'", True),
        ("d == 5 and a == 1", [0]),
        ("d == 6 and a == 1", False),
        ("d == 5 or a == 1", True),
        ("d == 6 or a == 1", [0]),
        ("n == 'x'", False),
        ("not n == 'x'", False),
        ("n is None", True),
        ("n == 'x' or a == 1", [0]),
        ("not (n == 'x' and a == 1)", [1, 3]),
        ("n == 'x' and a == 1", []),
        ("3 < d <= 5", True),
        ("d in (5, 6) and d not in ['5']", False),
        ("d == d", True),
        ("a == d", []),
        ("d > a", [0, 1, 3]),
        ("b == d", []),
        ("-1 < d", True),
    ],
)
def test_columns_of_a_path_decide_by_themselves(text, kept):
    """By the logic of three values, as Arrow's."""
    kinds = dict(zip(TABLE.schema.names, TABLE.schema.types, strict=True))
    found = parse_filter(text, kinds, {"d": "5", "n": None})
    if isinstance(kept, bool):
        assert found is kept
    else:
        table = TABLE.append_column("i", pa.array(range(4)))
        assert table.filter(found)["i"].to_pylist() == kept


def test_a_path_of_another_kind_is_named():
    with pytest.raises(ValueError, match=r"filter: '>' not supported between .* in 'd > 5'"):
        parse_filter("d > 5", {}, {"d": "x"})


@pytest.mark.parametrize("text", ["day > 'soon'", "utc < '2026-11-29'"])
def test_a_string_that_is_no_time_is_named(text):
    kinds = {name: array.type for name, array in KINDS.items()}
    with pytest.raises(ValueError, match=r"filter: column '(day|utc)' holds .*, which '.*' is not"):
        parse_filter(text, kinds)


INTEGERS = {
    "big": pa.array([1, 2**63 + 5, None], pa.uint64()),
    "small": pa.array([-3, 4, None], pa.int8()),
    "long": pa.array([2**53 + 1, -1, None], pa.int64()),
    "word": pa.array([7, 2**40, None], pa.int64()).dictionary_encode(),
    "single": pa.array([0.1, 0.2, None], pa.float32()),
    "double": pa.array([3.5, 4.5, None], pa.float64()),
    "flag": pa.array([True, False, None]),
    "cents": pa.array([Decimal("1.10"), Decimal("2.20"), None], pa.decimal128(9, 2)),
}


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("big > 5", [1]),
        ("big < 5", [0]),
        ("cents < 1e300", [0, 1]),
        ("cents > 1e300", []),
        ("cents > -1e60", [0, 1]),
        ("cents == 1e-80", []),
        ("cents > 1e-80", [0, 1]),
        ("cents < -1e-80", []),
        ("cents in (1e300, 2.2)", [1]),
        ("cents > 1.1000001", [1]),
        ("cents >= 1.0999999", [0, 1]),
        (f"big > {2**63}", [1]),
        ("big > -1", [0, 1]),
        ("not (big > -1)", []),
        (f"big < {2**64}", [0, 1]),
        (f"{2**63 + 5} == big", [1]),
        (f"big in (1, {2**63 + 5}, -4, {2**80})", [0, 1]),
        (f"big in (-4, {2**80}) or big == 1", [0]),
        (f"big not in (1, {2**80})", [1]),
        ("big not in (-1,)", [0, 1]),
        ("big >= 1.5", [1]),
        ("small < 3.5", [0]),
        ("3.5 < small", [1]),
        ("small <= -3.5", []),
        ("small >= -3.0", [0, 1]),
        ("small == 4.0", [1]),
        ("small == 4.5", []),
        ("small != 4.5", [0, 1]),
        ("small < 1000", [0, 1]),
        ("not (small >= -1000)", []),
        ("small < 1e999", [0, 1]),
        ("small in (4.0, 0.5)", [1]),
        ("long > 0.5", [0]),
        (f"long > {2**53}.0", [0]),
        ("word == 7", [0]),
        ("word in (7, 8)", [0]),
        ("word > 7.5", [1]),
        ("single == 0.1", [0]),
        ("single in (0.1,)", [0]),
        ("single not in (0.1,)", [1]),
        ("single > 0.1", [1]),
        ("single < 1e300", [0, 1]),
        ("double in (3.5, 9007199254740993)", [0]),
        ("flag == 1", [0]),
        ("flag < 0.5", [1]),
        ("flag != 2", [0, 1]),
        ("flag in (1,)", [0]),
        ("small == True", []),
        ("True < small", [1]),
        ("cents in (2.2, 1)", [1]),
        ("cents not in (2.2, 1.001)", [0]),
        ("cents < 1e999", [0, 1]),
        ("single in (" + "0.1, " * 3000 + ")", [0]),
    ],
)
def test_numbers_are_compared_in_what_a_column_holds(text, rows):
    """Arrow would cast the column, and fail or round."""
    table = pa.table(INTEGERS)
    kinds = dict(zip(table.schema.names, table.schema.types, strict=True))
    source = acero.Declaration("table_source", acero.TableSourceNodeOptions(table))
    options = acero.ProjectNodeOptions([parse_filter(text, kinds)], ["kept"])
    kept = acero.Declaration("project", options, [source]).to_table()["kept"].to_pylist()
    assert [row for row, passes in enumerate(kept) if passes] == rows


@pytest.mark.parametrize(
    ("text", "trusted"),
    [
        ("f > 0 and not i > 0", True),
        ("f in (0.0, 1.0)", True),
        ("f != 0 or i > 0", False),
        ("not (i > 0 and f > 0)", False),
        ("i != 0 and f > 0", True),
        ("f not in (1,)", False),
        ("f > -1", True),
    ],
)
def test_statistics_do_not_decide_negations_of_floats(text, trusted):
    assert trusts_statistics(text, {"f": pa.float32(), "i": pa.int64()}) is trusted


def test_numbers_of_any_size_are_taken_before_a_file_is_read():
    """When the column's type is not known yet."""
    assert parse_filter("x in (3.5, 9007199254740993)") is not None


def test_columns():
    assert columns_of("b == 'x' or not (a < 3 and b != 'y')") == ["a", "b"]


WIDE = {
    "small": pa.array([1, 2**53 + 1, -(2**63)], pa.int64()),
    "large": pa.array([1, 2**53 + 1, 2**64 - 1], pa.uint64()),
    "half": pa.array([np.float16(0.5), np.float16(0.1), None]),
    "flag": [True, False, None],
    "user id": [1, 2, 3],
    "class": ["`", "b", "c"],
    "word": ["x", "y", "z"],
    "at": pa.array([1, 2, 3], pa.timestamp("s")),
    "tags": [[1], [2], [3]],
}


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("large > 18446744073709551614", [2]),
        ("small < -9223372036854775807", [2]),
        ("small == 9007199254740993", [1]),
        ("small == large", [0, 1]),
        ("large > small", [2]),
        ("flag < small", [1]),
        ("half == 0.1", [1]),
        ("half > 0.2", [0]),
        ("half in (0.5, 70000)", [0]),
        ("half is None", [2]),
        ("half == True", []),
        ("flag in (1,)", [0]),
        ("`user id` > 1 and `user id` <= 2", [1]),
        ("`class` == '`'", [0]),
        ("`user id` in (1, 3)", [0, 2]),
    ],
)
def test_columns_of_any_width_and_name(text, rows):
    table = pa.table(WIDE)
    kinds = dict(zip(table.schema.names, table.schema.types, strict=True))
    found = dataset.dataset(table).to_table(filter=parse_filter(text, kinds))
    assert found["user id"].to_pylist() == [row + 1 for row in rows]
    assert parse_filter(normal_filter(text), kinds).equals(parse_filter(text, kinds))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("word > 3", "column 'word' holds string, and is compared with strings, got 3"),
        ("word in ('a', 3)", "column 'word' holds string"),
        ("small == 'a'", "column 'small' holds int64, and is compared with numbers, got 'a'"),
        ("flag == 'a'", "column 'flag' holds bool"),
        ("half in ('a',)", "column 'half' holds halffloat"),
        ("at > 3", "strings such as '2026-11-30', got 3"),
        ("tags == 1", "which is compared with None alone"),
        ("word > small", "columns 'word', which holds string, and 'small', which holds int64"),
    ],
)
def test_what_a_type_cannot_be_is_refused(text, words):
    table = pa.table(WIDE)
    kinds = dict(zip(table.schema.names, table.schema.types, strict=True))
    with pytest.raises(ValueError, match=r"^filter: ") as refused:
        parse_filter(text, kinds)
    assert words in str(refused.value)
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("user id > 3", "wrong at 'id > 3'; a column whose name is no identifier stands in back"),
        ("i = 3", "wrong at '= 3'"),
        ("user-id > 3", "got 'user - id' in 'user-id > 3'; if it is the name of a column, put it"),
    ],
)
def test_the_place_in_a_filter_is_named(text, words):
    with pytest.raises(ValueError, match=r"^filter: expected comparisons") as refused:
        parse_filter(text)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("usr > 3", "filter: columns ['usr'] of 'usr > 3' are missing; it has ['d', 'user', 'w']"),
        ("w > 3", "filter: column 'w' holds string"),
        ("user > d", "filter: Integer value 9007199254740993 not in range"),
    ],
)
def test_a_file_s_errors_say_that_they_are_of_the_filter(text, words, tmp_path):
    rows = {"user": [2**53 + 1], "d": [1.0], "w": ["x"]}
    parquet.write_table(pa.table(rows), tmp_path / "a.parquet")
    with pytest.raises(DataFileError, match="parquet: filter: ") as refused:
        ColumnarDataset(str(tmp_path / "a.parquet"), [Id("user")], filter=text)
    assert words in str(refused.value)


def test_a_name_that_python_would_normalize_stays_itself():
    assert normal_filter("`\ufb01` == 2") == "`\ufb01` == 2"
    assert columns_of(normal_filter("`\ufb01` == 2")) == ["\ufb01"]


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("user IS NOT NULL", "write 'price is not None'"),
        ("a == 1 and user is  Null", "None, True and False are written so, and a null is None"),
        ("user IS NULL", "write 'price is None'"),
        ("click = 1", "equal is written '=='"),
        ("name == 'a=b' and click = 1", "equal is written '=='"),
        ("click <> 1", "unequal is written '!='"),
        ("a == 1 AND b >= 2", "'and', 'or', 'not' and 'in' are written small"),
        ("a == 1 && b == 2", "write 'and', 'or' and 'not'"),
        ("user id == 1", "a column whose name is no identifier stands in backticks"),
        ("name == 'x = y' b", "a column whose name is no identifier stands in backticks"),
    ],
)
def test_other_syntax_has_a_hint(text, hint):
    with pytest.raises(ValueError, match=re.escape(f"; {hint}")):
        parse_filter(text)
