"""Optimizers without a sparse twin in torch: against torch over all rows, or a float64 truth."""

import copy
import pickle

import pytest
import torch

from recis_lightning import DynamicEmbedding, HashTable, hash_tables
from recis_lightning.initializers import Constant
from recis_lightning.optim import (
    SparseAdagrad,
    SparseFTRL,
    SparseLion,
    SparseRMSprop,
    SparseRowwiseAdagrad,
    SparseRowwiseAdam,
    SparseSGD,
)

DIM = 4
IDS = torch.tensor([-(2**63), 2**63 - 1, 0, -1, *range(5, 11)])
AS_TORCH = {
    "momentum": (SparseSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "nesterov": (SparseSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    "momentum, decay": (
        SparseSGD,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2},
    ),
    "sgd, decay": (SparseSGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.2}),
    "adagrad, decay": (
        SparseAdagrad,
        torch.optim.Adagrad,
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.2, "initial_accumulator_value": 0.3},
    ),
    "rmsprop": (SparseRMSprop, torch.optim.RMSprop, {"lr": 0.02, "alpha": 0.9, "eps": 1e-3}),
    "rmsprop, decay": (SparseRMSprop, torch.optim.RMSprop, {"lr": 0.02, "weight_decay": 0.2}),
}


@pytest.mark.parametrize("case", AS_TORCH)
@pytest.mark.slow_except(
    dict(backend=["reference", "cpu"]),
    dict(case=["sgd, decay", "momentum, decay", "adagrad, decay"]),
)
def test_it_is_torchs_where_every_row_has_a_gradient(backend, case):
    """Every step ends where torch's ends in float64, to 1e-6."""
    ours, theirs, settings = AS_TORCH[case]
    module = DynamicEmbedding(DIM, name="parity")
    weight = torch.nn.Parameter(module(IDS).detach().double())
    sparse, dense = ours(hash_tables(module), **settings), theirs([weight], **settings)
    for step in range(4):
        goal = torch.randn(len(IDS), DIM, generator=torch.Generator().manual_seed(step))
        (module(IDS) - goal).square().sum().backward()
        dense.zero_grad()
        (weight - goal).square().sum().backward()
        sparse.step()
        dense.step()
        rows = module.table.embeddings(IDS).double()
        torch.testing.assert_close(rows, weight.detach(), rtol=1e-6, atol=1e-6)


def ftrl(w, g, state, number, lr, l1, l2, beta):
    """Algorithm 1 of McMahan et al., element by element."""
    n, z = state.get("n", torch.zeros_like(w)), state.get("z", torch.zeros_like(w))
    sigma = ((n + g**2).sqrt() - n.sqrt()) / lr
    state["z"], state["n"] = z + g - sigma * w, n + g**2
    step = -(state["z"] - state["z"].sign() * l1) / ((beta + state["n"].sqrt()) / lr + l2)
    return torch.where(state["z"].abs() <= l1, 0.0, step)


def lion(w, g, state, number, lr, betas, weight_decay):
    """Algorithm 2 of Chen et al."""
    m = state.get("m", torch.zeros_like(w))
    state["m"] = betas[1] * m + (1 - betas[1]) * g
    return w - lr * ((betas[0] * m + (1 - betas[0]) * g).sign() + weight_decay * w)


def rowwise_adam(w, g, state, number, lr, betas, eps, weight_decay):
    """FBGEMM's PARTIAL_ROWWISE_ADAM."""
    m, v = state.get("m", torch.zeros_like(w)), state.get("v", 0.0)
    state["m"] = betas[0] * m + (1 - betas[0]) * g
    state["v"] = betas[1] * v + (1 - betas[1]) * g.square().mean()
    root = (state["v"] / (1 - betas[1] ** number)).sqrt()
    step = state["m"] / (1 - betas[0] ** number) / (root + eps)
    return w - lr * (step + weight_decay * w)


def rowwise_adagrad(w, g, state, number, lr, eps, weight_decay):
    """FBGEMM's EXACT_ROWWISE_ADAGRAD with its L2 weight decay."""
    g = g + weight_decay * w
    state["s"] = state.get("s", 0.0) + g.square().mean()
    return w - lr * g / (state["s"].sqrt() + eps)


def nesterov(w, g, state, number, lr, momentum, weight_decay, nesterov):
    """Torch's SGD, for the rows of the step alone."""
    g = g + weight_decay * w
    state["m"] = momentum * state.get("m", 0.0) + g
    return w - lr * (g + momentum * state["m"])


def rmsprop(w, g, state, number, lr, alpha, eps, weight_decay):
    """Torch's RMSprop, for the rows of the step alone."""
    g = g + weight_decay * w
    state["v"] = alpha * state.get("v", 0.0) + (1 - alpha) * g**2
    return w - lr * g / (state["v"].sqrt() + eps)


TRUTHS = {
    "ftrl": (SparseFTRL, ftrl, {"lr": 0.1, "l1": 0.5, "l2": 0.3, "beta": 0.7}),
    "lion": (SparseLion, lion, {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1}),
    "rowwise adam": (
        SparseRowwiseAdam,
        rowwise_adam,
        {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1},
    ),
    "rowwise adagrad": (
        SparseRowwiseAdagrad,
        rowwise_adagrad,
        {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.1},
    ),
    "nesterov": (
        SparseSGD,
        nesterov,
        {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1, "nesterov": True},
    ),
    "rmsprop": (
        SparseRMSprop,
        rmsprop,
        {"lr": 0.02, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1},
    ),
}


@pytest.mark.parametrize("case", TRUTHS)
def test_rows_of_the_step_follow_the_truth_and_no_others_move(backend, case):
    """Ids stay away, and come twice in two micro-batches of a step: to 1e-6 of float64."""
    optimizer, rule, settings = TRUTHS[case]
    module = DynamicEmbedding(DIM, name="truth")
    weights, states = module(IDS).detach().double(), [{} for _ in IDS]
    sparse = optimizer(hash_tables(module), **settings)
    for number in range(1, 5):
        chance = torch.Generator().manual_seed(number)
        total = torch.zeros(len(IDS), DIM)
        for _ in range(2):
            picked = torch.randint(len(IDS), (6,), generator=chance)
            gradient = torch.randn(6, DIM, generator=chance)
            (module(IDS[picked]) * gradient).sum().backward()
            total.index_add_(0, picked, gradient)
        sparse.step()
        for row in total.any(1).nonzero().flatten().tolist():
            g = total[row].double()
            weights[row] = rule(weights[row], g, states[row], number, **settings)
        ours = module.table.embeddings(IDS).double()
        torch.testing.assert_close(ours, weights, rtol=1e-6, atol=1e-6)


def test_ftrl_leaves_weights_without_evidence_at_zero():
    """Sums of gradients within ``l1`` give 0, those beyond it do not."""
    module = DynamicEmbedding(2, initializer=Constant(0.0), name="l1")
    sparse = SparseFTRL(hash_tables(module), lr=0.1, l1=1.5)
    (module(IDS[:1]) * torch.tensor([1.0, 2.0])).sum().backward()
    sparse.step()
    assert (module.table.embeddings(IDS[:1]) != 0).tolist() == [[False, True]]


SLOTS = {
    "sgd": (SparseSGD, {}, {}),
    "momentum": (SparseSGD, {"momentum": 0.9}, {"momentum_buffer": 3}),
    "rmsprop": (SparseRMSprop, {}, {"square_avg": 3}),
    "rowwise adam": (SparseRowwiseAdam, {}, {"exp_avg": 3, "exp_avg_sq": 1}),
    "ftrl": (SparseFTRL, {}, {"sum": 3, "linear": 3}),
    "lion": (SparseLion, {}, {"exp_avg": 3}),
}


@pytest.mark.parametrize("case", SLOTS)
def test_state_travels_with_the_table(case):
    """A copy, by ``deepcopy`` or pickle, or by the module's state, trains on as the original."""
    optimizer, settings, slots = SLOTS[case]
    module = DynamicEmbedding(3, name="travel")
    sparse = optimizer(hash_tables(module), **settings)
    pairs = [(module, sparse)]

    def train():
        for one, its in pairs:
            (one(IDS) * torch.arange(3.0)).sum().backward()
            its.step()

    train()
    state = module.table.get_extra_state()["slots"]
    assert {name: slot.shape[1] for name, slot in state.items()} == slots
    pairs += [copy.deepcopy((module, sparse)), pickle.loads(pickle.dumps((module, sparse)))]
    loaded = DynamicEmbedding(3, name="travel")
    pairs.append((loaded, optimizer(hash_tables(loaded), **settings)))
    loaded.load_state_dict(module.state_dict())
    train()
    wanted = module.table.embeddings(IDS)
    for other, _ in pairs[1:]:
        assert torch.equal(other.table.embeddings(IDS), wanted)


def test_groups_have_momentum_and_decay_of_their_own():
    """One pass updates all groups: each as if it were alone."""
    rows = {}
    for together in (True, False):
        modules = [DynamicEmbedding(3, name=name) for name in "abc"]
        settings = [{"momentum": 0.9, "nesterov": True}, {}, {"momentum": 0.5, "weight_decay": 0.3}]
        tables = [{"params": [m.table], **s} for m, s in zip(modules, settings, strict=True)]
        groups = [tables] if together else [[group] for group in tables]
        optimizers = [SparseSGD(group, lr=0.1) for group in groups]
        for _ in range(3):
            sum((m(IDS) ** 2).sum() for m in modules).backward()
            for optimizer in optimizers:
                optimizer.step()
        rows[together] = torch.stack([m.table.embeddings(IDS) for m in modules])
    torch.testing.assert_close(rows[True], rows[False], rtol=1e-6, atol=1e-7)


def test_a_group_without_decay_is_that_of_an_optimizer_without():
    """And a decay that is changed between steps counts from the next one."""
    modules = [DynamicEmbedding(3, name="same") for _ in range(2)]
    with_decay = SparseAdagrad([modules[0].table], weight_decay=0.5)
    without = SparseAdagrad([modules[1].table])
    with_decay.param_groups[0]["weight_decay"] = 0.0
    for _ in range(2):
        for module, optimizer in zip(modules, (with_decay, without), strict=True):
            module(IDS).sum().backward()
            optimizer.step()
    assert torch.equal(modules[0].table.embeddings(IDS), modules[1].table.embeddings(IDS))
    without.param_groups[0]["weight_decay"] = 0.5
    for module, optimizer in zip(modules, (with_decay, without), strict=True):
        module(IDS).sum().backward()
        optimizer.step()
    assert not torch.equal(modules[0].table.embeddings(IDS), modules[1].table.embeddings(IDS))


TABLE = HashTable(2, name="t")


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: SparseSGD([TABLE], momentum=-1), ValueError, "momentum: expected .*, got -1"),
        (lambda: SparseSGD([TABLE], weight_decay=-1), ValueError, "weight_decay: .*, got -1"),
        (lambda: SparseSGD([TABLE], nesterov=True), ValueError, "nesterov: expected False without"),
        (lambda: SparseSGD([TABLE], nesterov=1), TypeError, "nesterov: expected a bool, got 1"),
        (lambda: SparseAdagrad([TABLE], weight_decay=-1), ValueError, "weight_decay: .*got -1"),
        (lambda: SparseRMSprop([TABLE], alpha=1), ValueError, "alpha: expected .*, got 1"),
        (lambda: SparseRowwiseAdam([TABLE], betas=(0.9, 1)), ValueError, r"betas\[1\]: expected"),
        (lambda: SparseLion([TABLE], betas=0.9), TypeError, "betas: expected two numbers, got 0.9"),
        (lambda: SparseLion([TABLE], weight_decay="1"), TypeError, "weight_decay: expected a num"),
        (lambda: SparseFTRL([TABLE], beta=0), ValueError, "beta: expected a number > 0, got 0"),
        (lambda: SparseFTRL([TABLE], l1=-1), ValueError, "l1: expected .*, got -1"),
        (lambda: SparseFTRL([TABLE], lr=0), ValueError, "lr: expected a number > 0 for SparseFTRL"),
        (
            lambda: SparseFTRL([{"params": [TABLE], "lr": 0}]),
            ValueError,
            "lr: expected a number > 0 for SparseFTRL, got 0",
        ),
    ],
)
def test_wrong_arguments(make, error, words):
    """An error names the argument, the value got and what was expected; the table stays free."""
    with pytest.raises(error, match=words):
        make()
    assert TABLE.optimizer is None


def test_momentum_is_not_taken_up_later():
    """Rows have no room for it: the step is refused before anything changes."""
    module = DynamicEmbedding(2, name="late")
    sparse = SparseSGD(hash_tables(module))
    module(IDS).sum().backward()
    before = module.table.embeddings(IDS)
    sparse.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match=r"momentum: expected 0, got 0\.9; it was 0 when"):
        sparse.step()
    assert torch.equal(module.table.embeddings(IDS), before)
    sparse.param_groups[0]["momentum"] = 0.0
    sparse.step()
    assert not torch.equal(module.table.embeddings(IDS), before)
