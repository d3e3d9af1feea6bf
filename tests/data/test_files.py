"""Files: which are found, their splits, and how bad ones are named."""

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest

from recis_lightning.data.file_reader import FileReader
from recis_lightning.data.files import FileSet, Pattern, find_files
from tests.helpers.columnar_files import table_of, write_files


@pytest.mark.parametrize("suffix", [".parquet", ".orc"])
def test_splits_and_their_rows(tmp_path, suffix):
    files = FileSet(write_files(tmp_path, suffix=suffix), FileReader(["row", "user"]))
    rows = [files.read(split)["row"].to_pylist() for split in files.splits]
    assert [row for part in rows for row in part] == list(range(22))
    assert [len(part) for part in rows] == [split.num_rows for split in files.splits]
    assert len(files.splits) == (4 if suffix == ".orc" else 10)


@pytest.mark.parametrize("suffix", [".parquet", ".orc"])
def test_a_filter_counts_and_keeps_its_rows(tmp_path, suffix):
    """Its columns need not be among those that are read; parts without rows are left out."""
    pattern = write_files(tmp_path, suffix=suffix)
    files = FileSet(
        pattern, FileReader(["row"], "country == 'DE' and click == False and price < 9")
    )
    rows = [row for split in files.splits for row in files.read(split)["row"].to_pylist()]
    assert rows == [1, 7]
    assert list(files.read(files.splits[0])) == ["row"]
    assert sum(split.num_rows for split in files.splits) == 2
    assert all(split.num_rows for split in files.splits)


def test_only_the_columns_asked_for_are_read(tmp_path, monkeypatch):
    files = FileSet(write_files(tmp_path), FileReader(["row", "click", "row"]))
    assert list(files.read(files.splits[0])) == ["row", "click"]


def test_order_of_patterns_and_names(tmp_path):
    """Names in order within a pattern; a file that two patterns match comes once."""
    write_files(tmp_path)
    found = find_files([str(tmp_path / "part-2.parquet"), str(tmp_path / "*.parquet")])
    assert [path[-9] for _, path in found] == ["2", "0", "1", "3"]


def test_brackets_of_files_and_folders_that_exist(tmp_path):
    for name in ("b[1].parquet", "b1.parquet", "data[v2]/c-1.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pa.parquet.write_table(table_of(0, 1), tmp_path / name)

    def found(text):
        return [path.removeprefix(f"{tmp_path}/") for _, path in find_files(f"{tmp_path}/{text}")]

    assert found("b[1].parquet") == ["b[1].parquet"]
    assert found("data[v2]/c-1.parquet") == found("data[v2]/*.parquet") == ["data[v2]/c-1.parquet"]
    assert found("data[v2]/c-[1-3].parquet") == ["data[v2]/c-1.parquet"]
    assert found("b[12].parquet") == ["b1.parquet"]
    assert Pattern.of(f"{tmp_path}/data[v2]/*.parquet").folder == f"{tmp_path}/data[v2]/"
    assert Pattern.of(f"{tmp_path}/b[1].parquet").folder == f"{tmp_path}/"
    with pytest.raises(
        FileNotFoundError, match=r"no file matches .*stand for themselves as \[\[\]"
    ):
        find_files("nowhere[1].parquet")


def test_a_file_is_found_once_by_all_its_paths(tmp_path, monkeypatch):
    pa.parquet.write_table(table_of(0, 1), tmp_path / "a.parquet")
    (tmp_path / "link.parquet").symlink_to(tmp_path / "a.parquet")
    monkeypatch.chdir(tmp_path)
    paths = ["a.parquet", "./a.parquet", f"file://{tmp_path}/a.parquet", "link.parquet"]
    assert [path for _, path in find_files(paths)] == ["a.parquet"]


def test_files_behind_a_url():
    """Through fsspec, as s3:// is."""
    system = fsspec.filesystem("memory")
    with system.open("/columnar/a.parquet", "wb") as out:
        pa.parquet.write_table(table_of(0, 4), out)
    files = FileSet("memory://columnar/*.parquet", FileReader(["row"]))
    assert files.read(files.splits[0])["row"].to_pylist() == [0, 1, 2, 3]
    with pytest.raises(FileNotFoundError, match=r"no file matches 'memory://columnar/\*\.orc'"):
        FileSet("memory://columnar/*.orc", FileReader(["row"]))


def test_widths_may_differ_and_columns_may_be_all_null(tmp_path):
    """int32 and int64, or a file without any value, are one kind."""
    for index, rows in enumerate(
        [pa.nulls(2), pa.array([1, 2], pa.int32()), pa.array([3, None], pa.int64()), pa.nulls(1)]
    ):
        pa.parquet.write_table(pa.table({"row": rows}), tmp_path / f"part-{index}.parquet")
    files = FileSet(str(tmp_path / "*.parquet"), FileReader(["row"]))
    rows = [row for split in files.splits for row in files.read(split)["row"].to_pylist()]
    assert rows == [None, None, 1, 2, 3, None, None]


def test_a_file_without_rows_has_no_splits(tmp_path):
    files = FileSet(write_files(tmp_path, sizes=(0, 2, 0)), FileReader(["row"]))
    assert [split.num_rows for split in files.splits] == [2]
    assert len(files.files) == 3


@pytest.mark.parametrize(
    ("paths", "error", "words"),
    [
        ([], ValueError, "paths: expected at least one file or pattern"),
        ("nowhere/*.parquet", FileNotFoundError, r"paths: no file matches 'nowhere/\*\.parquet'"),
        (["x.csv"], FileNotFoundError, "paths: no file matches 'x.csv'"),
    ],
)
def test_paths_that_name_nothing(paths, error, words):
    with pytest.raises(error, match=words):
        find_files(paths)


def test_other_bad_arguments(tmp_path):
    (tmp_path / "a.csv").write_text("row\n1\n")
    with pytest.raises(ValueError, match=r"expected names that end in .*got '.*a\.csv'"):
        find_files(str(tmp_path / "a.csv"))
    with pytest.raises(ValueError, match="on_bad_file: expected 'error' or 'skip', got 'ignore'"):
        FileSet(write_files(tmp_path), FileReader(["row"]), on_bad_file="ignore")
    (tmp_path / "part-0.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="paths: none of the files"):
        FileSet(str(tmp_path / "part-0.parquet"), FileReader(["row"]), on_bad_file="skip")


def test_a_folder_is_told_how_its_files_are_written(tmp_path):
    (tmp_path / "day").mkdir()
    with pytest.raises(ValueError, match=r"got '.*day', a folder: its files are '.*day/\*\.parq"):
        find_files(str(tmp_path / "day"))
