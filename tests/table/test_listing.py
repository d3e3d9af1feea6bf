"""Lists of tables: each once, under its name."""

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
    """A shared table is one table; a name given by the user, or taken by use, stays."""
    shared = DynamicEmbedding(2)
    used = DynamicEmbedding(2)
    used(torch.tensor([1]))
    taken = used.table.name  # "table", unless another one alive has that name
    module = nn.ModuleDict({"a": shared, "b": shared, "c": HashTable(2, name="own"), "d": used})
    module["e"] = EmbeddingEngine({"f": EmbeddingOption(2), "g": EmbeddingOption(2, table="f")})
    tables = hash_tables(module)
    assert [table.name for table in tables] == ["a", "own", taken, "f"]
    assert hash_tables(tables[0]) == [tables[0]]
    assert tables[0].name == "a"
