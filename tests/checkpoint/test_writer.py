"""Which files tables are written to."""

import os

import torch

from recis_lightning import HashTable, checkpoint
from recis_lightning.checkpoint import shard_file, writer
from recis_lightning.optim import SparseAdam


def tables(count, rows=3):
    made = [HashTable(2, name=f"t{number}") for number in range(count)]
    SparseAdam(made, lr=0.1)
    for number, table in enumerate(made):
        table.insert(torch.arange(rows) + number, torch.full((rows, 2), float(number)))
        table.update_step(number)
    return made


def test_many_small_tables_share_files(tmp_path, monkeypatch):
    """One sync a file; each table is read by itself, and loads as it was saved."""
    monkeypatch.setattr(writer, "_SHARED_BYTES", 3000)
    syncs, fsync = [], os.fsync
    monkeypatch.setattr(shard_file.os, "fsync", lambda file: (syncs.append(file), fsync(file)))
    made = tables(100)
    made[7].insert(torch.arange(200_000), torch.ones(200_000, 2))
    checkpoint.save(tmp_path, made)
    files = sorted(file.name.split(".")[0] for file in tmp_path.glob("*.safetensors"))
    assert files[0] == "t7"
    assert set(files[1:]) == {f"tables+{number}" for number in range(len(files) - 1)}
    assert 2 <= len(files[1:]) <= 10
    assert len(syncs) == len(files) + 3  # the folder twice, and the commit
    loaded = [HashTable(2, name=table.name) for table in made]
    checkpoint.load(tmp_path, loaded)
    for one, other in zip(made, loaded, strict=True):
        assert one.step == other.step
        assert torch.equal(one.embeddings(one.ids()), other.embeddings(one.ids()))
        assert len(one) == len(other)
    contents = checkpoint.inspect(tmp_path)
    assert contents["t9"].rows == [3]
    assert contents["t9"].slots == {"exp_avg": 2, "exp_avg_sq": 2}
    assert checkpoint.read_table(tmp_path, "t9")["weights"].tolist() == [[9.0, 9.0]] * 3
    checkpoint.save(tmp_path, made[:2])
    assert len(list(tmp_path.iterdir())) == 3


def test_names_that_differ_in_case_only(tmp_path):
    """They are two files on a disk that takes both names for one."""
    made = [HashTable(2, name=name) for name in ("User", "user", "USER", "item")]
    for number, table in enumerate(made):
        table.insert(torch.tensor([number]), torch.full((1, 2), float(number)))
    checkpoint.save(tmp_path, made)
    files = [file.name for file in tmp_path.glob("*.safetensors")]
    assert len({name.casefold() for name in files}) == 4
    assert sum(name.startswith("item.0-of-1.") for name in files) == 1
    loaded = [HashTable(2, name=table.name) for table in made]
    checkpoint.load(tmp_path, loaded)
    assert [table.ids().tolist() for table in loaded] == [[0], [1], [2], [3]]
