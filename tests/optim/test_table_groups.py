"""Groups of tables that an optimizer gets later."""

import copy

import pytest
import torch
from torch import nn

from recis_lightning import DynamicEmbedding
from recis_lightning.optim import SparseAdam, SparseSGD

IDS = torch.tensor([1, 2])


def _step(optimizer, *modules):
    for module in modules:
        module(IDS).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("give", [lambda m: m.table, lambda m: [m.table], lambda m: m.parameters()])
@pytest.mark.parametrize("kind", [SparseSGD, SparseAdam])
def test_a_group_that_comes_later_trains(kind, give):
    """As one that was there from the start: of tables, or of the parameters that stand for them."""
    rows = []
    for is_late in (False, True):
        one, other = (
            DynamicEmbedding(2, name="one", seed=1),
            DynamicEmbedding(2, name="two", seed=1),
        )
        groups = [{"params": [one.table]}, {"params": [other.table], "lr": 0.5}]
        optimizer = kind(groups[:1] if is_late else groups, lr=0.1)
        _step(optimizer, one)
        if is_late:
            optimizer.add_param_group({"params": give(other), "lr": 0.5})
        one, other, optimizer = copy.deepcopy((one, other, optimizer))
        _step(optimizer, one, other)
        assert [group["name"] for group in optimizer.param_groups] == ["one", "two"]
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]
        assert optimizer.tables == [one.table, other.table]
        optimizer.load_state_dict(optimizer.state_dict())
        rows += [one.table.embeddings(IDS), other.table.embeddings(IDS)]
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(rows[1], rows[3])


def test_what_is_no_group_of_other_tables_is_refused():
    """Before anything has changed."""
    module = DynamicEmbedding(2, name="only")
    optimizer = SparseSGD([module.table], lr=0.1)
    for params, error, words in [
        (module.table, ValueError, "table 'only' is there twice"),
        (list(module.parameters()), ValueError, "table 'only' is there twice"),
        ([], ValueError, "params: expected at least one HashTable, got none"),
        (nn.Linear(2, 3).parameters(), TypeError, r"got a parameter of shape \(3, 2\)"),
        ([3], TypeError, "expected HashTable, got int"),
        (None, TypeError, "expected an iterable of HashTable, got NoneType"),
    ]:
        with pytest.raises(error, match=words):
            optimizer.add_param_group({"params": params})
    with pytest.raises(TypeError, match="param_group: expected a dict with 'params', got 3"):
        optimizer.add_param_group(3)
    assert len(optimizer.param_groups) == 1
    _step(optimizer, module)
