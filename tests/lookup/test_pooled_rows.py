"""Rows that their owners add up: sums of the plain exchange, and fewer bytes for long bags."""

import pytest
import torch

from recis_lightning import DynamicEmbeddingBag, EmbeddingEngine, EmbeddingOption
from tests.helpers import rank_pooled


@pytest.mark.parametrize(
    "check",
    [
        rank_pooled.as_pooled_here,
        rank_pooled.exact,
        rank_pooled.bytes_sent,
        rank_pooled.refused,
    ],
    ids=lambda check: check.__name__,
)
def test_two_ranks(ranks, check):
    """The checks themselves say what holds."""
    ranks.run(2, check, timeout_s=200)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [3, 4])
def test_more_ranks(ranks, world_size):
    ranks.run(world_size, rank_pooled.as_pooled_here, timeout_s=200)
    ranks.run(world_size, rank_pooled.bytes_sent, timeout_s=200)


def test_one_process_pools_as_ever():
    ids = torch.arange(12).view(4, 3)
    found = [DynamicEmbeddingBag(3, name="t", pool_at_owner=pools)(ids) for pools in (True, False)]
    assert torch.equal(*found)
    options = {"a": EmbeddingOption(3, mode="sum", pool_at_owner=True), "b": EmbeddingOption(3)}
    out = EmbeddingEngine(options)({"a": ids, "b": ids[0]})
    assert [tuple(rows.shape) for rows in out.values()] == [(4, 3), (3, 3)]


@pytest.mark.parametrize("mode", ["none", "tile", "unique"])
def test_only_sums_and_means(mode):
    with pytest.raises(ValueError, match="pool_at_owner: only modes 'sum' and 'mean'"):
        EmbeddingOption(2, mode=mode, tile_len=2 if mode == "tile" else None, pool_at_owner=True)
    with pytest.raises(TypeError, match="pool_at_owner"):
        DynamicEmbeddingBag(2, pool_at_owner="yes")
