"""Lists of tables: each once, under its name."""

import copy

import torch
from torch import nn

from recis_lightning import (
    DynamicEmbedding,
    EmbeddingEngine,
    EmbeddingOption,
    HashTable,
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
