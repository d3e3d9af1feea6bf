"""What runs a module in other ways than eagerly: ``torch.compile``, tracing, recomputation."""

import io

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from recis_lightning import (
    DynamicEmbedding,
    DynamicEmbeddingBag,
    EmbeddingEngine,
    EmbeddingOption,
    HashTable,
    hash_tables,
)
from recis_lightning.admission import MinCount
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer, SparseSGD
from tests.helpers.click_data import loader
from tests.helpers.lightning_model import Model, differences, everything, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    # torch 2.13 looks at .grad while it traces a resumed function.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_lightning_module_trains_as_it_would_without(tmp_path, backend):
    """Lightning fits a compiled module to the same bits; the tables are the module's own."""
    plain, compiled = Model(), Model()
    trainer(tmp_path).fit(plain, loader())
    trainer(tmp_path).fit(torch.compile(compiled, backend=backend), loader())
    assert len(hash_tables(compiled)) == 3
    assert differences(everything(compiled), everything(plain)) == []


# torch's compiler itself, when it traces torch's optimizers.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated")
@pytest.mark.parametrize("zero", ["optimizer", "module"])
def test_a_whole_step_may_be_compiled(zero):
    """Backward pass, update and zeroing as well: to the same bits, and with nothing to warn of."""

    def train(wrap):
        torch.manual_seed(0)
        model = nn.Sequential(DynamicEmbedding(4, name="user"), nn.Linear(4, 4))
        tables = hash_tables(model)
        optimizer = SparseDenseOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            SparseAdam(tables, lr=0.1, clip_grad_norm=1.0),
        )

        def step(ids, gradient):
            {"optimizer": optimizer, "module": model}[zero].zero_grad()
            model(ids).backward(gradient)
            gradient.zero_()  # the caller's own
            optimizer.step()

        step = wrap(step)
        for _ in range(4):
            step(torch.arange(3), torch.ones(3, 4))
        assert tables[0].num_updates == 4
        return tables[0].embeddings(torch.arange(3))

    assert train(lambda step: torch.compile(step, backend="eager")).equal(train(lambda step: step))


def test_later_steps_compile_nothing():
    """Other ids, in bags of other lengths, run what the first steps compiled."""
    torch.manual_seed(0)
    tags = DynamicEmbeddingBag(4, mode="sum", name="tags")
    model = nn.Sequential(tags, nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = SparseDenseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), SparseSGD(hash_tables(model), lr=0.1)
    )
    compiled = torch.compile(model, backend="eager")
    for step in range(8):
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            ids = torch.randint(-50, 50 * step + 1, (6, 3 + step % 3))
            optimizer.zero_grad()
            compiled(ids).square().mean().backward()
            optimizer.step()
    assert tags.table.num_updates == 8


WAYS_TO_RECORD = {
    "trace": lambda module, ids: torch.jit.trace(module, (ids,), check_trace=False),
    "script": lambda module, ids: torch.jit.script(nn.Sequential(module)),
    "export": lambda module, ids: torch.export.export(nn.Sequential(module), (ids,), strict=False),
    "make_fx": lambda module, ids: make_fx(module)(ids),
    "vmap": lambda module, ids: torch.vmap(module)(ids.unsqueeze(0)),
}
MODULES = {
    "embedding": lambda: DynamicEmbedding(4, name="user"),
    "bag": lambda: DynamicEmbeddingBag(4, name="tags"),
    "engine": lambda: EngineOfOne(),
    "table": lambda: HashTable(4, name="user"),
    "joined": lambda: JoinedEngine(),
}


class EngineOfOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.engine = EmbeddingEngine({"user": EmbeddingOption(4)})

    def forward(self, ids):
        return self.engine({"user": ids})["user"]


class JoinedEngine(nn.Module):
    def __init__(self):
        super().__init__()
        self.engine = EmbeddingEngine({"user": EmbeddingOption(4, mode="sum")})

    def forward(self, ids):
        return self.engine.concat({"user": ids})


def test_a_compiled_module_may_join_its_outputs():
    """The lookup runs outside of what is compiled, once a step."""
    ids, engine = torch.tensor([[1, 2], [3, 4]]), JoinedEngine()
    compiled = torch.compile(nn.Sequential(engine, nn.Linear(4, 1)), backend="eager")
    for step in range(3):
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            compiled(ids + step).sum().backward()
        SparseSGD(hash_tables(engine), lr=0.1).step()
    assert engine.engine.tables["user"].num_updates == 3


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated")
@pytest.mark.parametrize(
    ("way", "module", "training"),
    [
        (way, module, training)
        for way in WAYS_TO_RECORD
        for module in MODULES
        for training in (True, False)
        if way != "export" or module == "table" or training  # the others: test_operator.py
    ],
)
def test_what_records_a_program_is_refused(way, module, training):
    """It would keep addresses, and read whatever is there later."""
    ids = torch.tensor([[1, 2], [3, 4]])
    module = MODULES[module]()
    rows = module(ids)
    module.train(training)
    with pytest.raises(RuntimeError, match="leave the lookup outside"):
        WAYS_TO_RECORD[way](module, ids)
    (table,) = hash_tables(module)
    assert table.ids().tolist() == [1, 2, 3, 4]
    assert module(ids).equal(rows)


@pytest.mark.parametrize("kind", MODULES)
def test_symbolic_tracing_is_refused(kind):
    with pytest.raises(RuntimeError, match=r"torch\.fx\.symbolic_trace cannot follow a lookup"):
        torch.fx.symbolic_trace(MODULES[kind]().eval())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnx_export_is_refused():
    """Over ``torch.export`` it needs onnxscript, and then does what that does."""
    module = DynamicEmbedding(4, name="user").eval()
    with pytest.raises(RuntimeError, match="leave the lookup outside"):
        torch.onnx.export(module, (torch.tensor([1]),), io.BytesIO(), dynamo=False)


def test_reading_rows_of_a_table_is_refused_too():
    table = HashTable(4)
    with pytest.raises(RuntimeError, match=r"table 'table': .*leave the lookup outside"):
        make_fx(lambda ids: table.embeddings(ids))(torch.tensor([1]))


def test_an_ensemble_may_read_a_table():
    """Vmap over dense weights, with ids that are the same for all."""
    user = DynamicEmbedding(4, name="user")
    ids = torch.tensor([1, 2])
    user(ids)
    user.eval()
    weights = torch.randn(3, 4)
    found = torch.vmap(lambda weight: user(ids) @ weight)(weights)
    torch.testing.assert_close(found, weights @ user(ids).T)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputed_lookup_changes_nothing(use_reentrant):
    """``torch.utils.checkpoint`` looks up again in the backward pass: no count, stamp or row."""
    settings = {"admission": MinCount(2), "eviction": GlobalStepFilter(5), "name": "user"}
    plain, again = DynamicEmbedding(4, **settings), DynamicEmbedding(4, **settings)
    weight = torch.ones(3, requires_grad=True)
    for ids in (torch.tensor([1, 2, 2]), torch.tensor([1, 3, 2])):

        def loss(module, ids, weight):
            return ((module(ids) * weight[:, None]).sin() * weight[:, None]).sum()

        loss(plain, ids, weight).backward()
        checkpoint(loss, again, ids, weight, use_reentrant=use_reentrant).backward()
        for module in (plain, again):
            SparseSGD(hash_tables(module), lr=0.1).step()
            module.table.update_step()
        states = [module.table.get_extra_state() for module in (plain, again)]
        assert str(states[0]) == str(states[1])
    assert again.table.ids().tolist() == [2, 1]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch itself calls it
@pytest.mark.parametrize("way", ["make_dual", "jvp", "vmap", "jacobian"])
def test_transformed_weights_are_refused(way, training):
    """Forward-mode differentiation would find a tangent of zeros."""
    ids, ones = torch.tensor([[5, 6]]), torch.ones(1, 2)
    bag = DynamicEmbeddingBag(4, mode="sum", name="tags").train(training)

    def look_up(weights):
        return bag(ids, per_sample_weights=weights)

    words = "cannot follow a lookup"
    if way == "make_dual":
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=words):
            look_up(forward_ad.make_dual(ones, ones))
    elif way == "jvp":
        with pytest.raises(RuntimeError, match=words):
            torch.func.jvp(look_up, (ones,), (ones,))
    elif way == "vmap":
        with pytest.raises(RuntimeError, match=words):
            torch.func.vmap(look_up)(torch.ones(3, 1, 2))
    else:
        with pytest.raises(RuntimeError, match=words):
            jacobian(look_up, ones, strategy="forward-mode", vectorize=True)
    assert len(bag.table) == 0
