"""Lookups begun ahead: rows, losses and shards are those without, to the bit."""

import pytest
import torch

from recis_lightning import DynamicEmbedding
from recis_lightning.admission import BloomCount, MinCount
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.lookup import look_ahead
from tests.helpers import rank_lookahead as checks

COUNTED = {"admission": MinCount(2), "eviction": GlobalStepFilter(filter_step=2)}


@pytest.mark.slow_except(dict(num_ranks=2))
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize(
    ("uses", "settings"),
    [(12, COUNTED), (12, {"accumulate": 3}), (6, {"together": True, **COUNTED})],
    ids=["admission and eviction", "accumulated", "together"],
)
def test_training_is_the_same_to_the_bit(ranks, num_ranks, uses, settings):
    """On several ranks whose batches differ in size; all but the first two use what came ahead."""
    ranks.run(num_ranks, checks.same_with_and_without, uses, **settings)


@pytest.mark.slow_except(dict(num_ranks=2))
@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(2, 1), (4, 2)])
def test_nodes(ranks, num_ranks, ranks_per_node):
    """Where ids and gradients take their way over a node."""
    ranks.run(num_ranks, checks.same_with_and_without, 12, ranks_per_node=ranks_per_node)


def test_owners_that_pool(ranks):
    """Such a module is looked up as without it; the others use what came."""
    ranks.run(2, checks.same_with_and_without, 6, pool_at_owner=True)


def test_a_sketch_counts_as_without(ranks):
    """BloomCount counts occurrences, which travel with the ids."""
    ranks.run(2, checks.same_with_and_without, 12, admission=BloomCount(2, num_counters=256))


@pytest.mark.parametrize("check", [checks.disturbances, checks.only_one_rank])
def test_what_does_not_fit_is_dropped(ranks, check):
    """On all ranks alike, and without harm."""
    ranks.run(2, check)


def test_one_rank_begins_nothing():
    """Nor does a module in evaluation, nor what is no lookup."""
    user = DynamicEmbedding(2)
    assert look_ahead((user, torch.tensor([1]))) == 0
    assert look_ahead() == 0
    assert len(user.table) == 0
    with pytest.raises(TypeError, match=r"lookups\[1\]: expected \(module, \*arguments\)"):
        look_ahead((user, torch.tensor([1])), 3)
    with pytest.raises(TypeError, match=r"lookups\[0\].*got Linear"):
        look_ahead([(user, torch.tensor([1])), (torch.nn.Linear(1, 1), 1)])
