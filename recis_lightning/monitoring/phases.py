"""``PhaseClock``: wall time of a training step, by what it is spent on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, final

__all__ = ["PHASES", "Frame", "PhaseClock", "PhaseTimes"]

PHASES = (
    "data",  # waiting for the next batch, and its way to the device
    "lookup",  # of tables
    "exchange",  # of ids, rows and gradients with other ranks
    "dense_forward",
    "backward",
    "dense_step",  # of optimizers of parameters
    "table_step",  # of optimizers of tables
    "hooks",  # of callbacks and of the module
    "other",  # the training loop itself
)


@final
class Frame:
    """Entry of a phase that was not left yet.

    Args:
        phase: One of ``PHASES``; None for time that belongs to no step.
    """

    __slots__ = ("phase",)

    def __init__(self, phase: str | None) -> None:
        self.phase = phase


class PhaseTimes(NamedTuple):
    """Times of a measurement.

    Attributes:
        seconds: By phase.
        total: From start to stop, without pauses and what belongs to no step.
    """

    seconds: dict[str, float]
    total: float


@final
class PhaseClock:
    """Clock that counts each moment to one phase: that of the innermost frame.

    Args:
        synchronize: Called before each reading, to wait for a device; None: nothing to wait for.

    Example:
        >>> clock = PhaseClock()
        >>> clock.start()
        >>> forward = clock.enter("dense_forward")
        >>> lookup = clock.enter("lookup")  # counts as lookup, not as dense forward
        >>> clock.leave(lookup)
        >>> clock.leave(forward)
        >>> times = clock.stop()
        >>> abs(times.total - sum(times.seconds.values())) < 1e-9
        True
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._synchronize = synchronize
        self._frames: list[Frame] = []
        self._pauses = 0
        self._began = self._since = self._left_out = 0.0
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def start(self) -> None:
        """Begin a measurement at 0; frames that are open stay open."""
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._left_out = 0.0
        self._began = self._since = self._now()

    def stop(self) -> PhaseTimes:
        """Return the times since ``start``."""
        self._count()
        return PhaseTimes(dict(self._seconds), self._since - self._began - self._left_out)

    def enter(self, phase: str | None) -> Frame:
        """Count to ``phase`` until the frame that is returned is left."""
        self._count()
        self._frames.append(Frame(phase))
        return self._frames[-1]

    def enter_outside(self, phase: str) -> Frame:
        """Enter a phase around the innermost frame, which goes on: it counts when that is left."""
        self._count()
        self._frames.insert(max(len(self._frames) - 1, 0), Frame(phase))
        return self._frames[max(len(self._frames) - 2, 0)]

    def leave(self, frame: Frame) -> None:
        """Leave a frame, whether it is the innermost or not; a frame that was left is none."""
        self._count()
        self._frames = [other for other in self._frames if other is not frame]

    def pause(self, at_last: bool = False) -> None:
        """Count no time from now on, or ``at_last`` from the last reading on."""
        if not self._pauses:
            if at_last:
                now = self._now()
                self._left_out += now - self._since
                self._since = now
            else:
                self._count()
        self._pauses += 1

    def resume(self) -> None:
        """End a pause; of several at once, the last one to end counts."""
        self._count()
        self._pauses = max(self._pauses - 1, 0)

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return time.perf_counter()

    def _count(self) -> None:
        now = self._now()
        phase = self._frames[-1].phase if self._frames else "other"
        if self._pauses or phase is None:
            self._left_out += now - self._since
        else:
            self._seconds[phase] += now - self._since
        self._since = now
