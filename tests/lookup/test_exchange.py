"""Bytes that travel in a step: what docs/many_ranks.md says."""

from tests.helpers import rank_traffic


def test_messages_have_the_bytes_that_the_page_names(ranks):
    """On two nodes of two ranks, by the formulas on the page."""
    ranks.run(4, rank_traffic.all_cases, timeout_s=200)
