"""Ranks that are lost: the others say which, and during what."""

import pytest

from recis_lightning.distributed.lost_ranks import _describe, name_ranks
from tests.helpers import rank_groups as checks


@pytest.mark.parametrize(
    ("where", "doing"),
    [
        ("lookup", "looks up ids (table 'user', mode none) in training"),
        ("step", "steps SparseSGD of tables user"),
        ("gather", "calls gather()"),
    ],
)
def test_the_others_name_a_rank_that_ends(ranks, where, doing):
    """Both of two, at once, in the same words."""
    for rank, answer in enumerate(ranks.run(3, checks.lost, where)[:2]):
        seconds, message = answer
        assert seconds < 8
        assert message == f"rank {rank} {doing} and lost rank 2, which has ended"


@pytest.mark.parametrize(
    ("silent", "error", "says"),
    [
        ([1, 3], "Connection closed by peer", "steps and lost ranks 1, 3, which have ended"),
        ([1], "Timed out waiting 3000ms", "steps and lost rank 1, which did not come within"),
        (None, "Broken pipe", "steps and lost rank 0, which has ended, and with it the store"),
        ([], "Broken pipe", "steps, and its message failed though all ranks are there: Broken"),
    ],
)
def test_words(silent, error, says):
    """What is known of a rank's fate."""
    assert _describe("steps", silent, error).startswith(f"rank 0 {says}")


def test_under_torchrun_the_launcher_holds_the_store(monkeypatch):
    """Its end says nothing of rank 0."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert "and lost another rank; it cannot ask" in _describe("steps", None, "Broken pipe")


@pytest.mark.parametrize(
    ("ranks", "name"),
    [([3], "rank 3"), ([0, 2], "ranks 0, 2"), ([*range(9)], "ranks 0, 1, 2, 3, 4, 5, 6, 7, ...")],
)
def test_names_of_ranks(ranks, name):
    """A few, and the first of many."""
    assert name_ranks(ranks) == name
