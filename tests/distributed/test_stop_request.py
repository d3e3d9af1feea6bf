"""Requests to stop: which of several counts, and when ranks know of one."""

import pytest
from torch import distributed

from recis_lightning.distributed import collectives
from recis_lightning.distributed.stop_request import STOP_REQUEST, StopRequest


def test_the_greatest_number_counts():
    """On one rank it is known at once."""
    request = StopRequest()
    assert request.agreed() == 0
    for number, known in ((10, 10), (266, 266), (15, 266)):
        request.note(number)
        assert request.agreed() == known
    request.clear()
    assert request.agreed() == 0


def tell(told):
    """Note a number on some ranks; return what this one knows before and after an exchange."""
    STOP_REQUEST.clear()
    STOP_REQUEST.note(told[distributed.get_rank()])
    before = STOP_REQUEST.agreed()
    numbers = collectives.exchange_number("a number", distributed.get_rank() - 1)
    after = STOP_REQUEST.agreed()
    STOP_REQUEST.clear()
    return before, numbers, after


@pytest.mark.parametrize("told", [(0, 0), (15, 0), (0, 266), (10, 15)])
def test_ranks_know_of_it_after_an_exchange(ranks, told):
    """None before; what is exchanged is not changed by it."""
    assert ranks.run(2, tell, told) == [(0, [-1, 0], max(told))] * 2
