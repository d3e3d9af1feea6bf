"""Channel of exchanges that run ahead, in real processes."""

import time

import pytest

from tests.helpers import rank_channel as checks


@pytest.mark.parametrize("check", [checks.in_order, checks.where_ranks_differ])
def test_on_two_ranks(ranks, check):
    """The checks themselves say what holds."""
    ranks.run(2, check)


def test_its_thread_ends_with_the_process_group(ranks):
    """Each check has a group of its own."""
    ranks.run(2, checks.in_order)
    for _ in range(50):
        if ranks.run(2, checks.names_of_threads) == [[], []]:
            return
        time.sleep(0.1)
    raise AssertionError(ranks.run(2, checks.names_of_threads))
