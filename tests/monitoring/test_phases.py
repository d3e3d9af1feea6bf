"""PhaseClock: each moment counts once, whatever opens, closes and pauses in between."""

import random
from types import SimpleNamespace

import pytest

from recis_lightning.monitoring import phases as phases_module
from recis_lightning.monitoring.phases import PHASES, PhaseClock


class Time:
    now = 5.0

    def __call__(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    time = Time()
    monkeypatch.setattr(phases_module, "time", SimpleNamespace(perf_counter=time))
    return time


def test_the_innermost_frame_counts(time):
    clock = PhaseClock()
    clock.start()
    time.now += 1
    outer = clock.enter("dense_forward")
    time.now += 2
    inner = clock.enter("lookup")
    time.now += 4
    around = clock.enter_outside("backward")
    clock.leave(inner)
    time.now += 8
    clock.leave(around)
    nothing = clock.enter(None)
    time.now += 16
    clock.leave(nothing)
    clock.leave(outer)
    clock.leave(outer)
    times = clock.stop()
    known = {"other": 1, "dense_forward": 2, "lookup": 4, "backward": 8}
    assert times.seconds == {**dict.fromkeys(PHASES, 0), **known}
    assert times.total == 15


def test_pauses_leave_out_time_from_now_or_from_the_last_reading(time):
    clock = PhaseClock()
    clock.start()
    time.now += 1
    clock.pause()
    time.now += 2
    clock.pause(at_last=True)
    clock.resume()
    time.now += 4
    clock.resume()
    time.now += 8
    frame = clock.enter("data")
    clock.leave(frame)
    time.now += 16
    clock.pause(at_last=True)
    time.now += 32
    clock.resume()
    assert clock.stop().total == 9


def test_phases_always_add_up(time):
    """Whatever is called in whatever order, and left twice or never."""
    for seed in range(50):
        draw, clock, frames = random.Random(seed), PhaseClock(), []
        clock.start()
        for _ in range(60):
            time.now += draw.randrange(5)
            call = draw.choice(["enter", "around", "leave", "pause", "resume"])
            if call == "enter":
                frames.append(clock.enter(draw.choice([*PHASES, None])))
            elif call == "around":
                frames.append(clock.enter_outside(draw.choice(PHASES)))
            elif call == "leave" and frames:
                clock.leave(draw.choice(frames))
            elif call == "pause":
                clock.pause(draw.choice([True, False]))
            elif call == "resume":
                clock.resume()
        times = clock.stop()
        assert sum(times.seconds.values()) == times.total


def test_the_device_is_waited_for_before_each_reading(time):
    def wait():
        time.now += 1  # what was still running

    clock = PhaseClock(wait)
    clock.start()
    frame = clock.enter("lookup")
    clock.leave(frame)
    assert clock.stop().seconds["lookup"] == 1
