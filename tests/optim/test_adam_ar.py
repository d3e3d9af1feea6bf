"""AdamAR against its authors' algorithm over all rows, in float64."""

import copy
import pickle

import pytest
import torch

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.ops.layout import NUM_UPDATES
from recis_lightning.optim import SparseAdam, SparseAdamAR

DIM = 4
IDS = torch.tensor([-(2**63), 2**63 - 1, 0, -1, *range(5, 11)])


class Dense:
    """Algorithm 1 of Li and Lyu over all rows; moments of rows without a gradient wait."""

    def __init__(self, weights, lr, betas, eps, alpha):
        self.w, self.lr, self.betas, self.eps, self.alpha = weights.double(), lr, betas, eps, alpha
        self.m, self.v = torch.zeros_like(self.w), torch.zeros_like(self.w)
        self.last, self.step = torch.zeros(len(weights)), 0

    def update(self, rows, g):
        self.step += 1
        interval = torch.where(self.last > 0, self.step - self.last - 1, 0.0)
        self.w -= (self.alpha * interval).clamp(max=1)[:, None].double() * self.w
        self.m[rows] += (1 - self.betas[0]) * (g - self.m[rows])
        self.v[rows] += (1 - self.betas[1]) * (g**2 - self.v[rows])
        m, v = (
            moment[rows] / (1 - beta**self.step)
            for moment, beta in zip((self.m, self.v), self.betas, strict=True)
        )
        self.w[rows] -= self.lr * m / (v.sqrt() + self.eps)
        self.last[rows] = self.step


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.4])
@pytest.mark.slow_except(dict(backend=["reference", "cpu"]), dict(alpha=0.05))
def test_a_row_catches_up_with_all_updates_that_it_missed(backend, alpha):
    """After its update it is where an algorithm that shrinks all rows in every step has it."""
    settings = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-3, "alpha": alpha}
    module = DynamicEmbedding(DIM, name="dense")
    dense = Dense(module(IDS).detach(), **settings)
    sparse = SparseAdamAR(hash_tables(module), **settings)
    chance, most = torch.Generator().manual_seed(0), torch.zeros(len(IDS))
    for _ in range(8 if backend == "triton" else 25):
        drawn = (torch.rand(3, generator=chance) ** 2 * len(IDS)).long()
        gradient = torch.randn(3, DIM, generator=chance)
        (module(IDS[drawn]) * gradient).sum().backward()
        rows, inverse = drawn.unique(return_inverse=True)
        total = torch.zeros(len(rows), DIM, dtype=torch.float64)
        most[rows] = most[rows].maximum(dense.step - dense.last[rows]) * (dense.last[rows] > 0)
        dense.update(rows, total.index_add_(0, inverse, gradient.double()))
        sparse.step()
        ours = module.table.embeddings(IDS[rows]).double()
        torch.testing.assert_close(ours, dense.w[rows], rtol=1e-6, atol=1e-6)
    assert most.max() > 2


@pytest.mark.parametrize(("alpha", "missed"), [(1e-6, 900), (1e-4, 99), (0.003, 16), (0.003, 17)])
def test_long_absences_are_a_product_too(backend, alpha, missed):
    """Updates of other rows are counted, not made; the product is taken factor by factor."""
    module = DynamicEmbedding(DIM, name="long")
    sparse = SparseAdamAR(hash_tables(module), lr=0.0, alpha=alpha)
    before = module(IDS).detach().double()
    for number in (1, missed + 2):
        module.table.storage.header.fields[NUM_UPDATES] = number - 1
        module(IDS).sum().backward()
        sparse.step()
    wanted = before
    for j in range(1, missed + 1):
        wanted = wanted * (1 - alpha * j)
    ours = module.table.embeddings(IDS).double()
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-9)


def test_absences_have_ends():
    """Rows go to zero, not beyond; a number of updates that is smaller by now shrinks nothing."""
    module = DynamicEmbedding(DIM, name="ends")
    sparse = SparseAdamAR(hash_tables(module), lr=0.0, alpha=0.01)
    rows = [module(IDS).detach()]
    for number in (2**24 - 2, 2**24 + 3, 2**24 + 8, 2**24 + 200):
        module.table.storage.header.fields[NUM_UPDATES] = number - 1
        module(IDS).sum().backward()
        sparse.step()
        rows.append(module.table.embeddings(IDS))
    new, wrapped, later, gone = rows[1:]
    assert torch.equal(new, rows[0])
    assert torch.equal(wrapped, rows[0])  # numbers began again
    torch.testing.assert_close(later, rows[0] * (0.99 * 0.98 * 0.97 * 0.96))
    assert not gone.any()


def test_rows_of_another_adam_go_on():
    """Its moments stay, and nothing counts as missed."""
    pairs = []
    module = DynamicEmbedding(DIM, name="former")
    first = SparseAdam(hash_tables(module), lr=0.1)
    module(IDS).square().sum().backward()
    first.step()
    for kind in (SparseAdam, SparseAdamAR):
        other = copy.deepcopy(module)
        pairs.append((other, kind(hash_tables(other), lr=0.1, eps=0.0)))
    for other, sparse in pairs:
        other(IDS).square().sum().backward()
        sparse.step()
    (one, _), (two, _) = pairs
    torch.testing.assert_close(two.table.embeddings(IDS), one.table.embeddings(IDS))


@pytest.mark.parametrize("alpha", [-0.1, 1, float("nan"), float("inf")])
def test_wrong_alpha(alpha):
    """The error names the argument and what it got; the table stays free."""
    module = DynamicEmbedding(DIM, name="free")
    with pytest.raises(ValueError, match="alpha: expected a "):
        SparseAdamAR(hash_tables(module), alpha=alpha)
    assert module.table.optimizer is None


def test_an_absence_travels_with_the_table():
    """A copy, a pickle and a loaded state know what a row has missed; no ids change nothing."""
    module = DynamicEmbedding(DIM, name="travel")
    sparse = SparseAdamAR(hash_tables(module), lr=0.0, alpha=0.1)
    before = module(IDS).detach()
    for ids in (IDS, IDS[:1], IDS[:0], IDS[:1]):
        module(ids).sum().backward()
        sparse.step()
    pairs = [copy.deepcopy((module, sparse)), pickle.loads(pickle.dumps((module, sparse)))]
    loaded = DynamicEmbedding(DIM, name="travel")
    pairs.append((loaded, SparseAdamAR(hash_tables(loaded), lr=0.0, alpha=0.1)))
    loaded.load_state_dict(module.state_dict())
    missed = module.table.num_updates - 1
    assert missed >= 2
    factor = torch.tensor([1 - 0.1 * j for j in range(1, missed + 1)]).prod()
    for other, its in [(module, sparse), *pairs]:
        other(IDS[1:]).sum().backward()
        its.step()
        torch.testing.assert_close(other.table.embeddings(IDS[1:]), before[1:] * factor)
