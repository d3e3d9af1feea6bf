"""SparseDenseOptimizer: a dense and a sparse optimizer as one."""

import copy

import pytest
import torch
from torch import nn

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer
from tests.helpers.sample_tables import EXTREMES as IDS


def dense_and_sparse():
    module = nn.Sequential(DynamicEmbedding(4, name="both"), nn.Linear(4, 1))
    return module, SparseDenseOptimizer(
        torch.optim.AdamW(module.parameters(), lr=0.1), SparseAdam(hash_tables(module), lr=0.2)
    )


def test_both_parts_step_and_forget():
    """Groups, states and steps of the parts are those of the whole."""
    module, optimizer = dense_and_sparse()
    module(IDS).sum().backward()
    optimizer.zero_grad()
    before = copy.deepcopy(module.state_dict())
    optimizer.step()
    assert str(module.state_dict()) == str(before)
    loss = module(IDS).sum()
    loss.backward()
    optimizer.step()
    assert str(module.state_dict()) != str(before)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    assert optimizer.param_groups[1]["name"] == "sparse"
    assert optimizer.state is optimizer.dense.state
    assert len(optimizer.state) == 2


def test_a_scheduler_drives_both():
    """Groups are the same objects as those of the parts."""
    _, optimizer = dense_and_sparse()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    scheduler.step()
    assert optimizer.dense.param_groups[0]["lr"] == 0.05
    assert optimizer.sparse[0].param_groups[0]["lr"] == 0.1


def test_state_dict_goes_through_both_parts():
    """After loading, both parts still share groups and state with the whole."""
    module, optimizer = dense_and_sparse()
    other, other_optimizer = dense_and_sparse()
    for _ in range(3):
        module(IDS).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.param_groups[1]["lr"] = 0.7
    other.load_state_dict(module.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, optim in ((module, optimizer), (other, other_optimizer)):
        model(IDS).sum().backward()
        optim.step()
        assert optim.sparse[0].param_groups[0]["lr"] == 0.7
    assert torch.equal(other[0].table.embeddings(IDS), module[0].table.embeddings(IDS))
    assert torch.equal(other[1].weight, module[1].weight)
    assert other_optimizer.state is other_optimizer.dense.state


def test_groups_cannot_be_added_to_the_whole():
    """No part would step them."""
    _, optimizer = dense_and_sparse()
    with pytest.raises(RuntimeError, match="add the group to the dense or sparse optimizer"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
