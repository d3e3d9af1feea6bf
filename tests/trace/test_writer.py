"""TraceWriter: columns of all kinds, a bounded queue, and errors that reach the caller."""

import sys
import threading
import time

import numpy as np
import pytest
import torch

from recis_lightning.jagged import Jagged
from recis_lightning.nested_jagged import NestedJagged
from recis_lightning.trace import TraceWriter, add_to_trace, collect_trace
from recis_lightning.trace import files as trace_files
from tests.helpers.trace_data import limited_file_size, read_trace


@pytest.fixture
def small_disk():
    """Let no file of this process grow beyond 20 kB."""
    with limited_file_size():
        yield


def test_a_full_disk_is_noticed_at_the_end(tmp_path, small_disk):
    """Rows are written only at the end, and closing raises."""
    with pytest.raises(RuntimeError, match="could not be written"), TraceWriter(tmp_path) as writer:
        writer.write(1, {"big": np.random.default_rng(0).random(100_000)})


def test_a_dead_writer_stops_the_next_step(tmp_path):
    writer = TraceWriter(tmp_path, ["id"])
    writer.write(1, {"id": torch.arange(3)})
    writer._queue.put(None)  # as if its thread had ended
    writer._thread.join()
    with pytest.raises(RuntimeError, match="could not be written"):
        writer.write(2, {"id": torch.arange(3)})


def test_the_queue_is_bounded(tmp_path, monkeypatch):
    """The caller waits for a slow writer; no more than ``queue_size`` steps wait."""
    gate, depth = threading.Semaphore(0), []
    append = trace_files.TraceFiles.append

    def slow(self, step):
        gate.acquire()
        append(self, step)

    monkeypatch.setattr(trace_files.TraceFiles, "append", slow)
    writer = TraceWriter(tmp_path, ["id"], queue_size=2)

    def produce():
        for step in range(1, 9):
            writer.write(step, {"id": torch.tensor([step])})
            depth.append(step)

    thread = threading.Thread(target=produce)
    thread.start()
    deadline = time.monotonic() + 60
    while len(depth) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.1)
    assert depth[-1] == 3  # one being written, two waiting
    gate.release(8)
    thread.join()
    writer.close()
    assert read_trace(tmp_path)["id"] == list(range(1, 9))


def test_columns_of_all_kinds(tmp_path):
    nested = torch.nested.nested_tensor(
        [torch.tensor([1, 2]), torch.tensor([3])], layout=torch.jagged
    )
    columns = {
        "matrix": torch.arange(6).view(2, 3),
        "cube": np.arange(8, dtype=np.float32).reshape(2, 2, 2),
        "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]),
        "jagged": Jagged(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([0, 0, 3])),
        "nested": nested,
        "bags": NestedJagged(
            torch.tensor([4, 5, 6]), torch.tensor([0, 2, 2, 3]), torch.tensor([0, 2, 3])
        ),
        "text": ["a", "bc"],
        "loss": torch.tensor(0.25),
        "name": "run",
        "lr": 1e-3,
    }
    with TraceWriter(tmp_path, rank=3) as writer, collect_trace() as found:
        for name, value in columns.items():
            add_to_trace(name, value)
        writer.write(7, found)
        writer.write(8, {**found, "matrix": torch.full((2, 3), 9)})
    rows = read_trace(tmp_path)
    assert rows["matrix"] == [[0, 1, 2], [3, 4, 5], [9, 9, 9], [9, 9, 9]]
    assert rows["cube"][1] == [[4.0, 5.0], [6.0, 7.0]]
    assert rows["half"][0] == 1.5
    assert rows["half"][1] != rows["half"][1]
    assert rows["flag"][:2] == [True, False]
    assert rows["jagged"][:2] == [[], [5.0, 6.0, 7.0]]
    assert rows["nested"][:2] == [[1, 2], [3]]
    assert rows["bags"][:2] == [[[4, 5], []], [[6]]]
    assert rows["text"][:2] == ["a", "bc"]
    assert rows["loss"] == [0.25] * 4
    assert rows["name"] == ["run"] * 4
    assert rows["lr"] == [1e-3] * 4
    assert rows["rank"] == [3] * 4
    assert rows["step"] == [7, 7, 8, 8]


def test_ranks_write_apart_and_no_rows_are_rows_too(tmp_path):
    for rank in (1, 0):
        with TraceWriter(tmp_path, ["id"], rank=rank) as writer:
            writer.write(1, {"id": torch.arange(2) + rank}, {"part": "a"})
            writer.write(2, {"id": torch.empty(0, dtype=torch.int64)}, {"part": "a"})
    found = read_trace(tmp_path)
    assert (found["rank"], found["id"]) == ([0, 0, 1, 1], [0, 1, 1, 2])
    assert found["part"] == ["a"] * 4


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"a": torch.arange(2), "b": torch.arange(3)}, "as many rows everywhere"),
        ({"a": torch.arange(2)}, r"missing \['b'\]"),
        ({"a": 1, "b": 2, "c": 3}, r"not known \['c'\]"),
    ],
)
def test_columns_that_do_not_fit(tmp_path, columns, words):
    with TraceWriter(tmp_path, ["a", "b"]) as writer, pytest.raises(ValueError, match=words):
        writer.write(1, columns)


def test_values_and_calls_are_checked(tmp_path, monkeypatch):
    with TraceWriter(tmp_path / "t", ["x"]) as writer, pytest.raises(TypeError, match="complex64"):
        writer.write(1, {"x": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(RuntimeError, match="is closed"):
        writer.write(1, {"x": torch.zeros(2)})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'recis-lightning\[trace\]'"):
        TraceWriter(tmp_path / "u")


def _complete(folder):
    return sorted(path.name for path in folder.rglob("rank-*.parquet"))


def test_files_are_completed_by_rows(tmp_path):
    """With the step that reaches them, and the next step begins a file of its own."""
    with TraceWriter(tmp_path, ["id"], flush_rows=5) as writer:
        for step in range(1, 6):
            writer.write(step, {"id": torch.arange(3) + step})
        writer.flush()
        writer.write(6, {"id": torch.arange(3)})
    steps = [1, 3, 5, 6]
    assert _complete(tmp_path) == [f"rank-00000-step-{step:012d}.parquet" for step in steps]
    assert read_trace(tmp_path)["step"] == [step for step in range(1, 7) for _ in range(3)]


def test_files_are_completed_by_seconds(tmp_path):
    """Without another step; and steps that come in time share a file."""
    with TraceWriter(tmp_path / "soon", ["id"], flush_seconds=0.05) as writer:
        for step in (1, 2):
            writer.write(step, {"id": torch.arange(3)})
            deadline = time.monotonic() + 60
            while len(_complete(tmp_path / "soon")) < step and time.monotonic() < deadline:
                time.sleep(0.005)
        assert len(_complete(tmp_path / "soon")) == 2
    with TraceWriter(tmp_path / "late", ["id"], flush_seconds=1000) as writer:
        for step in (1, 2):
            writer.write(step, {"id": torch.arange(3)})
    assert _complete(tmp_path / "late") == ["rank-00000-step-000000000001.parquet"]


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("flush_rows", 0, ValueError),
        ("flush_rows", 1.5, TypeError),
        ("flush_seconds", 0, ValueError),
        ("flush_seconds", float("nan"), ValueError),
        ("flush_seconds", "1", TypeError),
    ],
)
def test_bounds_of_files_are_checked(tmp_path, argument, value, error):
    with pytest.raises(error, match=f"{argument}: expected .* or None, got"):
        TraceWriter(tmp_path / "none", **{argument: value})
    assert not (tmp_path / "none").exists()
