"""``ShardLoader``: states that refer to shards, which tables keep their rows, and for how long."""

import copy
import gc
import json
import weakref

import pytest
import torch

from recis_lightning import HashTable, checkpoint
from recis_lightning.checkpoint.shard_loader import ShardLoader
from recis_lightning.table.state import REFERENCE, SCHEMA

NAMES = ("a", "b")


def tables():
    return [HashTable(2, name=name) for name in NAMES]


@pytest.fixture
def states(tmp_path):
    """Return the states of two tables of one row, as ``CheckpointHook`` writes them."""
    saved = tables()
    for i, table in enumerate(saved):
        table.insert(torch.tensor([i]), torch.ones(1, 2))
    checkpoint.save(tmp_path, saved)
    commit = json.loads((tmp_path / "checkpoint.json").read_text())
    fields = {"schema": SCHEMA, "embedding_dim": 2, REFERENCE: commit}
    return {name: {**fields, "name": name} for name in NAMES}


def ids_of(table):
    return table.ids().tolist()


def test_loads_each_table(states):
    loader, loaded = ShardLoader(), tables()
    for table in loaded:
        loader.load(table, states[table.name])
    assert [ids_of(table) for table in loaded] == [[0], [1]]


def test_a_loaded_table_keeps_its_rows_once(states):
    """For the states of that very commit: another one, though equal, is loaded."""
    loader, (table, other) = ShardLoader(), tables()
    table.insert(torch.tensor([5]), torch.ones(1, 2))
    again = copy.deepcopy(states)
    loader.note_loaded(states["a"][REFERENCE], [table])
    loader.load(table, states["a"])
    assert ids_of(table) == [5]
    loader.load(table, states["a"])
    assert ids_of(table) == [0]
    table.insert(torch.tensor([5]), torch.ones(1, 2))
    loader.note_loaded(states["a"][REFERENCE], [table])
    loader.load(other, states["b"])
    assert ids_of(other) == [1]
    loader.load(table, again["a"])
    assert ids_of(table) == [0]


def test_a_copy_of_a_module_is_loaded(states):
    """It is not among the tables that were loaded before, though it has their names."""
    loader, (table, _) = ShardLoader(), tables()
    loader.note_loaded(states["a"][REFERENCE], [table])
    twin = copy.deepcopy(table)
    loader.load(twin, states["a"])
    assert ids_of(twin) == [0]


def test_keeps_no_table_alive(states):
    loader, made = ShardLoader(), tables()
    loader.note_loaded(states["a"][REFERENCE], made)
    gone = [weakref.ref(table) for table in made]
    del made
    gc.collect()
    assert [table() for table in gone] == [None, None]


def test_checks_all_files_before_the_first_table(states, tmp_path):
    """A damaged file of another table changes no table; after its repair all are loaded."""
    loader, loaded = ShardLoader(), tables()
    file = next(tmp_path.glob("b.*"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    loaded[0].insert(torch.tensor([5]), torch.ones(1, 2))
    with pytest.raises(ValueError, match="is damaged"):
        loader.load(loaded[0], states["a"])
    assert ids_of(loaded[0]) == [5]
    file.write_bytes(content)
    for table in loaded:
        loader.load(table, states[table.name])
    assert [ids_of(table) for table in loaded] == [[0], [1]]
