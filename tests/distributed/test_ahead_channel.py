"""Channel of exchanges that run ahead, in real processes."""

import pytest

from tests.helpers import rank_channel as checks


@pytest.mark.parametrize(
    "check", [checks.in_order, checks.where_ranks_differ, checks.destroyed_in_flight]
)
def test_on_two_ranks(ranks, check):
    """The checks themselves say what holds."""
    ranks.run(2, check)


def test_its_thread_ends_with_the_process_group(ranks):
    """Each check has a group of its own."""
    ranks.run(2, checks.in_order)
    assert ranks.run(2, checks.names_of_threads) == [[], []]
