"""Progress of saving and loading, shown beside a Trainer's own progress bar."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from recis_lightning.checkpoint.chunks import ProgressCallback
from recis_lightning.checkpoint.progress import (
    SHOWN_AFTER_SECONDS,
    Progress,
    no_progress,
    progress_bar,
)

__all__ = ["trainer_progress"]


def trainer_progress(trainer: Trainer) -> Progress:
    """Return the display that suits the Trainer's progress bar; none if it has none."""
    bar = trainer.progress_bar_callback
    if not isinstance(bar, RichProgressBar | TQDMProgressBar) or bar.is_disabled:
        return no_progress
    if isinstance(bar, RichProgressBar) and bar.progress is not None:
        return _RichTask(bar).show
    return progress_bar


class _RichTask:
    """One more line in Lightning's rich display, in MB."""

    def __init__(self, bar: RichProgressBar) -> None:
        self._display: Any = bar.progress

    @contextmanager
    def show(self, description: str, total_bytes: int) -> Iterator[ProgressCallback]:
        """Show the line if the work takes ``SHOWN_AFTER_SECONDS``; remove it at the end."""
        display, since, done, task = self._display, time.monotonic(), 0, None

        def advance(num_bytes: int) -> None:
            nonlocal done, task
            done += num_bytes
            if task is None and time.monotonic() - since >= SHOWN_AFTER_SECONDS:
                task = display.add_task(f"{description} (MB)", total=total_bytes // 10**6)
            if task is not None:
                display.update(task, completed=done // 10**6)
                display.refresh()  # Lightning's display does not by itself

        try:
            yield advance
        finally:
            if task is not None:
                display.remove_task(task)
                display.refresh()
