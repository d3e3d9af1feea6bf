"""How long a Trainer has trained: without validation, sanity check and checkpoint writing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

__all__ = ["TimedSave", "TrainingClock"]


class TrainingClock:
    """Seconds spent training: runs between ``start`` and ``stop``, except while paused."""

    def __init__(self) -> None:
        self._running = False

    def start(self) -> None:
        """Run from now on, from 0."""
        self._running, self._pauses, self._elapsed = True, 0, 0.0
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Run no more."""
        self._running = False

    def mark(self) -> None:
        """Book the time so far, so that a pause may begin here in retrospect."""
        if self._running and not self._pauses:
            now = time.perf_counter()
            self._elapsed += now - self._since
            self._since = now

    def pause(self, at_mark: bool = False) -> None:
        """Leave out what follows, ``at_mark`` from the last mark on."""
        if self._running:
            if not at_mark:
                self.mark()
            self._pauses += 1

    def resume(self) -> None:
        """End a pause; with several, the last one counts."""
        if self._running and self._pauses:
            self._pauses -= 1
            if not self._pauses:
                self._since = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap, and begin the next."""
        self.mark()
        elapsed, self._elapsed = self._elapsed, 0.0
        return elapsed


class TimedSave:
    """Stands in for ``trainer.save_checkpoint`` while training, and pauses clocks meanwhile.

    Lightning calls no callback after it wrote a checkpoint, nor any at all when it saves
    weights only.
    """

    def __init__(self, save: Callable[..., None], replaced: bool) -> None:
        self._save = save
        self._replaced = replaced  # the Trainer had one of its own before
        self._clocks: list[TrainingClock] = []

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Save, with all clocks paused."""
        clocks = list(self._clocks)
        for clock in clocks:
            clock.pause()
        try:
            self._save(*args, **kwargs)
        finally:
            for clock in clocks:
                clock.resume()

    @classmethod
    def attach(cls, trainer: Trainer, clock: TrainingClock) -> None:
        """Pause a clock whenever the Trainer saves."""
        own = vars(trainer).get("save_checkpoint")
        if not isinstance(own, cls):
            own = cls(trainer.save_checkpoint, replaced=own is not None)
            vars(trainer)["save_checkpoint"] = own
        own._clocks.append(clock)

    @classmethod
    def detach(cls, trainer: Trainer, clock: TrainingClock) -> None:
        """Undo ``attach``."""
        own = vars(trainer).get("save_checkpoint")
        if not isinstance(own, cls) or clock not in own._clocks:
            return
        own._clocks.remove(clock)
        if not own._clocks and own._replaced:
            vars(trainer)["save_checkpoint"] = own._save
        elif not own._clocks:
            del vars(trainer)["save_checkpoint"]
