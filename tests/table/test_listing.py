"""Lists of tables: each once, under its name."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from recis_lightning import (
    DynamicEmbedding,
    EmbeddingEngine,
    EmbeddingOption,
    HashTable,
    checkpoint,
    hash_tables,
)


def test_hash_tables_lists_each_once_and_names_the_unnamed():
    """A shared table is one table, and a name given by the user stays."""
    shared = DynamicEmbedding(2)
    used = DynamicEmbedding(2)
    used(torch.tensor([1]))
    module = nn.ModuleDict({"a": shared, "b": shared, "c": HashTable(2, name="own"), "d": used})
    module["e"] = EmbeddingEngine({"f": EmbeddingOption(2), "g": EmbeddingOption(2, table="f")})
    tables = hash_tables(module)
    assert [table.name for table in tables] == ["a", "own", "d", "f"]
    assert hash_tables(tables[0]) == [tables[0]]
    assert tables[0].name == "a"


def test_places_name_tables_that_were_trained_before():
    """The order of first lookups, which another process may not repeat, names nothing for long."""
    modules = nn.ModuleDict({"user": DynamicEmbedding(2), "item": DynamicEmbedding(2)})
    modules["item"](torch.tensor([1]))
    modules["user"](torch.tensor([1]))
    begun = modules["user"].table.name  # "table_2", or another number
    assert [table.name for table in hash_tables(modules)] == ["user", "item"]
    assert modules["user"].table.storage.name == "user"  # in errors
    alike, new = DynamicEmbedding(2, name=begun), torch.tensor([7])
    for module in (modules, copy.deepcopy(modules)):  # new rows begin as the first ones did
        assert torch.equal(module["user"](new), alike(new))


def test_a_run_that_resumes_begins_rows_as_the_first_one(tmp_path):
    """Also where its tables had rows before names; a table of another name begins as that."""
    first = nn.ModuleDict({"user": DynamicEmbedding(2), "item": DynamicEmbedding(2)})
    for name in ("item", "user"):
        first[name](torch.tensor([1]))
    checkpoint.save(tmp_path, first)
    new = torch.tensor([7])
    wanted = {name: module(new) for name, module in first.items()}
    by_state, by_folder = (
        nn.ModuleDict({name: DynamicEmbedding(2) for name in first}) for _ in range(2)
    )
    hash_tables(by_state)
    checkpoint.load(tmp_path, by_folder)
    by_state.load_state_dict(by_folder.state_dict())
    other = HashTable(2, name="other")
    other.set_extra_state(by_folder["user"].table.get_extra_state())
    assert other.begun_as is None
    for module in (by_folder, by_state):
        for name, rows in wanted.items():
            assert torch.equal(module[name](new), rows), name


def test_two_tables_of_one_name_are_warned_of():
    one, other = HashTable(2, name="user"), HashTable(2, name="user")
    with pytest.warns(UserWarning, match="first and second have two tables of one name, 'user'"):
        hash_tables(nn.ModuleDict({"first": one, "second": other}))
    with warnings.catch_warnings(record=True) as again:
        warnings.simplefilter("always")
        hash_tables(nn.ModuleDict({"first": one, "second": other}))
    assert not again


def test_a_table_in_two_places_and_its_copies_are_not():
    table = HashTable(2, name="user")
    hash_tables(nn.ModuleDict({"first": table, "second": table, "copy": copy.deepcopy(table)}))


def test_pickled_copies_are_none_of_another_name():
    """An average of a model may be made by a pickle, as by ``deepcopy``; also of a copy."""
    table = HashTable(2, name="user")
    pickled = pickle.loads(pickle.dumps(table))
    again = copy.deepcopy(pickle.loads(pickle.dumps(pickled)))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        hash_tables(nn.ModuleDict({"first": table, "average": pickled, "again": again}))
    assert not found
    with pytest.warns(UserWarning, match="first and other have two tables of one name, 'user'"):
        hash_tables(nn.ModuleDict({"first": pickled, "other": HashTable(2, name="user")}))
