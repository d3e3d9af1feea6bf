"""Single lookups of sharded tables, and ranks that do something else or go away."""

import numpy as np
import pytest
import torch

from tests.helpers import rank_lookups as checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initial_rows_do_not_depend_on_the_number_of_ranks(ranks, dtype):
    """Bit by bit, in whatever order ranks ask."""
    (alone,) = ranks.run(1, checks.initial_rows, dtype)
    for rows in ranks.run(3, checks.initial_rows, dtype):
        assert np.array_equal(rows, alone)


def test_kernels_and_reference_agree(ranks):
    """The exchange is made of ops that both have."""
    ours = ranks.run(2, checks.initial_rows, torch.float32)
    theirs = ranks.run(2, checks.initial_rows, torch.float32, "reference")
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "check",
    [
        checks.evaluation,
        checks.weight_gradients,
        checks.unused_outputs,
        checks.inserted_rows,
        checks.features_that_differ,
        checks.gradients_are_averaged,
    ],
    ids=lambda check: check.__name__,
)
def test_on_two_ranks(ranks, check):
    """The checks themselves say what holds."""
    ranks.run(2, check)


def test_ranks_that_look_up_different_things_are_told(ranks):
    """Rather than get rows of other tables."""
    for message in ranks.run(2, checks.different_lookups):
        assert "rank 0 looks up ids (table 't0', mode none) in training; rank 1 looks" in message


def test_a_state_dict_of_one_shard_is_refused(ranks):
    """Lightning would write rank 0's."""
    for message in ranks.run(2, checks.refused_copies):
        assert "saving a table on 2 ranks: each has a shard of the table" in message


@pytest.mark.parametrize("how", ["hangs", "dies"])
def test_the_others_fail_when_a_rank_goes_away(ranks, how):
    """Within the group's timeout, with an error that names it; they do not wait for ever."""
    answers = ranks.try_to_run(2, checks.dying, how, 3)
    good, answer = answers[0]
    assert good, answer
    assert answers[1][0] == (how == "hangs")
    waited, message = answer
    assert waited < 9
    doing = "rank 0 looks up ids (table 't', mode none) in training and lost rank 1, which "
    fate = "did not come within" if how == "hangs" else "has ended"
    assert message.startswith(doing + fate), message
