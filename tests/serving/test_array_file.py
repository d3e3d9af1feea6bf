"""Files of arrays: written, mapped, and checked where they are read."""

import json

import numpy as np
import pytest

from recis_lightning.serving.array_file import ArrayWriter, FileRecord, MappedArrays

NUMBERS = np.arange(10_000, dtype=np.int64)


@pytest.fixture
def written(tmp_path):
    writer = ArrayWriter(tmp_path / "one.rows")
    writer.add("numbers", NUMBERS.shape, [NUMBERS[:3], NUMBERS[3:]])
    writer.add("none", (0, 4), [np.empty((0, 4), np.float32)])
    writer.add("bytes", (2, 3), [np.arange(6, dtype=np.uint8)])
    return tmp_path, writer.close()


def test_arrays_are_read_as_they_were_written(written):
    folder, record = written
    record = FileRecord.from_state(json.loads(json.dumps(record.to_state())))
    arrays = MappedArrays(folder, record)
    assert list(arrays) == ["numbers", "none", "bytes"]
    arrays.check_rows("numbers", np.array([0, 9_999]))
    assert not arrays.is_checked
    arrays.check_all()
    assert arrays.is_checked
    assert (arrays["numbers"] == NUMBERS).all()
    assert arrays["none"].shape == (0, 4)
    assert arrays["bytes"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert record.size == (folder / "one.rows").stat().st_size


@pytest.mark.parametrize(("place", "elsewhere"), [(0, 9_999), (8 * 5000, 9_999), (8 * 9999 + 7, 0)])
def test_a_flipped_bit_is_found_where_it_is_read(written, place, elsewhere):
    folder, record = written
    data = bytearray((folder / "one.rows").read_bytes())
    data[place] ^= 1
    (folder / "one.rows").write_bytes(data)
    arrays = MappedArrays(folder, record)
    arrays.check_rows("numbers", np.array([elsewhere]))
    with pytest.raises(ValueError, match=r"one\.rows: damaged between bytes"):
        arrays.check_rows("numbers", np.array([place // 8]))
    with pytest.raises(ValueError, match=r"one\.rows: damaged between bytes"):
        arrays.check_all()


def test_what_spans_chunks_is_checked_to_its_end(written):
    folder, record = written
    data = bytearray((folder / "one.rows").read_bytes())
    data[record.chunk_bytes] ^= 1  # the first byte of the second chunk
    (folder / "one.rows").write_bytes(data)
    arrays = MappedArrays(folder, record)
    last = record.chunk_bytes // 8 - 1
    arrays.check_rows("numbers", np.array([last]))
    with pytest.raises(ValueError, match="damaged"):
        arrays.check_rows("numbers", np.array([last]), count=2)


@pytest.mark.parametrize("change", ["cut", "longer", "missing", "folder", "checksums"])
def test_a_file_that_is_not_the_one_written_is_refused(written, change):
    folder, record = written
    path = folder / "one.rows"
    data = bytearray(path.read_bytes())
    if change == "cut":
        path.write_bytes(data[:-1])
    elif change == "longer":
        path.write_bytes(data + b"\0")
    elif change == "checksums":
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
        if change == "folder":
            path.mkdir()
    with pytest.raises(ValueError, match=r"one\.rows"):
        MappedArrays(folder, record)


@pytest.mark.parametrize(
    "changed",
    [
        {"file": "../one.rows"},
        {"file": "/etc/passwd"},
        {"file": "a\0"},
        {"file": 3},
        {"size": -1},
        {"size": True},
        {"size": 1 << 60},
        {"chunk_bytes": 3},
        {"chunk_bytes": 0},
        {"arrays": {"a": ["object", [1], 0]}},
        {"arrays": {"a": ["int64", [-1], 0]}},
        {"arrays": {"a": ["int64", [1], 8]}},
        {"arrays": {"a": ["int64", [1 << 47, 1 << 47], 0]}},
        {"arrays": {"a": ["int64", [1024], 0], "b": ["int64", [1], 4096]}},
        {"arrays": {"a": None}},
        {"arrays": []},
        {"more": 1},
    ],
)
def test_a_hostile_record_is_refused(written, changed):
    state = json.loads(json.dumps(written[1].to_state()))
    FileRecord.from_state(dict(state))
    with pytest.raises(ValueError, match=r"file|array|record|chunk"):
        FileRecord.from_state({**state, **changed})
