"""Backward passes and programs that differ from rank to rank: right gradients, or an error."""

import pytest

from tests.helpers import rank_backward as checks


@pytest.mark.parametrize(
    "check",
    [
        checks.another_output,
        checks.another_order,
        checks.after_a_step,
        checks.accumulated,
        checks.dropped,
        checks.joined,
        checks.clipped,
        checks.adam_of_zeros,
        checks.all_differing,
        checks.many_lookups,
        checks.all_refused,
        checks.unused_tables_may_lose_rows,
        checks.anchors_of_some,
    ],
    ids=lambda check: check.__name__,
)
def test_on_two_ranks(ranks, check):
    """The checks themselves say what holds."""
    ranks.run(2, check, timeout_s=150)


@pytest.mark.parametrize("how", ["delete", "clear"])
@pytest.mark.slow_except(dict(how="delete"))
def test_lost_rows_are_one_error(ranks, how):
    """And training goes on after it."""
    ranks.run(2, checks.lost_once, how, timeout_s=150)
