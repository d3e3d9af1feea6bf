"""Names of parts, and the patterns that choose and rename them."""

import pytest
import torch
from torch import nn

from recis_lightning import DynamicEmbedding, HashTable
from recis_lightning.checkpoint.name_patterns import (
    check_patterns,
    dense_tensors,
    matches,
    renamed,
    table_parts,
)
from recis_lightning.optim import SparseAdam


@pytest.mark.parametrize(
    ("name", "patterns", "expected"),
    [
        ("user", ["user"], True),
        ("user", ["us*"], True),
        ("user", ["*.exp_avg*"], False),
        ("User", ["user"], False),
        ("a[0]", ["a[0]"], True),
        ("a0", ["a[0]"], True),
        ("user", [], False),
    ],
)
def test_matches(name, patterns, expected):
    assert matches(name, patterns) is expected


@pytest.mark.parametrize(
    ("name", "rules", "expected"),
    [
        ("old_a", {"old_*": "new_*"}, "new_a"),
        ("a.old.b", {"*.old.*": "*.*"}, "a.b"),
        ("old_", {"old_*": "*"}, ""),
        ("user", {"user": "customer", "*": "x*"}, "customer"),
        ("item", {"user": "customer"}, "item"),
        ("a.b", {"axb": "c"}, "a.b"),
        ("axb", {"a.b": "c"}, "axb"),
    ],
)
def test_renamed(name, rules, expected):
    assert renamed(name, rules)[0] == expected


@pytest.mark.parametrize("wrong", ["user", {"user": 1}, [1], 3])
def test_what_are_no_patterns(wrong):
    with pytest.raises(TypeError, match="exclude: expected a list of names or patterns, got"):
        check_patterns("exclude", wrong)


def test_parts_of_a_module():
    """Those of its state_dict, but for tables; shared modules under each of their names."""
    module = nn.Module()
    module.norm = nn.BatchNorm1d(2)
    module.user = DynamicEmbedding(2, name="user")
    module.again = module.norm
    module.register_buffer("scratch", torch.ones(1), persistent=False)
    tables = [name for name in module.state_dict() if name.endswith("_extra_state")]
    assert list(dense_tensors(module)) == [n for n in module.state_dict() if n not in tables]
    _optimizer = SparseAdam([module.user.table], lr=0.1)
    assert table_parts([module.user.table, HashTable(2, name="b")]) == [
        *("user", "user.exp_avg", "user.exp_avg_sq"),
        "b",
    ]
