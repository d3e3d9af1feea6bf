"""StepInspector: who an operator belongs to, and that looking changes nothing."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from recis_lightning import DynamicEmbedding, EmbeddingEngine, EmbeddingOption, hash_tables
from recis_lightning.monitoring.step_inspector import StepInspector
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer


class Model(nn.Module):
    """Two towers over one table, whose backward passes interleave; one is run twice."""

    def __init__(self, recomputed=False):
        super().__init__()
        torch.manual_seed(0)
        self.table = DynamicEmbedding(4, name="t")
        self.left = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.right = nn.Linear(4, 4)
        self.recomputed = recomputed

    def forward(self, ids):
        rows = self.table(ids)
        left = self.left
        once = checkpoint(left, rows, use_reentrant=False) if self.recomputed else left(rows)
        return self.right(once) + self.right(rows)


def step(model, optimizer, ids):
    model(ids).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def optimizer_of(model):
    dense = torch.optim.AdamW(model.parameters(), lr=0.1)
    return SparseDenseOptimizer(dense, SparseAdam(hash_tables(model), lr=0.1))


@pytest.mark.parametrize("size", [5, 1])
def test_flops_by_module_forward_and_backward(size):
    model = Model()
    optimizer, ids = optimizer_of(model), torch.arange(size)
    inspector = StepInspector(model)
    inspector.start()
    step(model, optimizer, ids)
    costs = inspector.stop(1)
    assert inspector.stop(2) is costs
    found = {cost.name: (cost.forward_flops, cost.backward_flops) for cost in costs.modules}
    linear = {"left.0": 4 * 8, "left.2": 8 * 4, "right": 2 * 4 * 4}
    for name, products in linear.items():
        assert found[name] == (2 * size * products, 4 * size * products), name
    assert found["left"] == (2 * size * 64, 4 * size * 64)
    assert found["left.1"] == found["table"] == (0, 0)
    with FlopCounterMode(display=False) as truth:
        model(ids).square().sum().backward()
    assert sum(found[""]) == truth.get_total_flops()


def test_tables_stand_apart_and_steps_count():
    model = Model()
    inspector = StepInspector(model)
    inspector.start()
    step(model, optimizer_of(model), torch.arange(3))
    costs = inspector.stop(1)
    by_module = {cost.name: cost for cost in costs.modules}
    by_operator = {cost.name: cost for cost in costs.operators}
    lookup = ("recis::find_or_insert", "recis::init_rows", "recis::gather")
    assert by_module["table"].table_bytes == sum(by_operator[n].num_bytes for n in lookup)
    assert by_module["table"].table_ms == pytest.approx(sum(by_operator[n].ms for n in lookup))
    assert by_module["left"].table_ms == by_module["left"].table_bytes == 0
    assert by_operator["recis::row_update"].num_bytes > 0
    assert by_operator["aten::addmm"].num_calls == 4
    assert not [name for name in by_operator if name.startswith("profiler::")]


def test_an_engine_called_by_concat_is_a_module_too():
    """No hook of torch sees a call but that of forward."""
    options = {"user": EmbeddingOption(4), "tags": EmbeddingOption(2, mode="sum")}
    model = nn.ModuleDict({"engine": EmbeddingEngine(options), "tower": nn.Linear(6, 1)})
    ids = {"user": torch.tensor([1, 2]), "tags": torch.tensor([[3, 4], [4, 5]])}
    inspector = StepInspector(model)
    inspector.start()
    model["tower"](model["engine"].concat(ids)).sum().backward()
    found = {cost.name: cost for cost in inspector.stop(1).modules}
    assert found["engine"].table_bytes == found[""].table_bytes > 0
    assert found["engine"].kind == "EmbeddingEngine"
    assert found["tower"].table_bytes == 0
    assert found["tower"].forward_flops == 2 * 2 * 6
    assert "concat" not in vars(model["engine"])
    with pytest.raises(ValueError, match="features"):
        model["engine"].concat({})


def test_a_recomputed_forward_pass_belongs_to_its_module():
    model = Model(recomputed=True)
    inspector = StepInspector(model)
    inspector.start()
    model(torch.arange(5)).sum().backward()
    found = {cost.name: cost for cost in inspector.stop(1).modules}
    assert found["left"].forward_flops == 2 * 5 * 64
    again = 2 * 5 * 32  # of the last layer nothing is asked for again
    assert found["left"].backward_flops == again + 4 * 5 * 64


def test_looking_changes_no_bit():
    results = []
    for looks in (False, True):
        model = Model()
        optimizer = optimizer_of(model)
        for number in range(3):
            inspector = StepInspector(model)
            if looks and number == 1:
                inspector.start()
            step(model, optimizer, torch.arange(number, number + 5))
            if looks and number == 1:
                inspector.stop(1)
        (table,) = hash_tables(model)
        results.append([*map(torch.clone, model.parameters()), table.embeddings(torch.arange(9))])
    assert all(map(torch.equal, *results))


def test_pauses_and_failures():
    model = Model()
    inspector = StepInspector(model)
    inspector.start()
    inspector.is_paused = True
    model(torch.arange(5))
    inspector.is_paused = False
    with pytest.raises(RuntimeError):
        model.left(torch.ones(2, 3))
    model.right(torch.ones(2, 4))
    costs = inspector.stop(1)
    found = {cost.name: cost for cost in costs.modules}
    assert found["right"].forward_flops == 2 * 2 * 16
    assert "left" not in found or not found["left"].forward_flops
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
