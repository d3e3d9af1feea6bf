"""Clock of training time, without validation, sanity check and checkpoint writing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

from recis_lightning.callbacks.save_interception import intercept_saves, release_saves

__all__ = ["TrainingClock"]


class TrainingClock:
    """Seconds a Trainer trains: from ``start`` to ``stop``, without pauses and saves."""

    def __init__(self) -> None:
        self._running, self._pauses = False, 0
        self._elapsed = self._since = 0.0

    def start(self, trainer: Trainer | None) -> None:
        """Run from 0, and pause whenever the Trainer saves; None in a loop written by hand."""
        self._running, self._pauses, self._elapsed = True, 0, 0.0
        self._since = time.perf_counter()
        if trainer is not None:
            intercept_saves(trainer, self._pause_during)

    def stop(self, trainer: Trainer) -> None:
        """Run no more."""
        self._running = False
        release_saves(trainer, self._pause_during)

    def mark(self) -> None:
        """Count the time so far; a pause that begins later may be counted from here."""
        if self._running and not self._pauses:
            now = time.perf_counter()
            self._elapsed += now - self._since
            self._since = now

    def pause(self, at_mark: bool = False) -> None:
        """Count no time from now on, or ``at_mark`` from the last mark on."""
        if self._running:
            if not at_mark:
                self.mark()
            self._pauses += 1

    def resume(self) -> None:
        """End a pause; of several at once, the last one to end counts."""
        if self._running and self._pauses:
            self._pauses -= 1
            if not self._pauses:
                self._since = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap, and begin the next."""
        self.mark()
        elapsed, self._elapsed = self._elapsed, 0.0
        return elapsed

    def _pause_during(self, save: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        self.pause()
        try:
            save(*args, **kwargs)
        finally:
            self.resume()
