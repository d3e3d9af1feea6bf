"""TableDict: any name, and state dicts that tell names apart."""

import copy
import pickle

import pytest
from torch import nn

from recis_lightning import HashTable
from recis_lightning.table.table_dict import TableDict

NAMES = [
    *("item", "type", "keys", "items", "values", "pop", "forward", "training", "_modules", "add"),
    *("user.id", ".", "a.b.c", "%75ser%2Eid", "%2Eb", "100%", "a%2Eb", "é.x", "with space", "%"),
]


def test_any_name_is_a_key():
    """Names come back as they were given, in their order, and find their own module."""
    modules = {name: nn.Identity() for name in NAMES}
    tables = TableDict(modules)
    assert list(tables) == list(tables.keys()) == NAMES
    assert len(tables) == len(NAMES)
    assert all(tables[name] is module for name, module in modules.items())
    assert all(name in tables for name in NAMES)
    assert "other.name" not in tables
    assert dict(tables.items()) == modules
    assert [path.count(".") for path, _ in tables.named_children()] == [0] * len(NAMES)
    assert tables.pop("user.id") is modules["user.id"]
    assert "user.id" not in tables
    assert list(copy.deepcopy(tables)) == list(pickle.loads(pickle.dumps(tables))) == list(tables)


def test_state_dicts_tell_names_apart():
    """One key a table, that of ordinary names and of methods' names as it is."""
    tables = TableDict({name: HashTable(2, name=name) for name in NAMES})
    keys = list(tables.state_dict())
    assert len(set(keys)) == len(NAMES)
    assert keys[:3] == ["item._extra_state", "type._extra_state", "keys._extra_state"]
    tables.load_state_dict(tables.state_dict())
    assert tables.eval()["training"].training is False


@pytest.mark.parametrize(
    ("name", "module", "error"),
    [("", nn.Identity(), ValueError), (3, nn.Identity(), TypeError), ("a", None, TypeError)],
)
def test_what_is_no_name_and_no_module(name, module, error):
    with pytest.raises(error, match="expected a"):
        TableDict()[name] = module
