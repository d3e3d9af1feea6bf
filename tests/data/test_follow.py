"""Streams: new files are taken up, each once, window by window, through kills, on all ranks."""

import json
import logging
import os
import pickle
import random

import pyarrow as pa
import pyarrow.parquet
import pytest
from torch.utils.data import DataLoader

from recis_lightning.data import ColumnarDataset, DataFileError, Follow, Id, Window
from tests.helpers import rank_streams
from tests.helpers.columnar_files import rows_of

NEVER = 1e-3  # seconds between two looks: tests do not wait


@pytest.fixture
def log(tmp_path):
    """Return a writer of files of numbered rows."""
    return Log(tmp_path)


class Log:
    """Files that appear; rows are numbered, and ``at`` is each row's time in seconds."""

    def __init__(self, folder):
        self.folder, self.num_rows = folder, 0

    def write(self, name, num_rows=3, hours=None, row_group_size=2):
        rows = list(range(self.num_rows, self.num_rows + num_rows))
        self.num_rows += num_rows
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table(
            {
                "row": pa.array(rows, pa.int32()),
                "at": pa.array([3600 * hour for hour in hours or [0] * num_rows], pa.int64()),
            }
        )
        pa.parquet.write_table(table, path.with_suffix(".tmp"), row_group_size=row_group_size)
        path.with_suffix(".tmp").rename(path)
        return rows

    def stop(self):
        (self.folder / "STOP").touch()

    def dataset(self, batch_size=2, window=None, on_bad_file="error", shuffle_rows=0, **follow):
        follow = {"poll_seconds": NEVER, "stop_file": str(self.folder / "STOP"), **follow}
        return ColumnarDataset(
            str(self.folder / "**/*.parquet"),
            [Id("row")],
            batch_size,
            window=window,
            on_bad_file=on_bad_file,
            shuffle_rows=shuffle_rows,
            follow=Follow(**follow),
        )


def all_windows(data):
    return {name: rows_of(data) for name in data.windows()}


def test_files_that_appear_are_read_in_the_next_window(log):
    """By name within a window, whatever the name of those before; each once."""
    log.write("b.parquet")
    log.write("a.parquet")
    data, found = log.dataset(), []
    assert (data.window, data.num_windows, data.ended) == (None, None, False)
    for window in data.windows():
        found.append((window, data.epoch, rows_of(data)))
        if len(found) == 1:
            log.write("c.parquet")
            log.write("a-late.parquet", 1)
        else:
            log.stop()
    assert found == [("b.parquet", 0, [3, 4, 5, 0, 1, 2]), ("c.parquet", 1, [9, 6, 7, 8])]
    assert data.ended
    assert rows_of(data) == []  # and again
    assert data.epoch == 2


def test_files_are_read_in_the_order_of_time(log):
    for name, time in (("b", 1), ("a", 2), ("c", 3)):
        log.write(f"{name}.parquet", 1)
        os.utime(log.folder / f"{name}.parquet", ns=(time, time))
    log.stop()
    assert all_windows(log.dataset(order="time")) == {"c.parquet": [0, 1, 2]}
    assert all_windows(log.dataset(order="name")) == {"c.parquet": [1, 0, 2]}


def test_a_stop_file_may_have_brackets(log):
    log.write("a.parquet")
    data = log.dataset(stop_file=str(log.folder / "STOP[1]"))
    (log.folder / "STOP[1]").touch()
    assert all_windows(data) == {"a.parquet": [0, 1, 2]}


def test_it_waits_for_the_first_file_and_for_the_next(log):
    """It asks before each look whether to stop: files appear then, once it has waited."""
    data, looks = log.dataset(), []

    def act():
        looks.append(data.window)
        if looks.count(None) == 3 and data.window is None:
            log.write("a.parquet")
        if len(looks) - looks.count(None) == 3:
            log.stop()

    data.stop_waiting = act
    assert all_windows(data) == {"a.parquet": [0, 1, 2]}
    assert looks.count(None) >= 3
    assert looks.count("a.parquet") >= 3


def test_a_timeout_ends_it(log):
    log.write("a.parquet")
    data = log.dataset(timeout_seconds=0.05)
    assert all_windows(data) == {"a.parquet": [0, 1, 2]}
    log.write("b.parquet")  # it can be taken up again
    assert all_windows(data) == {"b.parquet": [3, 4, 5]}


def test_a_run_that_stops_does_not_wait(log):
    log.write("a.parquet")
    data = log.dataset(poll_seconds=1000)
    data.stop_waiting = lambda: data.epoch == 1
    assert all_windows(data) == {"a.parquet": [0, 1, 2]}
    assert data.ended
    assert pickle.loads(pickle.dumps(data)).stop_waiting is None


def test_windows_of_paths_begin_when_a_later_one_does(log):
    """What comes too late for its window is read in the next."""
    hour = "day=2026-11-30/hour={:02}/{}.parquet".format
    log.write(hour(5, "a"), 2)
    log.write(hour(6, "a"), 1)
    data, found = log.dataset(window="1h"), {}
    for window in data.windows():
        found[window] = rows_of(data)
        if window == "2026-11-30T05":
            log.write(hour(5, "late"), 1)
            log.write(hour(6, "b"), 2)
            log.write(hour(9, "a"), 1)
        if window == "2026-11-30T06":
            log.stop()
    assert found == {
        "2026-11-30T05": [0, 1],
        "2026-11-30T06": [3, 2, 4, 5],
        "2026-11-30T09": [6],
    }


def test_windows_of_a_column(log):
    """A file has rows of several, in one row group and in many."""
    log.write("a.parquet", 5, hours=[0, 1, 0, 2, 1], row_group_size=10)
    log.write("b.parquet", 3, hours=[1, 1, 5], row_group_size=1)
    data, found = log.dataset(window=Window("1h", "at")), {}
    for window in data.windows():
        found[window[-2:]] = rows_of(data)
        if window.endswith("01"):
            log.write("c.parquet", 2, hours=[0, 2])
            log.stop()
    assert found == {"00": [0, 2], "01": [1, 4, 5, 6], "02": [3, 8, 9], "05": [7]}


@pytest.mark.parametrize("window", [None, Window("1h", "at")])
@pytest.mark.parametrize("shuffle_rows", [0, 4])
def test_each_row_once_through_stops_while_files_appear(log, window, shuffle_rows):
    """Interrupted anywhere, resumed with another batch size, with more files than before."""
    draw = random.Random(1)
    state, seen, epochs = None, [], []
    for life in range(40):
        for _ in range(draw.randint(0, 2)):
            hours = sorted(draw.randint(life // 4, life // 4 + 2) for _ in range(4))
            log.write(f"{draw.random()}.parquet", 4, hours=hours)
        if life > 30:
            log.stop()
        data = log.dataset(draw.randint(1, 4), window, shuffle_rows=shuffle_rows, timeout_seconds=0)
        if state is not None:
            data.load_state_dict(json.loads(state))
            assert json.loads(json.dumps(data.state_dict()))["files"] == json.loads(state)["files"]
        left = draw.randint(1, 4)
        for _ in data.windows():
            epochs.append(data.epoch)
            batches = iter(data)
            for batch in batches:
                seen += batch["row"].tolist()
                left -= 1
                if left == 0:
                    break
            if left == 0:
                batches.close()
                break
        state = json.dumps(data.state_dict())
    data = log.dataset(window=window, shuffle_rows=shuffle_rows)
    data.load_state_dict(json.loads(state))
    for _ in data.windows():
        seen += rows_of(data)
    assert sorted(seen) == list(range(log.num_rows))
    assert epochs == sorted(epochs)
    assert len(data.state_dict()["files"]["done"]) < 12 * (log.num_rows // 4 + 1)


def test_a_state_goes_to_another_folder_but_not_to_other_files(log, tmp_path):
    log.write("day=1/a.parquet", 4)
    log.write("day=2/a.parquet", 4)
    log.stop()
    data = log.dataset()
    data.set_epoch(0)
    state = data.state_dict(1)
    moved = Log(tmp_path / "moved")
    for day in (1, 2):
        path = moved.folder / f"day={day}/a.parquet"
        path.parent.mkdir(parents=True)
        (log.folder / f"day={day}/a.parquet").rename(path)
    moved.stop()
    copy = moved.dataset()
    copy.load_state_dict(state)
    assert rows_of(copy) == [2, 3, 4, 5, 6, 7]
    moved.write("day=2/a.parquet", 5)
    changed = moved.dataset()
    changed.load_state_dict(state)
    with pytest.raises(DataFileError, match=r"day=2/a.parquet: the file has changed since a part"):
        rows_of(changed)
    (moved.folder / "day=1/a.parquet").unlink()
    gone = moved.dataset()
    gone.load_state_dict(state)
    with pytest.raises(DataFileError, match=r"day=1/a.parquet: there is no such file"):
        rows_of(gone)
    with pytest.raises(ValueError, match="state: it is a place in other data"):
        log.dataset(window=Window("1h", "at")).load_state_dict(state)


@pytest.mark.parametrize("num_batches", [1, 2])
@pytest.mark.parametrize("paths", [["logs/*.parquet", "more/*.parquet"], ["*/*.parquet"]])
def test_paths_may_be_added_and_widened(log, paths, num_batches):
    """Within a window and after it: what was read is not read again."""
    log.write("logs/a.parquet")
    log.write("more/b.parquet", 1)

    def stream(paths):
        paths = [str(log.folder / path) for path in paths]
        return ColumnarDataset(paths, [Id("row")], 2, follow=Follow("name", NEVER, None, 0.0))

    data = stream(["logs/*.parquet"])
    data.set_epoch(0)
    rows = [batch["row"].tolist() for batch in data]
    state = json.loads(json.dumps(data.state_dict() if num_batches == 2 else None))
    if state is None:
        data = stream(["logs/*.parquet"])
        data.set_epoch(0)
        state = data.state_dict(1)
    wider = stream(paths)
    wider.load_state_dict(state)
    seen = [batch["row"].tolist() for _ in wider.windows() for batch in wider]
    assert rows[:num_batches] + seen == [[0, 1], [2], [3]]


def test_a_file_in_work_must_stay_in_paths(log):
    log.write("logs/a.parquet")
    data = log.dataset()
    data.set_epoch(0)
    other = ColumnarDataset(
        [str(log.folder / "*"), str(log.folder / "more/*.orc")], [Id("row")], 2, follow=True
    )
    state = data.state_dict(1)
    state["files"]["files"][0][0] = "/nowhere/a.parquet"
    other.load_state_dict(state)
    with pytest.raises(
        DataFileError, match=r"/nowhere/a.parquet: a part of it was read, and paths"
    ):
        other.set_epoch(0)


def test_a_place_is_of_its_filter(log):
    log.write("a.parquet", 4)

    def stream(filter):
        paths = str(log.folder / "*.parquet")
        return ColumnarDataset(paths, [Id("row")], 1, filter=filter, follow=Follow("name", NEVER))

    data = stream("row < 2")
    data.set_epoch(0)
    state = data.state_dict(1)
    stream("(row<2)").load_state_dict(state)
    with pytest.raises(ValueError, match="of another filter: 'row < 2', and this is 'row >= 2'"):
        stream("row >= 2").load_state_dict(state)


def test_half_written_files_are_waited_for_and_bad_ones_named(log, caplog):
    """Once; a bad file that is replaced is read."""
    log.write("a.parquet")
    whole = (log.folder / "a.parquet").read_bytes()
    (log.folder / "b.parquet").write_bytes(whole[:20])
    data, found, looks = log.dataset(on_bad_file="skip"), [], []

    def act():  # three looks find no more than the bad file that was named
        looks.extend(["named"] * ("Skipped a file: " in caplog.text))
        if len(looks) == 3:
            log.write("d.parquet")

    with caplog.at_level(logging.WARNING, "recis_lightning"):
        for _ in data.windows():
            found.append(rows_of(data))
            if len(found) == 1:
                (log.folder / "b.parquet").write_bytes(whole)
                (log.folder / "c.parquet").write_bytes(whole[:-9])
                os.utime(log.folder / "c.parquet", ns=(5, 5))
            elif len(found) == 2:
                assert caplog.text == ""
                data.stop_waiting = act
            elif len(found) == 3:
                assert caplog.text.count("Skipped a file: ") == 1
                assert "c.parquet: " in caplog.text
                (log.folder / "c.parquet").write_bytes(whole)
                log.stop()
    assert found == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [0, 1, 2]]


@pytest.mark.parametrize("is_over", [False, True])
def test_a_bad_file_stops_the_run(log, is_over):
    (log.folder / "b.parquet").write_bytes(b"")
    if is_over:
        log.stop()
    with pytest.raises(DataFileError, match=r"b\.parquet: "):
        log.dataset().set_epoch(0)


def test_other_files_are_passed_over(log):
    log.write("a.parquet")
    (log.folder / "notes.txt").write_text("none of ours")
    log.stop()
    data = ColumnarDataset(
        [str(log.folder / "*"), str(log.folder / "*.parquet")],
        [Id("row")],
        follow=Follow(stop_file=str(log.folder / "STOP"), poll_seconds=NEVER),
    )
    assert all_windows(data) == {"0:a.parquet": [0, 1, 2]}


def test_a_stream_does_not_go_back(log):
    log.write("a.parquet")
    data = log.dataset(timeout_seconds=0)
    data.set_epoch(3)
    assert rows_of(data) == [0, 1, 2]
    data.set_epoch(3)  # the window is still open
    assert rows_of(data) == [0, 1, 2]
    with pytest.raises(ValueError, match="epoch: a stream does not go back from 3, got 2"):
        data.set_epoch(2)


def test_workers_read_the_window_that_their_parent_selected(log):
    log.write("a.parquet", 5)
    data = log.dataset()
    loader = DataLoader(data, batch_size=None, num_workers=1)
    with pytest.raises(RuntimeError, match="follow: call set_epoch\\(\\) before worker processes"):
        list(loader)
    data.set_epoch(0)
    assert rows_of(loader) == [0, 1, 2, 3, 4]


def test_ranks_agree_on_the_files(ranks, log):
    """Though each looks at its own time, and one stops the wait of all."""
    log.write("a.parquet", 5)
    found = ranks.run(2, rank_streams.follow, str(log.folder))
    assert sorted(row for rows in found for row in rows["first"]) == [0, 1, 2, 3, 4]
    assert sorted(row for rows in found for row in rows["second"]) == [100, 101, 102]
    assert [rows["error"] for rows in found] == [found[0]["error"]] * 2
    assert "bad.parquet: " in found[0]["error"]
    assert [rows["ended"] for rows in found] == [True, True]


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"order": "size"}, ValueError, "order: expected 'name' or 'time', got 'size'"),
        ({"poll_seconds": -1}, ValueError, "poll_seconds: expected a number >= 0"),
        ({"timeout_seconds": "1"}, TypeError, "timeout_seconds: expected a number >= 0"),
        ({"stop_file": 3}, TypeError, "stop_file: expected a str, got int"),
    ],
)
def test_bad_settings(settings, error, words):
    with pytest.raises(error, match=words):
        Follow(**settings)


def test_follow_is_a_bool_or_settings(tmp_path):
    with pytest.raises(TypeError, match="follow: expected a bool or Follow, got str"):
        ColumnarDataset(str(tmp_path / "*.parquet"), [Id("row")], follow="yes")
    with pytest.raises(ValueError, match="on_bad_file: expected"):
        ColumnarDataset("*.parquet", [Id("row")], follow=True, on_bad_file="ignore")
    assert ColumnarDataset(str(tmp_path / "*.parquet"), [Id("row")], follow=True).window is None
