"""CowClip against its rule in float64, and arguments that are none."""

import copy
import pickle

import pytest
import torch

from recis_lightning import DynamicEmbedding, DynamicEmbeddingBag, HashTable, hash_tables
from recis_lightning.optim import SparseAdagrad, SparseFTRL, SparseSGD

DIM = 4
IDS = torch.tensor([-(2**63), 2**63 - 1, 0, -1, *range(5, 11)])


def cow_clipped(w, g, num_ids, ratio, least):
    """Algorithm 1 of Zheng et al., for one id's row, float64."""
    bound = num_ids * max(ratio * w.norm().item(), least)
    return g * min(1.0, bound / g.norm().item()) if g.any() else g


@pytest.mark.parametrize("bounds", [(0.1, 1e-5), (1.0, 0.4), (0.0, 0.3), (1e6, 1.0)])
@pytest.mark.slow_except(dict(backend=["reference", "cpu"]), dict(bounds=(1.0, 0.4)))
def test_each_rows_gradient_is_clipped_by_its_norm_and_count(backend, bounds):
    """Ids come once, often and not at all, in two micro-batches, and as bags of means."""
    module, bags = DynamicEmbedding(DIM, name="rows"), DynamicEmbeddingBag(DIM, name="bags")
    sparse = SparseSGD([*hash_tables(module), *hash_tables(bags)], lr=0.5, cow_clip=bounds)
    chance = torch.Generator().manual_seed(0)
    weights = [module(IDS).detach().double(), bags(IDS[:, None]).detach().double()]
    for _ in range(3):
        totals = [torch.zeros(len(IDS), DIM, dtype=torch.float64) for _ in weights]
        counts = torch.zeros(2, len(IDS))
        for _ in range(2):
            picked = (torch.rand(12, generator=chance) ** 3 * len(IDS)).long()
            gradient = torch.randn(12, DIM, generator=chance) / 4
            of_bags = torch.randn(4, DIM, generator=chance)
            loss = (module(IDS[picked]) * gradient).sum()
            (loss + (bags(IDS[picked].view(4, 3)) * of_bags).sum()).backward()
            totals[0].index_add_(0, picked, gradient.double())
            totals[1].index_add_(0, picked, of_bags.double().repeat_interleave(3, 0) / 3)
            counts += picked.bincount(minlength=len(IDS))
        sparse.step()
        for table, total, count, w in zip(sparse.tables, totals, counts, weights, strict=True):
            for row in range(len(IDS)):
                w[row] -= 0.5 * cow_clipped(w[row], total[row], count[row].item(), *bounds)
            ours = table.embeddings(IDS).double()
            torch.testing.assert_close(ours, w, rtol=1e-6, atol=1e-6)


def test_a_row_of_many_ids_is_clipped_by_all_of_them(backend):
    """Their number counts however the kernel splits them."""
    module = DynamicEmbedding(2, name="hot")
    sparse = SparseSGD(hash_tables(module), lr=1.0, cow_clip=(0.0, 0.01))
    ids = torch.tensor([3] * 700 + [5] * 40 + [9])
    before = module(torch.tensor([3, 5, 9])).detach()
    (module(ids) * torch.tensor([3.0, 4.0])).sum().backward()
    sparse.step()
    moved = (before - module.table.embeddings(torch.tensor([3, 5, 9]))).norm(dim=1)
    torch.testing.assert_close(moved, torch.tensor([7.0, 0.4, 0.01]), rtol=1e-5, atol=1e-6)


def test_it_comes_after_the_norms_clip_and_before_the_elements():
    """A gradient (3, 4) is scaled to norm 1, clipped to norm 0.5, then to 0.35 an element."""
    module = DynamicEmbedding(2, name="order")
    sparse = SparseSGD(hash_tables(module), lr=1.0, clip_grad_norm=1.0, cow_clip=(0.0, 0.5))
    sparse.clip_grad_value = 0.35
    before = module(IDS[:1]).detach()
    (module(IDS[:1]) * torch.tensor([3.0, 4.0])).sum().backward()
    # The lookup before has no gradient, and counts for nothing.
    sparse.step()
    moved = before - module.table.embeddings(IDS[:1])
    torch.testing.assert_close(moved, torch.tensor([[0.3, 0.35]]), rtol=1e-5, atol=1e-6)


def test_decay_is_not_clipped():
    """A coupled weight decay is added to what the clip left."""
    module = DynamicEmbedding(2, name="decay")
    settings = {"lr": 1.0, "momentum": 0.5, "weight_decay": 0.1, "cow_clip": (0.0, 0.5)}
    sparse = SparseSGD(hash_tables(module), **settings)
    before = module(IDS[:1]).detach()
    (module(IDS[:1]) * torch.tensor([3.0, 4.0])).sum().backward()
    sparse.step()
    moved = before - module.table.embeddings(IDS[:1])
    torch.testing.assert_close(moved, torch.tensor([[0.3, 0.4]]) + 0.1 * before)


def test_it_travels_and_can_be_set():
    """Copies and pickles keep the bounds; None takes them away."""
    module = DynamicEmbedding(2, name="travel")
    sparse = SparseAdagrad(hash_tables(module), cow_clip=[1, 1e-5])
    assert sparse.cow_clip == (1.0, 1e-5)
    for _, other in (copy.deepcopy((module, sparse)), pickle.loads(pickle.dumps((module, sparse)))):
        assert other.cow_clip == (1.0, 1e-5)
    sparse.cow_clip = None
    assert sparse.cow_clip is None
    with pytest.raises(ValueError, match=r"cow_clip\[1\]: expected a number > 0, got 0"):
        sparse.cow_clip = (1.0, 0)
    assert sparse.cow_clip is None


@pytest.mark.parametrize(
    ("bounds", "error", "words"),
    [
        (1.0, TypeError, r"cow_clip: expected two numbers \(r, zeta\) or None, got 1.0"),
        ("12", TypeError, "cow_clip: expected two numbers"),
        ((1.0,), TypeError, "cow_clip: expected two numbers"),
        ((-1, 1.0), ValueError, r"cow_clip\[0\]: expected a number >= 0.0, got -1"),
        ((1.0, float("nan")), ValueError, r"cow_clip\[1\]: expected a number > 0, got nan"),
        ((1.0, float("inf")), ValueError, r"cow_clip\[1\]: expected a number > 0, got inf"),
        ((1.0, "a"), TypeError, r"cow_clip\[1\]: expected a number > 0, got 'a'"),
    ],
)
def test_wrong_bounds(bounds, error, words):
    """The error names the argument and what it got; the table stays free."""
    table = HashTable(2, name="free")
    with pytest.raises(error, match=words):
        SparseFTRL([table], cow_clip=bounds)
    assert table.optimizer is None
