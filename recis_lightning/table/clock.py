"""Clock of a table, by which rows age."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)

_wall_clock = time.time

# The wall clock may run ahead of the monotonic one by so much, for a reading late or corrected.
_SLACK_SECONDS = 60.0
_MAX_SECONDS = 2.0**43  # microseconds must be an int64


class TableClock:
    """Time by a policy's clock, whose jumps forward are bounded, and which never goes back.

    A clock that is set, or that goes on while the machine sleeps, would make every row old at once.

    Args:
        source: Returns seconds; None for ``time.time``.
        max_jump: Largest advance in seconds from one reading to the next; of a larger one so much
            counts. None bounds ``time.time`` by what ``time.monotonic`` shows, and no other clock.

    Example:
        >>> readings = iter([100.0, 101.0, 5000.0])
        >>> clock = TableClock(lambda: next(readings), max_jump=10.0)
        >>> clock(), clock(), clock()
        (100.0, 101.0, 111.0)
    """

    def __init__(self, source: Callable[[], float] | None, max_jump: float | None = None) -> None:
        self.source, self.max_jump = source, max_jump
        self._is_wall = source is None or source is _wall_clock
        self._skipped = 0.0  # seconds of jumps that do not count
        self._latest = -math.inf  # what was returned last: time never goes back
        self._last: tuple[float, float] | None = None  # latest reading, time.monotonic() then
        self._has_told = False

    def is_like(self, other: TableClock) -> bool:
        """Return whether both read the same clock, with the same bound."""
        return (self.source, self.max_jump) == (other.source, other.max_jump)

    def __call__(self) -> float:
        """Return the time in seconds.

        Raises:
            ValueError: The clock returns no finite number of seconds, or one out of range.
        """
        reading, steady = float((self.source or _wall_clock)()), time.monotonic()
        if not (math.isfinite(reading) and abs(reading) < _MAX_SECONDS):
            raise ValueError(
                f"clock: expected a number of seconds below 2**43, got {reading!r} from "
                f"{self.source!r}"
            )
        if self._last is not None:
            advance, elapsed = reading - self._last[0], steady - self._last[1]
            if self._is_wall and advance < elapsed - _SLACK_SECONDS:  # it was set back
                self._skipped += advance - elapsed
            elif advance < 0:  # out of order: the next advance is that from the latest reading
                return self._latest
            else:
                self._bound(advance, elapsed)
        self._last = reading, steady
        self._latest = max(self._latest, reading - self._skipped)
        return self._latest

    def _bound(self, advance: float, elapsed: float) -> None:
        """Note how much of an advance since the latest reading does not count."""
        counted = self.max_jump
        if counted is None:
            if not self._is_wall or advance <= 1.01 * elapsed + _SLACK_SECONDS:
                return
            counted = elapsed
        if advance <= counted:
            return
        self._skipped += advance - counted
        if not self._has_told:
            self._has_told = True
            _log.warning(
                "The clock by which rows age jumped %.0f s forward; %.0f s count, so that rows "
                "are not evicted for it. It is told once; max_jump of TimeToLive sets the bound.",
                advance,
                counted,
            )


__all__ = ["TableClock"]
