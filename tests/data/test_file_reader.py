"""Reading files: only the columns and row groups that are needed are read from them."""

from random import Random

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from pyarrow import fs, orc

from recis_lightning.data import ColumnarDataset, DataFileError, Id, Number, Window
from recis_lightning.data.file_reader import FileReader
from tests.helpers.columnar_files import rows_of

NUM_ROWS, GROUP_ROWS = 1000, 100
NAN = float("nan")


class CountedFile(MemoryFile):
    """File that notes which of its bytes are read."""

    def read(self, length=-1):
        start = self.tell()
        content = super().read(length)
        CountedFiles.read_bytes += range(start, start + len(content))
        return content


class CountedFiles(MemoryFileSystem):
    """Files in memory, whose reads are noted."""

    protocol = "counted"
    store, pseudo_dirs, read_bytes = {}, [""], []

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("counted://").strip("/")

    def _open(self, path, mode="rb", **settings):
        found = super()._open(path, mode, **settings)
        if mode == "rb":
            found.seek(0)
            return CountedFile(self, path, found.getvalue())
        return found


@pytest.fixture
def counted():
    """Write rows in ten row groups; return where the chunk of each column and group lies."""
    fsspec.register_implementation("counted", CountedFiles, clobber=True)
    system = fsspec.filesystem("counted")
    rows, random = range(NUM_ROWS), Random(0)
    table = pa.table(
        {
            "row": pa.array(rows, pa.int64()),
            "price": pa.array([row * 0.5 for row in rows]),
            "at": pa.array([row // 250 * 3600 for row in rows], pa.int64()),
            "text": [random.randbytes(1024) for _ in rows],  # Arrow reads 64 KiB for a footer
        }
    )
    with system.open("/log/a.parquet", "wb") as out:
        pa.parquet.write_table(table, out, row_group_size=GROUP_ROWS, use_dictionary=False)
    chunks = {}
    with system.open("/log/a.parquet", "rb") as source:
        meta = pa.parquet.ParquetFile(source).metadata
        for group in range(meta.num_row_groups):
            for index in range(meta.num_columns):
                column = meta.row_group(group).column(index)
                first = column.data_page_offset
                chunks[column.path_in_schema, group] = range(
                    first, first + column.total_compressed_size
                )
    CountedFiles.read_bytes = []
    return chunks


def chunks_read(chunks):
    """Return the (column, row group) of which bytes were read since the last call."""
    seen, CountedFiles.read_bytes = set(CountedFiles.read_bytes), []
    found = {place for place, where in chunks.items() if not seen.isdisjoint(where)}
    return found - {("text", NUM_ROWS // GROUP_ROWS - 1)}  # it lies before the footer


def all_of(column, groups=range(NUM_ROWS // GROUP_ROWS)):
    return {(column, group) for group in groups}


def test_only_the_columns_of_a_batch_are_read(counted):
    data = ColumnarDataset("counted://log/*.parquet", [Id("row"), Number("price")], 64)
    assert chunks_read(counted) == set()  # footers say how many rows there are
    assert rows_of(data) == list(range(NUM_ROWS))
    assert chunks_read(counted) == all_of("row") | all_of("price")


def test_only_the_row_groups_that_a_filter_may_keep_are_read(counted):
    """Statistics of the footer decide for eight of ten, and only the filter's column is counted."""
    data = ColumnarDataset("counted://log/*.parquet", [Id("row")], 64, filter="price > 449.9")
    assert chunks_read(counted) <= all_of("price", [8, 9])
    assert rows_of(data) == list(range(900, NUM_ROWS))
    assert chunks_read(counted) == all_of("row", [9]) | all_of("price", [9])
    data = ColumnarDataset("counted://log/*.parquet", [Id("row")], 64, filter="price > 424.9")
    assert chunks_read(counted) <= all_of("price", [8, 9])
    assert rows_of(data) == list(range(850, NUM_ROWS))
    assert chunks_read(counted) == all_of("row", [8, 9]) | all_of("price", [8, 9])


FLOATS = [
    ([1.0, NAN, 1.0, 1.0], "a > 0", [0, 2, 3]),
    ([1.0, NAN, 1.0, 1.0], "a != 1.0", [1]),
    ([1.0, NAN, 1.0, 1.0], "not (a > 0)", [1]),
    ([0.0, 0.0], "a in (0.0, 1.0)", [0, 1]),
    ([0.0, 0.0], "a not in (0.0,)", []),
    ([0.0, -0.0, None, NAN], "a not in (5.0,)", [0, 1, 3]),
    ([0.1, 0.2, 0.3], "a in (0.1,)", [0]),
    ([0.1, 0.2, 0.3], "a not in (0.1,)", [1, 2]),
    ([0.1, None], "a is None or a == 0.1", [0, 1]),
]


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
@pytest.mark.parametrize(("values", "text", "rows"), FLOATS)
def test_a_filter_keeps_the_same_rows_of_any_file(tmp_path, kind, values, text, rows):
    """Whatever its format, its row groups and their statistics: these leave out NaN."""
    table = pa.table({"row": range(len(values)), "a": pa.array(values, kind)})
    orc.write_table(table, f"{tmp_path}/0.orc")
    for size in (1, 10):
        pa.parquet.write_table(table, f"{tmp_path}/{size}.parquet", row_group_size=size)
    for path in tmp_path.iterdir():
        assert rows_of(ColumnarDataset(str(path), [Id("row")], filter=text, prefetch=0)) == rows


def test_only_the_row_groups_of_a_window_are_read(counted):
    data = ColumnarDataset(
        "counted://log/*.parquet", [Id("row")], 64, window=Window("1h", "at"), prefetch=0
    )
    assert chunks_read(counted) == all_of("at")
    data.set_epoch(1)
    assert rows_of(data) == list(range(250, 500))
    assert chunks_read(counted) == all_of("row", [2, 3, 4]) | all_of("at", [2, 3, 4])


def test_a_resumed_epoch_reads_no_rows_that_were_trained(counted):
    data = ColumnarDataset("counted://log/*.parquet", [Id("row")], 100, prefetch=0)
    data.load_state_dict(data.state_dict(7))
    assert rows_of(data) == list(range(700, NUM_ROWS))
    assert chunks_read(counted) == all_of("row", [7, 8, 9])


def test_rows_of_windows(tmp_path):
    """Of a row group, with a filter, and those of earlier windows counted as of a later one."""
    table = pa.table({"row": [0, 1, 2, 3], "at": [7200, 0, 3600, 0], "x": [1, 1, 1, 0]})
    path, system = str(tmp_path / "a.parquet"), fs.LocalFileSystem()
    pa.parquet.write_table(table, path)
    reader = FileReader(["row"], "x > 0", Window("1h", "at"))
    for first_window, expected in ((-9, {0: [1], 1: [2], 2: [0]}), (1, {1: [1, 2], 2: [0]})):
        file = reader.examine(system, path, first_window)
        found = {
            s.window: reader.read(system, file, s)["row"].to_pylist() for s in file.splits_of(0)
        }
        assert found == expected


@pytest.mark.parametrize(
    ("name", "rows", "window", "words"),
    [
        ("a.parquet", [0], Window("1h"), r"a\.parquet: windows of 1h need a time in the path"),
        (
            "a.parquet",
            [None],
            Window("1h", "at"),
            r"a\.parquet: column 'at': 1 of 1 values are null",
        ),
        ("a.parquet", ["x"], Window("1h", "at"), r"a\.parquet: column 'at': expected integers"),
        ("a.parquet", [0], Window("1h", "time"), r"a\.parquet: columns \['time'\] are missing"),
    ],
)
def test_files_without_a_time_are_named(tmp_path, name, rows, window, words):
    pa.parquet.write_table(pa.table({"row": [0], "at": rows}), tmp_path / name)
    with pytest.raises(DataFileError, match=words):
        ColumnarDataset(str(tmp_path / name), [Id("row")], window=window)


def test_checksums_of_parquet_are_checked(tmp_path):
    """Of values that nothing compresses, whose damage shows by nothing else."""
    path = tmp_path / "a.parquet"
    rows = pa.table({"row": pa.array([0x1234567890] * 500, pa.int64())})
    pa.parquet.write_table(
        rows, path, compression="none", use_dictionary=False, write_page_checksum=True
    )
    content = bytearray(path.read_bytes())
    content[content.index(bytes.fromhex("9078563412")) + 800] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataFileError, match=r"a\.parquet, part 0: .*[Cc][Rr][Cc]"):
        list(ColumnarDataset(str(path), [Id("row")]))


@pytest.mark.parametrize("suffix", ["parquet", "orc"])
def test_a_column_that_is_there_twice(tmp_path, suffix):
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["row", "row"])
    write = pa.parquet.write_table if suffix == "parquet" else orc.write_table
    write(table, f"{tmp_path}/a.{suffix}")
    with pytest.raises(DataFileError, match=rf"a\.{suffix}: column 'row' is there 2 times"):
        ColumnarDataset(f"{tmp_path}/a.{suffix}", [Id("row")])


def test_a_struct_is_no_column(tmp_path):
    """Though it holds a list."""
    for name, rows in (("a", [{"x": [1]}]), ("b", [1])):
        pa.parquet.write_table(pa.table({"row": rows}), tmp_path / f"{name}.parquet")
    pattern = str(tmp_path / "*.parquet")
    with pytest.raises(DataFileError, match=r"a.parquet: column 'row' holds struct<x: list<"):
        ColumnarDataset(pattern, [Id("row")])
    assert rows_of(ColumnarDataset(pattern, [Id("row")], on_bad_file="skip")) == [1]


def test_a_folder_is_no_file(tmp_path):
    """As Spark writes it."""
    (tmp_path / "a.parquet").mkdir()
    with pytest.raises(DataFileError, match=r"a.parquet: it is a folder; .*/a.parquet/\*.parquet"):
        ColumnarDataset(str(tmp_path / "*.parquet"), [Id("row")])


def test_a_name_with_a_dot_beside_a_struct(tmp_path):
    orc.write_table(pa.table({"a.b": [1, 2], "a": [{"b": 8}, {"b": 9}]}), tmp_path / "s.orc")
    data = ColumnarDataset(str(tmp_path / "s.orc"), [Id("row", source="a.b")])
    assert rows_of(data) == [1, 2]
