"""Gradients that travel from the backward pass on: updates are those without it, to the bit."""

import pytest

from recis_lightning.admission import MinCount
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.lookup import overlap_backward
from tests.helpers import rank_lookahead as checks

COUNTED = {"admission": MinCount(2), "eviction": GlobalStepFilter(filter_step=2)}


@pytest.mark.slow_except(dict(num_ranks=2))
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize(
    ("uses", "settings"),
    [(7, COUNTED), (2, {"accumulate": 4}), (7, {"together": True})],
    ids=["admission and eviction", "accumulated", "together"],
)
def test_training_is_the_same_to_the_bit(ranks, num_ranks, uses, settings):
    """All steps but the first use what came early; where gradients add up, they are all of it."""
    ranks.run(num_ranks, checks.same_with_early_gradients, uses, **settings)


@pytest.mark.slow_except(dict(num_ranks=2))
@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(2, 1), (4, 2)])
def test_nodes(ranks, num_ranks, ranks_per_node):
    """Where ids and gradients take their way over a node."""
    ranks.run(num_ranks, checks.same_with_early_gradients, 7, ranks_per_node=ranks_per_node)


def test_owners_that_pool(ranks):
    """Sums of parts of bags go their way back."""
    ranks.run(2, checks.same_with_early_gradients, 7, pool_at_owner=True)


@pytest.mark.parametrize(
    "name",
    [
        *("another_output", "another_order", "after_a_step", "accumulated", "dropped", "joined"),
        *("clipped", "adam_of_zeros", "all_differing"),
    ],
)
def test_ranks_may_differ_as_without(ranks, name):
    """What ranks use, the order of passes, gradients that are dropped; and errors."""
    ranks.run(2, checks.early, name, timeout_s=150)


def test_messages_that_ranks_do_not_share_are_not_used(ranks):
    """Rank 0 begins one more than rank 1, and both begin the last alike."""
    ranks.run(2, checks.passes_in_another_order)


def test_a_word_is_refused():
    """Nothing is set then."""
    with pytest.raises(TypeError, match="enabled: expected a bool, got 'yes'"):
        overlap_backward("yes")
    assert overlap_backward(False) is False
