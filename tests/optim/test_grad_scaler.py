"""GradScaler: refused before it has changed anything."""

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


@pytest.mark.parametrize("part", ["both", "sparse"])
def test_a_grad_scaler_is_refused_before_anything_changed(part):
    """In a loop of one's own too: rows would move by gradients times the scale."""
    module, whole = dense_and_sparse()
    optimizer = whole if part == "both" else whole.sparse[0]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(module(IDS).sum()).backward()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="a GradScaler cannot unscale the gradients of tables"):
        scaler.step(optimizer)
    assert str(module.state_dict()) == str(before)
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)
    assert str(module.state_dict()) != str(before)


def test_whoever_asks_for_fused_unscaling_is_told():
    """Lightning asks for it wherever it clips, and has no scaler for bfloat16."""
    _, whole = dense_and_sparse()
    for optimizer in (whole, whole.sparse[0], copy.deepcopy(whole)):
        assert optimizer._step_supports_amp_scaling is False
