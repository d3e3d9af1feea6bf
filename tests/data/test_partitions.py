"""Columns of paths: their types, values and filters."""

import pyarrow as pa
import pyarrow.parquet
import pytest
from pyarrow import orc

from recis_lightning.data import ColumnarDataset, DataFileError, Id, Number, hash_strings
from recis_lightning.data.partitions import partition_kinds, partitions_of, with_partitions
from tests.helpers.columnar_files import rows_of


@pytest.fixture(params=[".parquet", ".orc"])
def log(tmp_path, request):
    """Write four files of two days and two hours, of three rows each; return their pattern."""
    for file, (day, hour) in enumerate((d, h) for d in ("29", "30") for h in ("00", "05")):
        folder = tmp_path / f"day=2026-11-{day}" / f"hour={hour}"
        folder.mkdir(parents=True)
        rows = pa.table({"row": [3 * file, 3 * file + 1, 3 * file + 2], "x": ["a", "b", "a"]})
        if request.param == ".orc":
            orc.write_table(rows, folder / "a.orc")
        else:
            pa.parquet.write_table(rows, folder / "a.parquet", row_group_size=2)
    return str(tmp_path / f"day=*/hour=*/*{request.param}")


def test_columns_of_a_path():
    path = "s3://b=c/day=2026-11-30/n=-7/none=__HIVE_DEFAULT_PARTITION__/a%20b=x%2Fy/=1/c=d.orc"
    assert partitions_of(path) == {
        "b": "c",
        "day": "2026-11-30",
        "n": "-7",
        "none": None,
        "a%20b": "x/y",
    }
    assert {name: str(kind) for name, kind in partition_kinds(path).items()} == {
        "b": "string",
        "day": "string",
        "n": "int64",
        "none": "null",
        "a%20b": "string",
    }
    part = with_partitions(pa.table({"n": [1, 2]}), path, ["n", "day", "none"])
    assert part.to_pydict() == {"n": [1, 2], "day": ["2026-11-30"] * 2, "none": [None, None]}


def test_they_are_read_beside_those_of_the_file(log):
    columns = [Id("row"), Id("day", hash="xxh64"), Id("hour"), Number("h", source="hour")]
    batches = list(ColumnarDataset(log, columns, batch_size=4))
    assert rows_of(batches) == list(range(12))
    days = [day for batch in batches for day in batch["day"].tolist()]
    assert days == hash_strings(["2026-11-29"] * 6 + ["2026-11-30"] * 6).tolist()
    assert [h for batch in batches for h in batch["hour"].tolist()] == ([0] * 3 + [5] * 3) * 2
    assert batches[1]["h"].tolist() == [5.0, 5.0, 0.0, 0.0]


def test_they_may_be_all_that_is_read(log):
    batches = list(ColumnarDataset(log, [Id("hour")], batch_size=12))
    assert batches[0]["hour"].tolist() == ([0] * 3 + [5] * 3) * 2


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("day == '2026-11-30'", range(6, 12)),
        ("day > '2026-11-29' and x == 'b'", [7, 10]),
        ("hour == 5", [3, 4, 5, 9, 10, 11]),
        ("hour == '05' and day in ['2026-11-29']", [3, 4, 5]),
        ("hour not in [0, 1]", [3, 4, 5, 9, 10, 11]),
        ("hour < 3 or x == 'b'", [0, 1, 2, 4, 6, 7, 8, 10]),
        ("day is None", []),
        ("day is not None and not hour == 5", [0, 1, 2, 6, 7, 8]),
    ],
)
def test_they_are_filtered_by(log, text, rows):
    """As text, beside a string; as a number, beside a number."""
    data = ColumnarDataset(log, [Id("row")], filter=text)
    assert data.num_rows == len(rows)
    assert rows_of(data) == list(rows)


def test_what_differs_between_paths_is_named(tmp_path):
    for folder in ("v=1", "v=x"):
        (tmp_path / folder).mkdir()
        pa.parquet.write_table(pa.table({"row": [1]}), tmp_path / folder / "a.parquet")
    pattern = str(tmp_path / "v=*/*.parquet")
    with pytest.raises(DataFileError, match=r"v=x/a\.parquet: column 'v' holds strings, in earl"):
        ColumnarDataset(pattern, [Id("v")])
    with pytest.raises(DataFileError, match=r"columns \['w'\] are missing; it has \['row', 'v'\]"):
        ColumnarDataset(pattern, [Id("w")])


def test_hashed_ones_are_hashed_as_text(tmp_path):
    """As a string column of a file, or a request, with the same text is."""
    texts = ["1234", "01234", "0a", "9" * 18]
    for text in texts:
        folder = tmp_path / f"zip={text}"
        folder.mkdir()
        pa.parquet.write_table(pa.table({"row": [0]}), folder / "a.parquet")
    data = ColumnarDataset(str(tmp_path / "zip=*" / "*.parquet"), [Id("zip", hash="xxh64")], 9)
    (batch,) = data
    assert sorted(batch["zip"].tolist()) == sorted(hash_strings(texts).tolist())


def test_integers_have_64_bits():
    """More digits are text."""
    kinds = partition_kinds(f"a={2**63 - 1}/b={-(2**63)}/c={2**63}/x", {"d"})
    assert {name: str(kind) for name, kind in kinds.items()} == {
        "a": "int64",
        "b": "int64",
        "c": "string",
    }
    assert str(partition_kinds("d=5/x", {"d"})["d"]) == "string"
