"""Sparse optimizers: step by step what torch's do, over many tables, with clipping."""

import gc
import math

import pytest
import torch
from torch import nn

from recis_lightning import DynamicEmbedding, EmbeddingEngine, EmbeddingOption, hash_tables
from recis_lightning.optim import (
    SparseAdagrad,
    SparseAdam,
    SparseAdamW,
    SparseDenseOptimizer,
    SparseRowwiseAdagrad,
    SparseSGD,
)
from tests.helpers.sample_tables import EXTREMES

IDS = torch.cat([EXTREMES, torch.arange(100, 141)])  # 50 ids, the first nine the hard ones
ALL = [SparseSGD, SparseAdagrad, SparseRowwiseAdagrad, SparseAdam, SparseAdamW]


def parameters(*tensors):
    return [nn.Parameter(tensor.clone()) for tensor in tensors]


def twin(dim, name):
    """Return a table's module and ``nn.Embedding`` that starts from the same rows."""
    weights = DynamicEmbedding(dim, name=name)(IDS).detach()
    return DynamicEmbedding(dim, name=name), nn.Embedding.from_pretrained(
        weights.clone(), freeze=False, sparse=True
    )


PAIRS = {
    "sgd": (lambda t: SparseSGD(t, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "adagrad": (
        lambda t: SparseAdagrad(t, lr=0.1, lr_decay=0.3, initial_accumulator_value=0.2, eps=1e-3),
        lambda p: torch.optim.Adagrad(
            p, lr=0.1, lr_decay=0.3, initial_accumulator_value=0.2, eps=1e-3
        ),
    ),
    "adagrad, as it comes": (SparseAdagrad, torch.optim.Adagrad),
    "adam": (
        lambda t: SparseAdam(t, lr=0.05, betas=(0.7, 0.95), eps=1e-4),
        lambda p: torch.optim.SparseAdam(p, lr=0.05, betas=(0.7, 0.95), eps=1e-4),
    ),
    "adam, as it comes": (SparseAdam, torch.optim.SparseAdam),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch's Adagrad
@pytest.mark.parametrize("dim", [1, 3, 8, 16])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.slow_except(dict(dim=[3, 16]))
def test_parity_with_torch(pair, dim):
    """Ids arrive late, come twice in a batch, stay away: every step ends as torch's does."""
    ours, theirs = PAIRS[pair]
    module, reference = twin(dim, "parity")
    sparse, dense = ours(hash_tables(module)), theirs(list(reference.parameters()))
    generator = torch.Generator().manual_seed(dim)
    for step in range(12):
        arrived = min(5 + 4 * step, 50)
        picked = torch.randint(arrived, (30,), generator=generator)
        target = torch.randn(30, dim, generator=generator)
        ((module(IDS[picked]) - target) ** 2).sum().backward()
        ((reference(picked) - target) ** 2).sum().backward()
        for optimizer in (sparse, dense):
            optimizer.step()
            optimizer.zero_grad()
        known = module.table.ids()
        places = (known[:, None] == IDS[None]).int().argmax(1)
        torch.testing.assert_close(
            module.table.embeddings(known), reference.weight.detach()[places], rtol=1e-5, atol=1e-5
        )
    assert len(module.table) > 40


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs_where_every_row_has_a_gradient(decay):
    """Weights decay before the update, and eps follows the bias correction."""
    module, reference = twin(4, "adamw")
    module(IDS)
    settings = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": decay}
    sparse = SparseAdamW(hash_tables(module), **settings)
    (weight,) = parameters(reference.weight.detach())
    dense = torch.optim.AdamW([weight], **settings)
    for step in range(8):
        target = torch.randn(50, 4, generator=torch.Generator().manual_seed(step))
        ((module(IDS) - target) ** 2).sum().backward()
        dense.zero_grad()
        ((weight - target) ** 2).sum().backward()
        sparse.step()
        dense.step()
        torch.testing.assert_close(module.table.embeddings(IDS), weight.detach())


def test_adamw_leaves_rows_without_a_gradient_alone():
    """Decay is for the rows of the step."""
    module = DynamicEmbedding(4, name="lazy")
    before = module(IDS).detach()
    sparse = SparseAdamW(hash_tables(module), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        module(IDS[:10]).sum().backward()
        sparse.step()
    after = module.table.embeddings(IDS)
    assert torch.equal(after[10:], before[10:])
    assert not torch.isclose(after[:10], before[:10]).any()


def test_rowwise_adagrad_adds_up_mean_squares():
    """One sum a row, of the mean square of its gradient."""
    module = DynamicEmbedding(2, name="rowwise")
    weights = module(IDS[:1]).detach().double()
    sparse = SparseRowwiseAdagrad(hash_tables(module), lr=0.1, eps=1e-3)
    total = 0.0
    for step in range(1, 5):
        gradient = torch.tensor([[3.0, 4.0 * step]])
        (module(IDS[:1]) * gradient).sum().backward()
        sparse.step()
        total += float((gradient**2).mean())
        weights -= 0.1 * gradient / (math.sqrt(total) + 1e-3)
        torch.testing.assert_close(module.table.embeddings(IDS[:1]).double(), weights)
    assert module.table.get_extra_state()["slots"]["sum"].shape == (1, 1)


@pytest.mark.parametrize("optimizer", ALL)
def test_bfloat16_weights_follow_float32_ones(optimizer):
    """State is float32; weights are rounded after the update."""
    tables = [
        DynamicEmbedding(3, name="b", dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    ]
    for module in tables:
        sparse = optimizer(hash_tables(module), lr=0.25)
        out = module(IDS)
        (out.float() * torch.arange(150.0).view(50, 3)).sum().backward()
        sparse.step()
        assert out.dtype is module.table.dtype
    wide, narrow = (module.table.embeddings(IDS).float() for module in tables)
    torch.testing.assert_close(narrow, wide, rtol=1e-2, atol=1e-3)


def test_many_tables_of_several_layouts_in_one_optimizer():
    """Dims and dtypes mixed, groups with their own rates: each as if it were alone."""
    options = {
        "a": EmbeddingOption(4),
        "b": EmbeddingOption(8, mode="sum"),
        "c": EmbeddingOption(4, dtype="bfloat16"),
        "d": EmbeddingOption(4, mode="mean"),
    }
    rates = {"a": 0.1, "b": 0.2, "c": 0.1, "d": 0.4}

    def train(engine, optimizers):
        for step in range(4):
            ids = IDS[step : step + 20].view(10, 2)
            out = engine({name: ids for name in engine.options})
            sum(value.float().pow(2).sum() for value in out.values()).backward()
            for optimizer in optimizers:
                optimizer.step()
        return {name: table.embeddings(IDS) for name, table in engine.tables.items()}

    engine = EmbeddingEngine(options)
    groups = [{"params": [engine.tables[n]], "lr": rate} for n, rate in rates.items()]
    together = train(engine, [SparseAdam(groups, lr=9.0)])
    engine = EmbeddingEngine(options)
    split = [SparseAdam([engine.tables["c"], engine.tables["a"]], lr=0.1)]
    split += [SparseAdam([engine.tables[n]], lr=rates[n]) for n in "db"]
    apart = train(engine, split)
    for name, option in options.items():
        alone = EmbeddingEngine({name: option})
        single = train(alone, [SparseAdam(hash_tables(alone), lr=rates[name])])
        assert torch.equal(together[name], single[name])
        assert torch.equal(apart[name], single[name])


@pytest.mark.parametrize("optimizer", ALL)
def test_micro_batches_add_up(optimizer):
    """Two backward passes and one step are one pass over both."""

    def rows(parts):
        module = DynamicEmbedding(4, name="accumulate")
        sparse = optimizer(hash_tables(module), lr=0.1)
        for _ in range(2):
            for part in IDS.repeat(2).split(100 // parts):
                (module(part) * torch.arange(1.0, 5.0)).sum().backward()
            sparse.step()
        assert module.table.num_updates == 2
        return module.table.embeddings(IDS)

    torch.testing.assert_close(rows(4), rows(1))


def test_step_without_gradients_changes_nothing():
    """Neither rows nor the count that Adam's bias correction uses."""
    module = DynamicEmbedding(4, name="idle")
    sparse = SparseAdam(hash_tables(module))
    module(IDS)
    sparse.step()
    module(IDS[:0]).sum().backward()
    sparse.step()
    assert module.table.num_updates == 0


def test_zero_grad_forgets_for_its_own_tables_only():
    """A record of one lookup may serve tables of two optimizers."""
    engine = EmbeddingEngine({"a": EmbeddingOption(2), "b": EmbeddingOption(2)})
    first, second = (SparseSGD([engine.tables[name]], lr=1.0) for name in "ab")
    before = {name: out.detach() for name, out in engine({"a": IDS, "b": IDS}).items()}
    out = engine({"a": IDS, "b": IDS})
    (out["a"] + out["b"]).sum().backward(retain_graph=True)
    first.zero_grad()
    first.step()
    second.step()
    assert torch.equal(engine.tables["a"].embeddings(IDS), before["a"])
    assert torch.equal(engine.tables["b"].embeddings(IDS), before["b"] - 1)
    (out["a"] + out["b"]).sum().backward()  # the retained graph still knows its rows
    first.step()
    assert torch.equal(engine.tables["a"].embeddings(IDS), before["a"] - 1)


def test_state_of_another_optimizer_is_not_dropped_silently(caplog):
    """As where a run resumes with another one, and Lightning loads the rows before it is made."""
    module = DynamicEmbedding(2, name="t")
    SparseAdam([module.table])
    assert not caplog.records  # there is nothing to lose
    module.table.insert(IDS, torch.ones(len(IDS), 2))
    SparseAdamW([module.table])
    assert not caplog.records
    SparseAdagrad([module.table])
    (line,) = (record.getMessage() for record in caplog.records)
    assert "Table 't': the state of its rows is another optimizer's; exp_avg, exp_avg_sq" in line
    assert "sum starts anew" in line


def test_a_graph_is_freed_output_by_output():
    """Losses of different outputs have a pass each; one output has two only of a kept graph."""
    engine = EmbeddingEngine({"a": EmbeddingOption(2), "b": EmbeddingOption(2)})
    sparse = SparseSGD(hash_tables(engine), lr=1.0)
    out = engine({"a": IDS, "b": IDS})
    out["a"].sum().backward()
    out["b"].sum().backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        out["b"].sum().backward()
    sparse.zero_grad()
    joined = engine.concat({"a": IDS, "b": IDS})
    joined.sum().backward(retain_graph=True)
    joined.sum().backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        joined.sum().backward()


def test_closures_are_called_with_gradients():
    """As torch's optimizers call them."""
    module = DynamicEmbedding(2, name="closure")
    sparse = SparseSGD(hash_tables(module), lr=1.0)

    def closure():
        loss = module(IDS).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = sparse.step(closure)
    assert loss.item() == pytest.approx(module.table.embeddings(IDS).sum().item() + 100, abs=1e-3)


# ---- clipping


@pytest.mark.parametrize("bound", [0.5, 1e6])
def test_clip_grad_norm_is_torchs_on_the_same_dense_gradient(bound):
    """One norm over all tables, of gradients added up by row."""
    options = {"a": EmbeddingOption(4, mode="sum"), "b": EmbeddingOption(3, mode="mean")}
    engine = EmbeddingEngine(options)
    sparse = SparseSGD(hash_tables(engine), lr=1.0, clip_grad_norm=bound)
    picked = torch.randint(50, (20, 3), generator=torch.Generator().manual_seed(0))
    engine({"a": IDS[picked], "b": IDS[picked]})
    weights = parameters(*(engine.tables[name].embeddings(IDS) for name in "ab"))
    for out in (
        engine({"a": IDS[picked], "b": IDS[picked]}),
        {"a": weights[0][picked].sum(1), "b": weights[1][picked].mean(1)},
    ):
        (out["a"].pow(2).sum() * 100 + out["b"].exp().sum()).backward()
    nn.utils.clip_grad_norm_(weights, bound)
    torch.optim.SGD(weights, lr=1.0).step()
    sparse.step()
    seen = picked.unique()
    for name, weight in zip("ab", weights, strict=True):
        rows = engine.tables[name].embeddings(IDS[seen])
        torch.testing.assert_close(rows, weight.detach()[seen])


def test_clip_grad_value_is_torchs_on_the_same_dense_gradient():
    """Every element of a row's added gradient is clamped."""
    module = DynamicEmbedding(4, name="value")
    sparse = SparseSGD(hash_tables(module), lr=1.0, clip_grad_value=1.5)
    picked = torch.randint(50, (200,), generator=torch.Generator().manual_seed(0))
    module(IDS)
    (weight,) = parameters(module.table.embeddings(IDS))
    factors = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    (module(IDS[picked]) * factors).sum().backward()
    (weight[picked] * factors).sum().backward()
    assert weight.grad.abs().max() > 1.5
    nn.utils.clip_grad_value_([weight], 1.5)
    torch.optim.SGD([weight], lr=1.0).step()
    sparse.step()
    torch.testing.assert_close(module.table.embeddings(IDS), weight.detach())


# ---- what is refused


def test_a_gradient_that_nobody_uses_is_an_error():
    """Tables that never train are the worst failure: the second lookup names the missing line."""
    module = DynamicEmbedding(2, name="lonely")
    module(IDS).sum().backward()
    words = r"'lonely' has a gradient and no optimizer.*SparseAdamW\(hash_tables\(self\)"
    with pytest.raises(RuntimeError, match=words):
        module(IDS)
    module.eval()(IDS)
    SparseSGD(hash_tables(module))
    gc.collect()
    with pytest.raises(RuntimeError, match=words):  # that optimizer was not kept
        module.train()(IDS)
    kept = SparseSGD(hash_tables(module), lr=1.0)
    module(IDS)
    kept.step()


TABLE = DynamicEmbedding(2, name="t").table


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: SparseSGD([]), ValueError, "tables: expected at least one HashTable, got none"),
        (lambda: SparseSGD(TABLE), TypeError, "tables: expected an iterable of HashTable, got"),
        (lambda: SparseSGD([nn.Linear(1, 1)]), TypeError, "expected HashTable, got Linear"),
        (lambda: SparseSGD(nn.Linear(1, 1).parameters()), TypeError, "got Parameter; pass hash_t"),
        (lambda: SparseSGD([TABLE, TABLE]), ValueError, "table 't' is there twice"),
        (lambda: SparseSGD([TABLE], lr=-1), ValueError, "lr: expected a number >= 0.0, got -1"),
        (lambda: SparseAdam([TABLE], betas=(1.0, 0.9)), ValueError, r"betas\[0\]: expected .*1.0"),
        (lambda: SparseAdam([TABLE], eps=-1e-3), ValueError, "eps: expected .*, got -0.001"),
        (lambda: SparseAdamW([TABLE], weight_decay=-1), ValueError, "weight_decay: .*, got -1"),
        (lambda: SparseAdagrad([TABLE], lr_decay=-1), ValueError, "lr_decay: .*, got -1"),
        (
            lambda: SparseSGD([TABLE], clip_grad_norm=0),
            ValueError,
            "clip_grad_norm: .* > 0 .*got 0",
        ),
        (lambda: SparseSGD([TABLE], clip_grad_value=-1), ValueError, "clip_grad_value: .*got -1"),
        (
            lambda: SparseDenseOptimizer(SparseSGD([TABLE]), SparseSGD([TABLE])),
            TypeError,
            r"dense: expected a torch.optim.Optimizer of parameters, got SparseSGD",
        ),
        (
            lambda: SparseDenseOptimizer(torch.optim.SGD(parameters(torch.ones(1))), [TABLE]),
            TypeError,
            "sparse: expected a sparse optimizer, got HashTable",
        ),
    ],
)
def test_wrong_arguments(make, error, words):
    """An error names the argument, the value got and what was expected."""
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("before", [False, True])
def test_adamw_adds_eps_where_it_is_told(before):
    """After the bias correction as torch does, or before it as RecIS does."""
    module = DynamicEmbedding(2, name="eps")
    weight = module(IDS[:1]).detach().double()
    sparse = SparseAdamW(
        hash_tables(module), 0.1, (0.8, 0.9), 0.5, 0.1, eps_before_correction=before
    )
    m = v = torch.zeros(1, 2, dtype=torch.float64)
    for step in range(1, 5):
        g = torch.tensor([[3.0, -0.25 * step]])
        (module(IDS[:1]) * g).sum().backward()
        sparse.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        root = math.sqrt(1 - 0.9**step)
        divisor = (v.sqrt() + 0.5) / root if before else v.sqrt() / root + 0.5
        weight = weight * (1 - 0.1 * 0.1) - 0.1 * m / (1 - 0.8**step) / divisor
        ours = module.table.embeddings(IDS[:1]).double()
        torch.testing.assert_close(ours, weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("before", [False, True])
def test_a_state_without_the_switch_keeps_the_one_that_was_chosen(before):
    """States that earlier versions saved do not have it."""
    tables = hash_tables(DynamicEmbedding(2))
    sparse = SparseAdamW(tables, eps_before_correction=before)
    state = sparse.state_dict()
    del state["param_groups"][0]["eps_before_correction"]
    sparse.load_state_dict(state)
    assert sparse.param_groups[0]["eps_before_correction"] is before
    joined = SparseDenseOptimizer(torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1), sparse)
    state = joined.state_dict()
    del state["param_groups"][1]["eps_before_correction"]
    joined.load_state_dict(state)
    assert sparse.param_groups[0]["eps_before_correction"] is before


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda m: SparseAdam(m.parameters()),
            TypeError,
            r"pass hash_tables\(module\), not module",
        ),
        (lambda m: SparseAdam(nn.Linear(1, 1).parameters()), TypeError, "not module.parameters"),
        (lambda m: SparseAdam(m), TypeError, r"got DynamicEmbedding; pass hash_tables\(module\)"),
        (lambda m: SparseAdam([m]), TypeError, r"got DynamicEmbedding; pass hash_tables\(module\)"),
        (lambda m: SparseAdam({"t": m.table}), TypeError, r"got dict; pass hash_tables\(module\)"),
        (lambda m: SparseAdam([{"lr": 1}]), TypeError, "expected dicts with 'params', got"),
        (lambda m: SparseAdam([{"params": m}]), TypeError, r"pass hash_tables\(module\)"),
        (lambda m: SparseAdam([m.table], betas=0.9), TypeError, "betas: expected two numbers"),
        (lambda m: SparseAdam([m.table], lr="0.1"), TypeError, "lr: expected a number .*'0.1'"),
        (lambda m: SparseSGD([m.table], clip_grad_norm="1"), TypeError, "clip_grad_norm: expected"),
        (lambda m: SparseAdamW([m.table], eps_before_correction=1), TypeError, "expected a bool"),
    ],
)
def test_what_is_no_table_is_told_what_to_pass(make, error, words):
    module = DynamicEmbedding(2)
    with pytest.raises(error, match=words):
        make(module)
    assert module.table.optimizer is None


@pytest.mark.parametrize("name", ["clip_grad_norm", "clip_grad_value"])
@pytest.mark.parametrize("bound", [-1.0, 0.0, math.nan, "1"])
def test_a_bound_that_is_set_later_is_checked(name, bound):
    """A negative one would turn gradients around."""
    optimizer = SparseSGD(hash_tables(DynamicEmbedding(4)), lr=1.0, **{name: 2.0})
    with pytest.raises((TypeError, ValueError), match=f"{name}: expected a number > 0 or None"):
        setattr(optimizer, name, bound)
    assert getattr(optimizer, name) == 2.0
    setattr(optimizer, name, None)
    assert getattr(optimizer, name) is None


@pytest.mark.parametrize("is_recorded", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_a_step_is_not_recorded_and_leaves_the_mode_as_it_was(is_recorded, fails, monkeypatch):
    module = DynamicEmbedding(4)
    optimizer = SparseSGD([module.table], lr=0.1)
    module(IDS).sum().backward()
    modes, hyperparameters = [], optimizer.hyperparameters

    def noted(group, num_updates):
        modes.append(torch.is_grad_enabled())
        if fails:
            raise ValueError("as a schedule may")
        return hyperparameters(group, num_updates)

    monkeypatch.setattr(optimizer, "hyperparameters", noted)
    with torch.set_grad_enabled(is_recorded):
        if fails:
            with pytest.raises(ValueError, match="as a schedule may"):
                optimizer.step()
        else:
            optimizer.step()
        assert torch.is_grad_enabled() == is_recorded
    assert modes == [False]


def test_tables_that_differ_in_updates_or_groups_keep_their_own_hyperparameters():
    """They go apart and come together again, and each has the bias correction of its own count."""
    modules = [DynamicEmbedding(4, name=f"t{i}") for i in range(3)]
    alone = [DynamicEmbedding(4, name=f"t{i}") for i in range(3)]
    tables = [module.table for module in modules]
    groups = [{"params": tables[:2], "lr": 0.1}, {"params": tables[2:], "lr": 0.3}]
    optimizer = SparseAdam(groups)
    others = [
        SparseAdam([module.table], lr=lr) for module, lr in zip(alone, (0.1, 0.1, 0.3), strict=True)
    ]
    for used in ((0, 1, 2), (0, 2), (0, 1, 2), (1,), (0, 1, 2)):
        for index in used:
            for module in (modules[index], alone[index]):
                module(IDS).square().sum().backward()
        optimizer.step()
        for index in used:
            others[index].step()
    for table, module in zip(tables, alone, strict=True):
        assert torch.equal(table.embeddings(IDS), module.table.embeddings(IDS))
