"""SparseDenseOptimizer: a dense and a sparse optimizer as one."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from recis_lightning import DynamicEmbedding, HashTable, hash_tables
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer, SparseSGD
from tests.helpers.quiet_trainer import quiet_trainer
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
    assert optimizer.param_groups[1]["name"] == "both"
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


def test_a_dense_group_is_added():
    """The dense part steps it; groups keep their places, those of schedulers too."""
    module, optimizer = dense_and_sparse()
    head = nn.Linear(1, 1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    optimizer.add_param_group({"params": head.parameters(), "lr": 0.3})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.3]
    assert optimizer.param_groups[2]["betas"] == optimizer.param_groups[0]["betas"]
    before = head.weight.clone()
    head(module(IDS)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert not torch.equal(head.weight, before)
    assert module[0].table.num_updates == 1
    for twin in (copy.deepcopy(optimizer), optimizer):
        twin.load_state_dict(optimizer.state_dict())
        assert [group["lr"] for group in twin.sparse[0].param_groups] == [0.2]
        assert [group["lr"] for group in twin.dense.param_groups] == [0.1, 0.3]


def test_groups_that_somebody_sets_are_dense():
    """Lightning's finetuning sets them all when it resumes."""
    _, optimizer = dense_and_sparse()
    weight = nn.Parameter(torch.ones(1))
    added = {**optimizer.param_groups[0], "params": [weight]}
    optimizer.param_groups = [*map(dict, optimizer.param_groups), added]
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() != 1
    assert [len(part.param_groups) for part in (optimizer.dense, *optimizer.sparse)] == [2, 1]


def test_groups_that_a_part_gets_itself_are_kept():
    """By schedulers, states, and whatever comes to share the groups again."""
    module, optimizer = dense_and_sparse()
    late, extra = DynamicEmbedding(4, name="both"), nn.Parameter(torch.ones(2))
    late.table.insert(IDS, torch.zeros(*IDS.shape, 4))
    optimizer.sparse[0].add_param_group({"params": [late.table], "lr": 0.5})
    optimizer.dense.add_param_group({"params": [extra], "lr": 0.25})

    def step():
        (module(IDS).sum() + late(IDS).sum() + extra.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    state = optimizer.state_dict()
    assert [group["lr"] for group in state["param_groups"]] == [0.1, 0.2, 0.25, 0.5]
    names = [group.get("name") for group in optimizer.param_groups]
    assert names == [None, "both", None, "both-2"]
    step()
    optimizer.load_state_dict(state)
    optimizer.param_groups[3]["lr"] = 0.0  # as a scheduler does
    before = late.table.embeddings(IDS)
    step()
    assert bool((before != 0).all())
    assert torch.equal(late.table.embeddings(IDS), before)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    step()
    assert [len(part.param_groups) for part in optimizer._parts] == [3, 2]


def test_tables_are_not_added_twice_or_to_nobody():
    module, optimizer = dense_and_sparse()
    optimizer.add_param_group({"params": module[0].parameters()})  # there already
    assert len(optimizer.param_groups) == 2
    with pytest.raises(ValueError, match="param_group: has a table that no sparse optimizer has"):
        optimizer.add_param_group({"params": DynamicEmbedding(4).parameters()})
    assert len(optimizer.param_groups) == 2


def test_state_of_groups_without_anchors_loads():
    """As files have it that were written when tables had no parameters; none has them now."""
    _, optimizer = dense_and_sparse()
    state = optimizer.state_dict()
    assert [group["params"] for group in state["param_groups"]] == [[0, 1], []]
    optimizer.load_state_dict(state)
    optimizer.sparse[0].load_state_dict(optimizer.sparse[0].state_dict())
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]


def test_groups_are_named_by_their_tables():
    tables = [HashTable(2, name=name) for name in ("user", "item", "tags", "city", "zip")]
    groups = [{"params": tables[:1]}, {"params": tables[1:]}]
    assert [group["name"] for group in SparseAdam(groups).param_groups] == ["user", "item+3 more"]
    assert SparseAdam(tables[:3]).param_groups[0]["name"] == "user+item+tags"
    twice = [{"params": [HashTable(2, name="a")]}, {"params": [HashTable(2, name="a")]}]
    assert [group["name"] for group in SparseAdam(twice).param_groups] == ["a", "a-2"]
    named = SparseAdam([{"params": tables[:1], "name": "mine"}])
    assert named.param_groups[0]["name"] == "mine"


def test_a_sparse_group_has_no_defaults_of_the_dense_optimizer():
    _, optimizer = dense_and_sparse()
    assert set(optimizer.param_groups[1]) == {
        *("params", "name", "lr", "betas", "eps", "weight_decay")
    }
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)
    assert optimizer.param_groups[0]["weight_decay"] == 0.01
    assert optimizer.defaults == optimizer.dense.defaults


@pytest.mark.parametrize("kind", [SparseAdam, SparseSGD])
def test_learning_rate_monitor_names_tables(tmp_path, kind):
    class Model(BoringModel):
        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleList(HashTable(2, name=name) for name in ("pg1", "item"))

        def configure_optimizers(self):
            sparse = [kind([table], lr=0.25) for table in self.tables]
            return SparseDenseOptimizer(torch.optim.AdamW(self.parameters(), lr=0.5), sparse)

    monitor = LearningRateMonitor(log_momentum=True, log_weight_decay=True)
    settings = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1, "limit_val_batches": 0}
    quiet_trainer(tmp_path, monitor, limit_train_batches=2, **settings).fit(Model())
    prefix = "lr-SparseDenseOptimizer"
    assert {name: values[-1] for name, values in monitor.lrs.items()} == {
        f"{prefix}/pg1": 0.5,
        f"{prefix}/pg1-2": 0.25,
        f"{prefix}/item": 0.25,
    }
    momentum = 0.9 if kind is SparseAdam else 0.0
    assert monitor.last_momentum_values[f"{prefix}/item-momentum"] == momentum
    assert monitor.last_momentum_values[f"{prefix}/pg1-momentum"] == 0.9


def test_learning_rate_monitor_of_a_lone_sparse_optimizer():
    optimizer = SparseAdam([HashTable(2, name="user")])
    (names,), _ = LearningRateMonitor()._find_names_from_optimizers(
        [optimizer], [], {SparseAdam: 0}
    )
    assert names == ["lr-SparseAdam/user"]


def test_a_state_of_earlier_names_is_loaded_under_those_of_now():
    module = nn.Sequential(DynamicEmbedding(4, name="a"), DynamicEmbedding(4, name="b"))
    sparse = [SparseAdam([table], lr=0.2) for table in hash_tables(module)]
    dense = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer = SparseDenseOptimizer(dense, sparse)
    state = optimizer.state_dict()
    for group in state["param_groups"][1:]:
        group |= {"name": "sparse", "lr": 0.7}
    optimizer.load_state_dict(state)
    assert [group["name"] for group in optimizer.param_groups[1:]] == ["a", "b"]
    assert [group["lr"] for group in sparse[0].param_groups] == [0.7]


def test_a_dense_optimizer_that_needs_a_closure_is_refused():
    """LBFGS moves parameters several times in a step, and rows could not follow."""
    user, tower = DynamicEmbedding(4, name="user"), torch.nn.Linear(4, 1)
    with pytest.raises(TypeError, match=r"^dense: LBFGS evaluates the loss several times"):
        SparseDenseOptimizer(torch.optim.LBFGS(tower.parameters()), SparseSGD(hash_tables(user)))
