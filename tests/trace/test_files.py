"""Files of a trace: row groups, a new file when one is full, and rewinding to a step."""

import pyarrow.parquet
import pytest
import torch

from recis_lightning.trace import TraceWriter
from recis_lightning.trace import files as trace_files
from tests.helpers.trace_data import read_trace


def test_many_row_groups_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr(trace_files, "_GROUP_BYTES", 200)
    monkeypatch.setattr(trace_files, "_FILE_BYTES", 1000)
    with TraceWriter(tmp_path, ["id"]) as writer:
        for step in range(1, 101):
            writer.write(step, {"id": torch.tensor([step, -step])})
    files = sorted(tmp_path.glob("*.parquet"))
    assert len(files) > 3
    steps = [pyarrow.parquet.read_table(path)["step"].to_pylist() for path in files]
    assert [step for file in steps for step in file] == [
        step for step in range(1, 101) for _ in range(2)
    ]


def test_rewind_keeps_what_came_before(tmp_path):
    for rank in range(3):
        with TraceWriter(tmp_path, ["id"], rank=rank) as writer:
            for step in range(1, 5):
                writer.write(step, {"id": torch.arange(2)}, {"half": (step - 1) // 2})
    (tmp_path / "half=0" / ".rank-00000-step-000000000009.parquet.part").touch()
    (tmp_path / "half=0" / "notes.txt").touch()
    with TraceWriter(tmp_path, ["id"], rank=0) as writer:
        assert writer.rewind(3, ranks=2) == 4  # of ranks 0 and 2
    found = read_trace(tmp_path / "half=1")
    assert list(zip(found["rank"], found["step"], strict=True)) == [
        *[(0, 3), (0, 3), (1, 3), (1, 3), (2, 3), (2, 3), (1, 4), (1, 4)]
    ]
    assert not list(tmp_path.rglob("*.part"))
    assert (tmp_path / "half=0" / "notes.txt").exists()


def test_a_column_that_changes_its_type_is_refused_and_the_rest_is_kept(tmp_path):
    writer = TraceWriter(tmp_path, ["id"])
    writer.write(1, {"id": torch.arange(2)})
    writer.write(2, {"id": torch.rand(2)})
    with pytest.raises(
        RuntimeError, match=r"step 2 on is lost: .*'id' was int64 before, is float now"
    ):
        writer.close()
    assert read_trace(tmp_path)["id"] == [0, 1]
