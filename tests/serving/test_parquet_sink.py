import json
import os

import pyarrow.parquet as pq
import pytest
import torch

from recis_lightning import HashTable, serving
from tests.helpers.delta_model import Run


def read(folder):
    """Return the rows behind all deltas of a folder, table by table, by what the files say."""
    tables = {}
    for delta in sorted(folder.glob("delta-*")):
        for file in sorted(delta.iterdir()):
            table = pq.read_table(file)
            notes = json.loads(table.schema.metadata[b"recis_lightning"])
            rows = tables.setdefault(notes["table"], {})
            if notes["is_whole"]:
                rows.clear()
            for row in table.to_pylist():
                if row.pop("removed"):
                    assert row["weights"] is None
                    rows.pop(row["id"], None)
                else:
                    rows[row.pop("id")] = row
    return tables


def test_deltas_in_columns(tmp_path):
    """Who reads the files in order has the tables: rows, optimizer state and last steps."""
    run = Run()
    mark, sink = serving.ModelMark(run.model, state=True), serving.ParquetSink(tmp_path)
    for step in range(8):
        run.step()
        sink.write(mark.take(step))
    sink.close()
    found = read(tmp_path)
    for table in run.tables:
        ids, rows = table.ids_map()
        weights, slots = table.storage.rows.read(rows)
        of_table = found[table.name]
        assert sorted(of_table) == sorted(ids.tolist())
        for id, row, moment in zip(
            ids.tolist(), weights.float().tolist(), slots["exp_avg"].tolist(), strict=True
        ):
            assert of_table[id]["weights"] == row
            assert of_table[id]["slots.exp_avg"] == moment
    user = found["user"]
    assert {id: row["last_seen"] for id, row in user.items()} == dict(
        zip(user, run.model.user.table.last_seen(torch.tensor(list(user))).tolist(), strict=True)
    )


def test_a_delta_is_whole_or_not_there(tmp_path, monkeypatch):
    table = HashTable(2, name="a/b")
    mark, sink = serving.ModelMark([table]), serving.ParquetSink(tmp_path)
    (tmp_path / "delta-0000000000.part").mkdir(parents=True)  # of a run that was killed

    def fail(file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            sink.write(mark.take(0))
    assert not list(tmp_path.iterdir())
    mark.put_back()
    sink.write(mark.take(0))
    assert [path.name for path in tmp_path.iterdir()] == ["delta-0000000000"]
    assert read(tmp_path) == {"a/b": {}}
