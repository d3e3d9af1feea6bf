"""clip_grad_norm_: torch's, over dense parameters and rows of tables together."""

import math

import pytest
import torch
from torch import nn

from recis_lightning import DynamicEmbedding, EmbeddingEngine, EmbeddingOption, hash_tables
from recis_lightning.optim import (
    SparseAdam,
    SparseDenseOptimizer,
    SparseSGD,
    clip_grad_norm_,
)
from tests.lookup.test_sharded import assert_same_training, checks

PICKED = torch.randint(50, (20, 3), generator=torch.Generator().manual_seed(0))
MODES = {"a": (4, "sum"), "b": (3, "mean"), "c": (4, "sum"), "d": (4, "sum")}


class Pair:
    """A model with tables, and the same one with ``nn.Embedding``; one optimizer a table."""

    def __init__(self, lr=1.0, **settings):
        torch.manual_seed(0)
        engine = EmbeddingEngine({k: EmbeddingOption(d, mode=m) for k, (d, m) in MODES.items()})
        self.engine, self.tower = engine, nn.Linear(15, 1)
        ids = torch.arange(50)[:, None]
        engine({name: ids for name in MODES})
        self.tables = {name: engine.tables[name] for name in MODES}
        rows = {name: table.embeddings(ids[:, 0]) for name, table in self.tables.items()}
        self.weights = {name: nn.Parameter(row.clone()) for name, row in rows.items()}
        self.twin_tower = nn.Linear(15, 1)
        self.twin_tower.load_state_dict(self.tower.state_dict())
        # Tables of one lookup belong to two optimizers, one of which a dense one has joined.
        a, b, c, d = self.tables.values()
        sgd = torch.optim.SGD(self.tower.parameters(), lr=lr)
        joined = SparseDenseOptimizer(sgd, SparseSGD([a, b], lr=lr, **settings))
        self.optimizers = [joined, SparseSGD([c], lr=lr), SparseSGD([d], lr=lr)]
        parameters = [*self.twin_tower.parameters(), *self.weights.values()]
        self.twin_optimizer = torch.optim.SGD(parameters, lr=lr)
        self.parameters = parameters

    def backward(self, picked=PICKED, factor=10.0, of_twin=True):
        found = self.engine({name: picked for name in MODES})
        self._loss(found, self.tower, factor).backward()
        if of_twin:
            found = {
                name: rows[picked].mean(1) if MODES[name][1] == "mean" else rows[picked].sum(1)
                for name, rows in self.weights.items()
            }
            self._loss(found, self.twin_tower, factor).backward()

    @staticmethod
    def _loss(found, tower, factor):
        joined = torch.cat([found[name].exp() for name in MODES], 1)
        return tower(joined).pow(2).sum() * factor

    def step(self):
        for optimizer in (*self.optimizers, self.twin_optimizer):
            optimizer.step()
            optimizer.zero_grad()

    def assert_same(self):
        torch.testing.assert_close(self.tower.weight, self.twin_tower.weight)
        torch.testing.assert_close(self.tower.bias, self.twin_tower.bias)
        for name, weights in self.weights.items():
            rows = self.tables[name].embeddings(torch.arange(50))
            torch.testing.assert_close(rows, weights.detach())


@pytest.mark.parametrize("norm_type", [2.0, 1, 3.0, math.inf])
@pytest.mark.parametrize("bound", [0.5, 1e6, math.inf])
@pytest.mark.slow_except(dict(bound=0.5), dict(norm_type=2.0))
def test_norm_and_result_are_torchs(bound, norm_type):
    pair = Pair(lr=0.1 if bound < 1 else 1e-4)
    for _ in range(3):
        pair.backward()
        wanted = nn.utils.clip_grad_norm_(pair.parameters, bound, norm_type)
        norm = clip_grad_norm_(pair.optimizers, bound, norm_type)
        torch.testing.assert_close(norm, wanted, rtol=1e-6, atol=0)
        assert wanted > 0.5
        pair.step()
        pair.assert_same()


def test_accumulated_gradients_have_one_norm():
    pair = Pair(lr=0.1)
    pair.backward()
    pair.backward(PICKED[:7], factor=-3.0)
    wanted = nn.utils.clip_grad_norm_(pair.parameters, 0.5)
    torch.testing.assert_close(clip_grad_norm_(pair.optimizers, 0.5), wanted)
    pair.step()
    pair.assert_same()


@pytest.mark.parametrize("which", [[0, 1], [2]])
def test_other_optimizers_gradients_are_left_alone(which):
    pair = Pair(lr=0.1)
    pair.backward()
    named = {0: ["a", "b"], 1: ["c"], 2: ["d"]}
    clipped = [pair.weights[name] for index in which for name in named[index]]
    clipped += list(pair.twin_tower.parameters()) if 0 in which else []
    wanted = nn.utils.clip_grad_norm_(clipped, 0.5)
    norm = clip_grad_norm_([pair.optimizers[index] for index in which], 0.5)
    torch.testing.assert_close(norm, wanted)
    pair.step()
    pair.assert_same()


def test_clipping_twice_multiplies():
    pair = Pair(lr=0.1)
    pair.backward()
    for bound in (3.0, 0.25):
        wanted = nn.utils.clip_grad_norm_(pair.parameters, bound)
        torch.testing.assert_close(clip_grad_norm_(pair.optimizers, bound), wanted)
    pair.step()
    pair.assert_same()


def test_an_optimizers_own_bound_applies_to_what_is_left():
    pair = Pair(lr=0.1, clip_grad_norm=0.1)
    pair.backward()
    nn.utils.clip_grad_norm_(pair.parameters, 0.5)
    nn.utils.clip_grad_norm_([pair.weights["a"], pair.weights["b"]], 0.1)
    clip_grad_norm_(pair.optimizers, 0.5)
    pair.step()
    pair.assert_same()


def test_the_next_step_is_not_scaled():
    """Nor are gradients after a zero_grad that dropped clipped ones."""
    pair = Pair(lr=1e-4)
    pair.backward()
    clip_grad_norm_(pair.optimizers, 1e-3)
    for optimizer in (*pair.optimizers, pair.twin_optimizer):
        optimizer.zero_grad()
    pair.backward()
    pair.step()
    pair.assert_same()


def test_gradients_after_clipping_are_an_error():
    pair = Pair()
    pair.backward(of_twin=False)
    clip_grad_norm_(pair.optimizers, 0.5)
    pair.backward(of_twin=False)
    for act in (lambda: clip_grad_norm_(pair.optimizers, 0.5), pair.optimizers[1].step):
        with pytest.raises(RuntimeError, match="after theirs were clipped; clip once, after"):
            act()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite(bad):
    """As in torch: an error that changes nothing, or gradients that are no more finite."""
    pair = Pair()
    pair.backward(factor=bad)
    before = [parameter.grad.clone() for parameter in pair.tower.parameters()]
    with pytest.raises(RuntimeError, match="error_if_nonfinite=False lets such"):
        clip_grad_norm_(pair.optimizers, 0.5, error_if_nonfinite=True)
    for parameter, gradient in zip(pair.tower.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient) or gradient.isnan().any()
    assert not any(record.scales for table in pair.tables.values() for record in table.pending)
    wanted = nn.utils.clip_grad_norm_(pair.parameters, 0.5)
    norm = clip_grad_norm_(pair.optimizers, 0.5)
    assert norm.isnan() if wanted.isnan() else norm == wanted
    pair.step()
    assert pair.tables["a"].embeddings(PICKED[0]).isnan().all()
    assert pair.weights["a"][PICKED[0]].isnan().all()


def test_without_gradients():
    module = DynamicEmbedding(2)
    sparse = SparseAdam(hash_tables(module))
    assert clip_grad_norm_(sparse, 1.0) == 0
    assert clip_grad_norm_(torch.optim.SGD(nn.Linear(2, 1).parameters()), 1.0) == 0
    module(torch.empty(0, dtype=torch.int64)).sum().backward()
    assert clip_grad_norm_(sparse, 1.0, math.inf) == 0
    sparse.step()


@pytest.mark.parametrize("device", ["cpu"])
def test_tables_of_several_dtypes(device):
    module = EmbeddingEngine(
        {"x": EmbeddingOption(2, dtype=torch.bfloat16), "y": EmbeddingOption(3)}
    )
    sparse = SparseSGD(hash_tables(module), lr=1.0)
    found = module({"x": torch.tensor([1, 1, 2]), "y": torch.tensor([5, 6, 6])})
    (found["x"].sum() + 2 * found["y"].sum()).backward()
    expected = math.sqrt(2 * (2**2 + 1) + 3 * (2**2 + 4**2))
    assert clip_grad_norm_(sparse, 1.0).item() == pytest.approx(expected, rel=1e-6)


def test_each_backend(backend):
    pair = Pair(lr=0.1)
    pair.backward()
    wanted = nn.utils.clip_grad_norm_(pair.parameters, 0.5)
    torch.testing.assert_close(clip_grad_norm_(pair.optimizers, 0.5), wanted, rtol=1e-5, atol=0)
    pair.step()
    pair.assert_same()


@pytest.mark.parametrize(("world_size", "norm_type"), [(2, 2.0), (4, 2.0), (2, 3.0), (2, math.inf)])
@pytest.mark.slow_except(dict(world_size=4), dict(norm_type=math.inf))
def test_ranks_have_one_norm(ranks, world_size, norm_type):
    plan = {"optimizer": "SparseSGD", "steps": 4, "accumulate": 2, "clip": (0.05, norm_type)}
    ours = ranks.run(world_size, checks.train, **plan)
    alone = ranks.run(1, checks.train, **plan)
    assert min(alone[0]["norms"]) > 0.05
    for answer in ours:
        assert answer["norms"] == pytest.approx(alone[0]["norms"], rel=1e-4)
    assert_same_training(ours, alone)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1.0,), ValueError, "max_norm: expected a number >= 0"),
        (("1",), TypeError, "max_norm: expected a number >= 0"),
        ((1.0, 0), ValueError, "norm_type: expected a number > 0 or inf, got 0"),
        ((1.0, math.nan), ValueError, "norm_type: expected"),
        ((1.0, "2"), TypeError, "norm_type: expected a number > 0 or inf, got '2'"),
        ((1.0, 2.0, 1), TypeError, "error_if_nonfinite: expected a bool, got 1"),
    ],
)
def test_arguments_are_checked(arguments, error, message):
    sparse = SparseSGD(hash_tables(DynamicEmbedding(2)))
    with pytest.raises(error, match=message):
        clip_grad_norm_(sparse, *arguments)


def test_what_is_no_optimizer():
    with pytest.raises(TypeError, match=r"optimizers: expected torch.optim.Optimizer, got Linear"):
        clip_grad_norm_(nn.Linear(2, 1), 1.0)
