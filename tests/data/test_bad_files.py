"""Files that are damaged, of another kind, empty, or change while they are read: each is named."""

import logging
import os
import random
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from pyarrow import orc

from recis_lightning.data import ColumnarDataset, DataFileError, Id, IdList, Number, file_reader
from tests.helpers.columnar_files import rows_of, table_of, write_files

SUFFIXES = [".parquet", ".orc"]
pytestmark = pytest.mark.parametrize("suffix", SUFFIXES)


def write(table, path):
    if path.suffix == ".orc":
        orc.write_table(table, path)
    else:
        pa.parquet.write_table(table, path, row_group_size=1000, write_page_checksum=True)


def read(pattern, columns=None, **settings):
    return ColumnarDataset(str(pattern), columns or [Id("row")], prefetch=0, **settings)


def damage(path, kind):
    """Make a file bad, in one of several ways."""
    table = table_of(4, 4)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    elif kind == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        path.write_bytes(b"row,user\n1,a\n" * 50)
    elif kind == "garbled footer":
        content = bytearray(path.read_bytes())
        half = len(content) // 2
        content[half:-8] = bytes(len(content) - 8 - half)
        path.write_bytes(content)
    elif kind == "missing column":
        write(table.drop_columns(["row"]), path)
    elif kind == "strings":
        write(table.set_column(0, "row", pa.array(["a", "b", "c", "d"])), path)
    elif kind == "floats":
        write(table.set_column(0, "row", pa.array([0.0, 1.0, 2.0, 3.0])), path)
    else:
        write(table.set_column(0, "row", pa.array([[0], [1], [2], [3]])), path)


BAD = {
    "truncated": "",
    "half": "",
    "empty": "",
    "foreign": "",
    "garbled footer": "",
    "missing column": r"columns \['row'\] are missing; it has \['click', ",
    "strings": "column 'row' holds strings, in earlier files integers or decimals",
    "floats": "column 'row' holds floats, in earlier files integers or decimals",
    "lists": "column 'row' holds lists of integers or decimals, in earlier files integers",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_named_or_skipped(tmp_path, kind, suffix, caplog):
    pattern = write_files(tmp_path, sizes=(4, 4, 4), suffix=suffix)
    path = tmp_path / f"part-1{suffix}"
    damage(path, kind)
    with pytest.raises(DataFileError, match=f"^{re.escape(str(path))}: {BAD[kind]}"):
        read(pattern)
    with caplog.at_level(logging.WARNING, "recis_lightning"):
        data = read(pattern, on_bad_file="skip")
    assert f"Skipped a file: {path}: " in caplog.text
    assert rows_of(data) == [0, 1, 2, 3, 8, 9, 10, 11]


def test_columns_that_are_not_read_may_differ(tmp_path, suffix):
    pattern = write_files(tmp_path, sizes=(4, 4), suffix=suffix)
    other = table_of(4, 4).drop_columns(["user"])
    other = other.set_column(1, "tags", pa.array(["a"] * 4)).append_column("new", pa.array([1] * 4))
    write(other.select(list(reversed(other.column_names))), tmp_path / f"part-1{suffix}")
    assert rows_of(read(pattern)) == list(range(8))


def test_columns_without_a_value(tmp_path, suffix):
    """All null in one file, and in every row of a type that no other file has."""
    lists = pa.list_(pa.int64())
    for index, rows in enumerate([[1, None], [None, None], [None]]):
        table = pa.table(
            {
                "row": pa.array(rows, pa.int32() if index else pa.int64()),
                "tags": pa.array([None if row is None else [row] for row in rows], lists),
                "price": pa.array([row and 0.5 for row in rows], pa.float32()),
            }
        )
        write(table, tmp_path / f"part-{index}{suffix}")
    if suffix == ".parquet":  # ORC has no such type
        nulls = {"row": pa.nulls(1), "tags": pa.nulls(1), "price": pa.nulls(1)}
        write(pa.table(nulls), tmp_path / f"part-3{suffix}")
    columns = [Id("row", default=-1), IdList("tags"), Number("price", default=2.0)]
    pattern = tmp_path / f"part-*{suffix}"
    (batch,) = read(pattern, columns)
    num_nulls = 5 if suffix == ".parquet" else 4
    assert batch["row"].tolist() == [1] + [-1] * num_nulls
    assert batch["tags"].lengths().tolist() == [1] + [0] * num_nulls
    assert batch["price"].tolist() == [0.5] + [2.0] * num_nulls
    words = rf"part-0{suffix}, part 0, column 'row': 1 of 2 values are null, and there is no"
    with pytest.raises(DataFileError, match=words):
        list(read(pattern))


def test_files_of_one_row_and_of_none(tmp_path, suffix):
    pattern = write_files(tmp_path, sizes=(0, 1, 0), suffix=suffix)
    data = read(pattern)
    assert data.num_rows == 1
    assert rows_of(data) == [0]
    none = read(tmp_path / f"part-0{suffix}")
    assert (none.num_rows, len(none), list(none)) == (0, 0, [])


def test_no_files(tmp_path, suffix):
    pattern = str(tmp_path / f"*{suffix}")
    with pytest.raises(FileNotFoundError, match=re.escape(f"paths: no file matches '{pattern}'")):
        read(pattern)
    (tmp_path / f"a{suffix}").write_bytes(b"")
    with pytest.raises(ValueError, match=r"paths: none of the files of .* could be read"):
        read(pattern, on_bad_file="skip")


@pytest.mark.parametrize("compression", ["snappy", "zstd", "zlib"])
def test_damage_within_a_file_is_named_when_it_is_read(tmp_path, suffix, compression):
    if compression == "zlib" and suffix == ".parquet":
        compression = "gzip"
    path = tmp_path / f"a{suffix}"
    if suffix == ".orc":
        orc.write_table(table_of(0, 3000), path, compression=compression)
    else:
        pa.parquet.write_table(table_of(0, 3000), path, compression=compression)
    content = bytearray(path.read_bytes())
    # ORC has no checksums: what decompresses to something cannot be told from data.
    content[4 : len(content) // 2] = random.Random(0).randbytes(len(content) // 2 - 4)
    path.write_bytes(content)
    data = read(path)
    with pytest.raises(DataFileError, match=rf"^{re.escape(str(path))}, part 0: "):
        list(data)


def test_a_file_that_changes_is_named(tmp_path, suffix):
    """Between epochs, and when it is gone."""
    data = read(write_files(tmp_path, suffix=suffix))
    path = tmp_path / f"part-0{suffix}"
    assert len(rows_of(data)) == data.num_rows
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataFileError, match=rf"part-0{suffix}, part 0: the file has changed"):
        list(data)
    path.unlink()
    with pytest.raises(DataFileError, match=rf"part-0{suffix}, part 0: there is no such file"):
        list(data)


@pytest.mark.parametrize("new", ["the same rows", "garbage", "another schema"])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, suffix, new, monkeypatch):
    """After it was opened, or as soon as the last byte was read."""
    path = tmp_path / f"a{suffix}"
    write(table_of(0, 20), path)
    data = read(path, filter="row >= 0")

    def change():
        if new == "garbage":
            path.write_bytes(bytes(1000))
        else:
            write(table_of(20, 20).drop_columns(["row"] if "schema" in new else []), path)

    filtered = file_reader._filtered
    monkeypatch.setattr(
        file_reader, "_filtered", lambda part, condition: (change(), filtered(part, condition))[1]
    )
    with pytest.raises(DataFileError, match=rf"a{suffix}, part 0: the file has changed since"):
        list(data)
    monkeypatch.undo()
    data = read(path) if new == "the same rows" else None
    if data is not None:
        assert rows_of(data) == list(range(20, 40))


@pytest.mark.slow
def test_ten_million_rows(tmp_path, suffix):
    """In one file of many parts, of which a rank's share is read in order."""
    path, num_rows = tmp_path / f"a{suffix}", 10_000_000
    rows = pa.table({"row": np.arange(num_rows, dtype=np.int32)})
    if suffix == ".orc":
        orc.write_table(rows, path, compression="zstd")
    else:
        pa.parquet.write_table(rows, path, row_group_size=1_000_000)
    del rows
    data = read(path, batch_size=65_536)
    first = 0
    for batch in data:
        (got,) = batch.values()
        assert int(got[0]) == first
        assert bool((got.diff() == 1).all())
        first += len(got)
    assert first == num_rows
    state = data.state_dict(150)
    data.load_state_dict(state)
    assert int(next(iter(data))["row"][0]) == 150 * 65_536
