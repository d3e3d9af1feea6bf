"""Freezing of tables and dropping of their gradients, by what torch and Lightning do."""

import copy
import pickle

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from recis_lightning import (
    DynamicEmbedding,
    DynamicEmbeddingBag,
    EmbeddingEngine,
    EmbeddingOption,
    HashTable,
    hash_tables,
)
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer, SparseSGD
from recis_lightning.table.anchor import Anchor
from tests.helpers.quiet_trainer import quiet_trainer

IDS = torch.arange(5)
WAYS_TO_FREEZE = {
    "requires_grad_": lambda module: module.requires_grad_(False),
    "Lightning": BaseFinetuning.freeze,
    "trainable": lambda module: setattr(hash_tables(module)[0], "trainable", False),
}


def model():
    return nn.Sequential(DynamicEmbedding(4, name="user"), nn.Linear(4, 1))


@pytest.mark.parametrize("way", WAYS_TO_FREEZE)
def test_a_frozen_table_does_not_learn(way):
    """And learns again when it is thawed; its rows are there as before."""
    module = model()
    optimizer = SparseSGD(hash_tables(module), lr=1.0)
    table = module[0].table
    module(IDS).sum().backward()
    optimizer.step()
    before = table.embeddings(IDS)
    WAYS_TO_FREEZE[way](module[0])
    module(IDS).sum().backward()
    assert not table.pending
    optimizer.step()
    assert table.embeddings(IDS).equal(before)
    assert not table.trainable
    module[0].requires_grad_(True)
    module(IDS).sum().backward()
    optimizer.step()
    assert not table.embeddings(IDS).equal(before)


@pytest.mark.parametrize("make", [DynamicEmbedding, DynamicEmbeddingBag])
def test_trainable_is_an_argument(make):
    module = make(4, trainable=False)
    assert not module(IDS.view(1, -1)).requires_grad
    engine = EmbeddingEngine({"a": EmbeddingOption(4, trainable=False), "b": EmbeddingOption(4)})
    assert [table.trainable for table in engine.tables.values()] == [False, True]


def test_trainable_is_a_bool():
    """And whatever else leaves a table as it was."""
    table = HashTable(4)
    with pytest.raises(TypeError, match=r"^trainable: expected a bool, got 'no'"):
        table.trainable = "no"
    with pytest.raises(TypeError, match=r"^trainable: expected a bool, got 'no'"):
        DynamicEmbedding(4, trainable="no")
    assert table.trainable


def test_what_was_frozen_in_the_forward_pass_gets_no_gradient():
    """As autograd has it: of a group, only what was trained when it was looked up."""
    engine = EmbeddingEngine({"a": EmbeddingOption(4), "b": EmbeddingOption(4)})
    frozen, trained = engine.tables.values()
    frozen.requires_grad_(False)
    out = engine({"a": IDS, "b": IDS})
    frozen.requires_grad_(True)
    (out["a"] + out["b"]).sum().backward()
    assert [len(frozen.pending), len(trained.pending)] == [0, 1]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_zero_grad_of_a_module_drops_what_is_pending(set_to_none, whole):
    """A skipped batch reaches no table one step later."""
    module = model()
    optimizer = SparseDenseOptimizer(
        torch.optim.SGD(module.parameters(), lr=0.1), SparseSGD(hash_tables(module), lr=0.1)
    )
    (module(IDS) * torch.nan).sum().backward()
    (module if whole else module[0].table).zero_grad(set_to_none)
    assert not module[0].table.pending
    optimizer.zero_grad()
    module(IDS).sum().backward()
    optimizer.step()
    assert not module[0].table.embeddings(IDS).isnan().any()


def test_a_table_gets_a_gradient_only_from_passes_that_add_it_up():
    """As a parameter: not from ``torch.autograd.grad``, nor where others' are asked for."""
    bag, tower = DynamicEmbeddingBag(4, mode="sum", name="tags"), nn.Linear(4, 1)
    weights = torch.ones(1, 5, requires_grad=True)
    anchor = bag.table.anchor

    def loss():
        return tower(bag(IDS.view(1, -1), per_sample_weights=weights * 1)).sum()

    torch.autograd.grad(loss(), weights)
    torch.autograd.grad(loss(), [anchor, weights, *tower.parameters()], allow_unused=True)
    loss().backward(inputs=[weights, tower.weight])
    assert not bag.table.pending
    loss().backward(inputs=[weights, anchor])
    assert len(bag.table.pending) == 1
    bag.zero_grad()
    loss().backward()
    assert len(bag.table.pending) == 1


def test_zero_grad_of_a_dense_optimizer_leaves_tables_their_gradients():
    """Of two optimizers, each steps and zeroes its own."""
    module = model()
    dense = torch.optim.SGD(module.parameters(), lr=0.1)
    sparse = SparseSGD(hash_tables(module), lr=0.1)
    module(IDS).sum().backward()
    dense.step()
    dense.zero_grad()
    assert module[0].table.pending
    sparse.zero_grad()
    assert not module[0].table.pending


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clipping_and_norms_pass_tables_by(norm_type):
    """Gradients of parameters alone count, in any norm."""
    module = model()
    module(IDS).sum().backward()
    grads = [module[1].weight.grad, module[1].bias.grad]
    expected = torch.nn.utils.get_total_norm(grads, norm_type)
    found = nn.utils.clip_grad_norm_(module.parameters(), 1.0, norm_type)
    assert found.equal(expected)
    nn.utils.clip_grad_value_(module.parameters(), 1.0)
    assert module[0].table.pending


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("named", [True, False])
def test_dense_optimizers_hold_no_anchors(kind, named):
    """So that files of their state are those of a model whose tables had none."""
    module = model()
    optimizer = kind(module.named_parameters() if named else module.parameters(), lr=0.1)
    assert [tuple(p.shape) for p in optimizer.param_groups[0]["params"]] == [(1, 4), (1,)]
    if named:
        assert optimizer.param_groups[0]["param_names"] == ["1.weight", "1.bias"]


@pytest.mark.parametrize(
    "kind", [torch.optim.AdamW, torch.optim.SparseAdam, torch.optim.SGD, torch.optim.LBFGS]
)
def test_dense_optimizers_refuse_tables_alone(kind):
    """Whatever the form; else a table would seem to have an optimizer."""
    module = nn.ModuleList([DynamicEmbedding(4), DynamicEmbedding(4)])
    for params in (
        module.parameters(),
        module.named_parameters(),
        [{"params": part.parameters()} for part in module],
        [{"params": module[0].table.anchor}],
    ):
        with pytest.raises(ValueError, match=rf"^params: .* {kind.__name__} .*SparseAdamW\("):
            kind(params)


@pytest.mark.parametrize("named", [True, False])
def test_groups_of_a_dense_optimizer_may_have_tables_alone(named):
    """Beside others: they are groups of nothing, as those of modules without parameters."""
    module = model()
    read = nn.Module.named_parameters if named else nn.Module.parameters
    groups = [{"params": read(part)} for part in module]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    optimizer.add_param_group({"params": read(DynamicEmbedding(4))})
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 2, 0]
    assert optimizer.param_groups[0] is groups[0]
    if named:
        assert [group["param_names"] for group in optimizer.param_groups] == [
            [],
            ["weight", "bias"],
            [],
        ]


def test_an_optimizer_that_adds_groups_itself_sees_no_anchors():
    """It may count on the shapes of what it is given."""

    class Rows(torch.optim.SGD):
        def add_param_group(self, param_group):
            self.param_groups.append({**self.defaults, "params": list(param_group["params"])})
            assert all(p.numel() for p in self.param_groups[-1]["params"])

    assert len(Rows(model().parameters(), lr=0.1).param_groups[0]["params"]) == 2


def test_optimizers_say_themselves_what_is_wrong_with_parameters():
    """With tables among them as without."""
    anchor = DynamicEmbedding(4).table.anchor
    for params, error in (
        (anchor, TypeError),
        ([], ValueError),
        ([{"params": {anchor}}], TypeError),
        ([{"lr": 1.0}], KeyError),
        ([anchor, "weight"], TypeError),
    ):
        with pytest.raises(error):
            torch.optim.SGD(params, lr=0.1)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_compiled_zero_grad_drops_what_is_pending(set_to_none):
    """And torch's compiler has nothing to warn of."""
    module = model()
    module(IDS).sum().backward()
    torch._dynamo.reset()
    torch.compile(lambda: module.zero_grad(set_to_none), backend="eager")()
    assert not module[0].table.pending


def test_anchors_are_not_in_a_state():
    """Keys are what they were, and both ways load strictly."""
    module = model()
    assert list(module.state_dict()) == ["0.table._extra_state", "1.weight", "1.bias"]
    assert module.load_state_dict(module.state_dict()).missing_keys == []
    assert sum(p.numel() for p in module.parameters()) == 5
    assert isinstance(dict(module.named_parameters())["0.table.anchor"], Anchor)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies_have_anchors_of_their_own(copied):
    module = model()
    optimizer = SparseSGD(hash_tables(module), lr=0.1)
    module[0].requires_grad_(False)
    twin, its_optimizer = copied((module, optimizer))
    table = twin[0].table
    assert not table.trainable
    assert its_optimizer.param_groups[0]["params"] == [table.anchor]
    twin.requires_grad_(True)
    assert not module[0].table.trainable
    twin(IDS).sum().backward()
    twin.zero_grad()
    assert not table.pending


def test_toggling_an_optimizer_freezes_the_others(tmp_path):
    """Lightning's manual optimization: while the dense part is toggled, tables do not learn."""

    class Toggling(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net = model()

        def training_step(self, batch, batch_idx):
            table = self.net[0].table
            for optimizer, learns in zip(self.optimizers(), (False, True), strict=True):
                self.toggle_optimizer(optimizer)
                self.manual_backward(self.net(batch).sum())
                assert bool(table.pending) == learns
                assert (self.net[1].weight.grad is None) == learns
                optimizer.step()
                self.net.zero_grad()
                self.untoggle_optimizer(optimizer)
            assert table.trainable

        def configure_optimizers(self):
            tables = hash_tables(self)
            return [torch.optim.SGD(self.parameters(), lr=0.1), SparseSGD(tables, lr=0.1)]

    quiet_trainer(tmp_path).fit(Toggling(), torch.utils.data.DataLoader(IDS, batch_size=3))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_backbone_finetuning(tmp_path):
    """A dense backbone is frozen, then added to the joined optimizer as a group; and resumed."""

    class Finetuned(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.user, self.backbone = DynamicEmbedding(4, name="user"), nn.Linear(4, 4)
            self.head = nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return self.head(self.backbone(self.user(batch))).sum()

        def configure_optimizers(self):
            learning = [p for p in self.parameters() if p.requires_grad]
            return SparseDenseOptimizer(
                torch.optim.SGD(learning, lr=0.1), SparseAdam(hash_tables(self), lr=0.1)
            )

    batches = torch.utils.data.DataLoader(IDS, batch_size=3)
    module = Finetuned()
    before = module.backbone.weight.clone()
    run = quiet_trainer(tmp_path, BackboneFinetuning(1, verbose=False))
    run.fit(module, batches)
    assert torch.equal(module.backbone.weight, before)
    run = quiet_trainer(tmp_path, BackboneFinetuning(1, verbose=False), max_epochs=2)
    run.fit(module, batches)
    assert not torch.equal(module.backbone.weight, before)
    assert len(run.optimizers[0].dense.param_groups) == 2
    run.save_checkpoint(tmp_path / "end.ckpt")
    resumed = quiet_trainer(tmp_path, BackboneFinetuning(1, verbose=False), max_epochs=3)
    resumed.fit(module, batches, ckpt_path=tmp_path / "end.ckpt")
    assert len(resumed.optimizers[0].dense.param_groups) == 2


@pytest.fixture
def group(tmp_path):
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
    Anchor.any_reduced = False


@pytest.mark.usefixtures("group")
def test_ddp_accepts_a_model_of_tables_alone():
    """And waits for each of its tables, as for any parameter."""
    engine = EmbeddingEngine({"a": EmbeddingOption(4), "b": EmbeddingOption(4)})
    optimizer = SparseSGD(hash_tables(engine), lr=0.1)
    wrapped = DistributedDataParallel(engine)
    for _ in range(3):
        sum(part.sum() for part in wrapped({"a": IDS, "b": IDS}).values()).backward()
        optimizer.step()
    assert [table.num_updates for table in engine.tables.values()] == [3, 3]


@pytest.mark.usefixtures("group")
def test_ddp_waits_for_no_table_of_a_model_with_dense_parameters():
    """A loss may leave tables out, as before they had anchors."""
    module = nn.ModuleList([model(), DynamicEmbedding(4, name="other")])
    module.forward = lambda ids: module[0](ids)
    wrapped = DistributedDataParallel(module)
    for _ in range(3):
        wrapped(IDS).sum().backward()
        hash_tables(module)[0].pending.clear()
