"""Clock of a table: a jump forward does not age all rows at once."""

import logging
import time

import pytest
import torch

from recis_lightning import DynamicEmbedding
from recis_lightning.eviction import AnyOf, MinNorm, TimeToLive
from recis_lightning.table import clock as clock_module
from recis_lightning.table.clock import TableClock

YEAR = 365 * 86_400


class Times:
    """Wall and monotonic clock of a test."""

    def __init__(self, monkeypatch):
        self.wall, self.steady = 1.7e9, 50.0
        self.now = lambda: self.wall
        monkeypatch.setattr(clock_module, "_wall_clock", self.now)
        monkeypatch.setattr(clock_module.time, "monotonic", lambda: self.steady)

    def pass_by(self, seconds):
        self.wall += seconds
        self.steady += seconds


@pytest.fixture
def times(monkeypatch):
    return Times(monkeypatch)


def test_a_wall_clock_that_is_set_forward_evicts_nothing(times, caplog):
    """Only the time that has passed counts, and a warning says so, once."""
    module = DynamicEmbedding(2, eviction=TimeToLive(3600, clock=times.now), name="t")
    module(torch.arange(3))
    times.pass_by(10)
    with caplog.at_level(logging.WARNING, logger="recis_lightning"):
        times.wall += YEAR
        assert module.table.evict() == 0
        times.wall += YEAR
        assert module.table.evict() == 0
    assert len(caplog.records) == 1
    assert "jumped 31536010 s forward; 10 s count" in caplog.text
    times.pass_by(3000)
    module(torch.arange(1))
    times.pass_by(700)
    assert module.table.evict() == 2
    assert module.table.ids().tolist() == [0]


def test_time_that_passes_counts_however_long(times):
    module = DynamicEmbedding(2, eviction=TimeToLive(3600, clock=times.now), name="t")
    module(torch.arange(3))
    times.pass_by(YEAR)
    assert module.table.evict() == 3


def test_the_wall_clock_is_that_of_a_policy_without_one():
    assert TableClock(None)() == pytest.approx(time.time(), abs=60)
    assert clock_module._wall_clock is TimeToLive(5).clock


def test_max_jump_bounds_any_clock():
    readings = [0.0]
    policy = TimeToLive(100, clock=lambda: readings[0], max_jump=30)
    module = DynamicEmbedding(2, eviction=AnyOf([policy, MinNorm(0.0)]), name="t")
    module(torch.arange(3))
    for _ in range(3):
        readings[0] += YEAR
        assert module.table.evict() == 0
    module.table.eviction = AnyOf([policy])  # the same clock goes on
    readings[0] += YEAR
    assert module.table.evict() == 3


def test_a_clock_without_bound_is_believed():
    """Event time may run as it likes."""
    readings = [0.0]
    policy = TimeToLive(100, clock=lambda: readings[0])
    module = DynamicEmbedding(2, eviction=policy, name="t")
    module(torch.arange(3))
    readings[0] += YEAR
    assert module.table.evict() == 3


@pytest.mark.parametrize("reading", [float("nan"), float("inf"), 1e300, -(2.0**43)])
def test_a_reading_that_is_no_time_is_an_error(reading):
    """And nothing is evicted for it."""
    with pytest.raises(ValueError, match="clock: expected a number of seconds below 2"):
        TableClock(lambda: reading)()


def test_time_never_goes_back(times):
    """Event times that come out of order, and a wall clock that is set back."""
    readings = [100.0]
    policy = TimeToLive(10, clock=lambda: readings[0])
    module = DynamicEmbedding(2, eviction=policy, name="t")
    module(torch.tensor([1]))
    readings[0] = 50
    module(torch.tensor([2]))  # seen later: it must not be the older one
    readings[0] = 65
    assert module.table.evict() == 0
    readings[0] = 111
    assert module.table.evict() == 2

    readings = iter([1000.0, 1050.0, 960.0, 1055.0, 970.0, 1060.0])
    clock = TableClock(lambda: next(readings), max_jump=60.0)
    assert [clock() for _ in range(6)] == [1000, 1050, 1050, 1055, 1055, 1060]

    clock = TableClock(None)
    before = clock()
    times.pass_by(100)
    times.wall -= YEAR
    assert clock() == before + 100
    times.pass_by(50)
    assert clock() == before + 150
