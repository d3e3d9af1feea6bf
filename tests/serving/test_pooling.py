"""Pooling in NumPy: the exact sums of the kernels."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from recis_lightning import DynamicEmbeddingBag, EmbeddingEngine, EmbeddingOption, Jagged
from recis_lightning.serving.pooling import Bags, multiply_add, pool


def test_multiply_add_rounds_once():
    """Compared with exact fractions, over many exponents and cancellations."""
    random = np.random.default_rng(0)
    size = 3000
    one, other, added = (
        (random.standard_normal(size) * 2.0 ** random.integers(-30, 30, size)).astype(np.float32)
        for _ in range(3)
    )
    near = random.random(size) < 0.5
    added[near] = -(one * other)[near] * (1 + random.integers(-2, 3, near.sum()) * 2.0**-24)
    found = multiply_add(one, other, added)
    for a, b, c, result in zip(one, other, added, found, strict=True):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        below, above = np.nextafter(result, -np.inf), np.nextafter(result, np.inf)
        distance = abs(Fraction(float(result)) - exact)
        assert distance <= abs(Fraction(float(below)) - exact)
        assert distance <= abs(Fraction(float(above)) - exact)
        if distance * 2 == abs(Fraction(float(above)) - Fraction(float(result))):
            assert result.view(np.int32) % 2 == 0  # a tie


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean", "mean_by_count"])
@pytest.mark.parametrize("length", [None, 0, 1, 4])
def test_bags_are_those_of_the_kernels_to_the_bit(mode, weighted, dtype, length):
    """Signed zeros, infinities and NaN among rows and weights, empty bags, padding, unknown ids."""
    random = torch.Generator().manual_seed(1)
    engine = EmbeddingEngine(
        {
            "f": EmbeddingOption(
                5,
                mode="mean" if mode == "mean_by_count" else mode,
                mean_by="count" if mode == "mean_by_count" else "weights",
                dtype=dtype,
                padding_idx=2,
            )
        }
    ).eval()
    table = engine.tables["f"]
    rows = torch.randn(40, 5, generator=random) * 10.0 ** torch.randint(
        -20, 4, (40, 5), generator=random
    )
    rows[3], rows[4, 0], rows[5] = -0.0, torch.inf, torch.nan
    table.insert(torch.arange(40), rows.to(dtype))
    lengths = torch.randint(0, 9, (200,), generator=random)
    lengths[7] = 900
    if length is not None:
        lengths = torch.full((200,), length)
    ids = torch.randint(-3, 41, (int(lengths.sum()),), generator=random)
    weights = torch.randn(len(ids), generator=random) if weighted else None
    if weights is not None:
        weights[::7], weights[1::31] = 0.0, torch.inf
    bags = Jagged.from_lengths(ids, lengths, weights)
    expected = engine({"f": bags})["f"]
    is_padding = (ids == 2).numpy()
    values = torch.where((ids == 2)[:, None], 0, table.embeddings(ids)).float().numpy()
    known = ((ids >= 0) & (ids < 40)).numpy() & ~is_padding
    edges = bags.offsets.numpy()
    found = pool(
        *(values, known, is_padding, Bags(edges[:-1], np.diff(edges), length), mode),
        None if weights is None else weights.numpy(),
    )
    found = torch.from_numpy(found).to(dtype)
    same = (found == expected) & (found.signbit() == expected.signbit())
    assert bool((same | (found.isnan() & expected.isnan())).all())


def test_no_bags_pool_to_nothing():
    bag = DynamicEmbeddingBag(3).eval()
    expected = bag(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    none = np.empty(0, np.int64)
    rows, known = np.empty((0, 3), np.float32), np.empty(0, bool)
    assert pool(rows, known, None, Bags(none, none), "mean", None).shape == expected.shape
