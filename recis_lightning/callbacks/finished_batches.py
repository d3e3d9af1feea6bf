"""Saves between a batch's step and its end: hooks finish first what the checkpoint counts.

Lightning counts a batch as trained before callbacks act on its end, and a run that resumes from a
checkpoint goes on with the next one. So what is saved in between, on Ctrl-C, on an exception of a
callback or by a callback itself, must be what hooks and tables are at the batch's end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from recis_lightning.callbacks.save_interception import intercept_saves, release_saves
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.listing import hash_tables

__all__ = ["BatchFinisher", "FinishedBatches", "is_ending"]

_log = logging.getLogger(__name__)

_KEY = "_recis_lightning_batches"


@runtime_checkable
class BatchFinisher(Protocol):
    """Callback whose work at a batch's end is part of what a checkpoint holds."""

    def finish_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do that work, unless it is done; what the callback does at the end is then nothing."""


def is_ending(trainer: Any) -> bool:
    """Return whether Lightning counts the batch as trained, and callbacks act on its end."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    # A batch that on_train_batch_start skips is counted as processed, but not as started.
    return bool(progress.started > progress.completed < progress.processed)


class FinishedBatches:
    """Interceptor of saves: callbacks finish a batch that Lightning counts as trained.

    Of a save within a batch, which is trained again by the run that resumes, it says what that run
    will have twice. One for each Trainer, whatever number of hooks it has.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        loop = trainer.fit_loop.epoch_loop
        # Lightning's own counts, which it changes in place: this is read after each batch.
        self._batches = loop.batch_progress.total
        self._steps = (
            loop.automatic_optimization.optim_progress.optimizer.step.total,
            loop.manual_optimization.optim_step_progress.total,
        )
        self._num_begun = 0  # batches, when the run began
        self._ended = (0, 0)  # batches that had ended when noted last, and steps of optimizers

    @classmethod
    def attach(cls, trainer: Trainer) -> FinishedBatches:
        """Stand around the saves of a Trainer whose training starts; return what stands there."""
        found: FinishedBatches = vars(trainer).setdefault(_KEY, cls(trainer))
        found._num_begun = found._batches.started
        intercept_saves(trainer, found)
        found.note_end()
        return found

    @staticmethod
    def detach(trainer: Trainer) -> None:
        """Stand there no more: training has ended."""
        if _KEY in vars(trainer):
            release_saves(trainer, vars(trainer)[_KEY])

    def note_end(self) -> None:
        """Note that a batch has ended, so that an optimizer's steps since then can be told."""
        self._ended = self._batches.processed, self._steps_begun()

    def _steps_begun(self) -> int:
        """Return a number that grows with each step that an optimizer begins or ends."""
        num_steps: int = sum(total.completed for total in self._steps)
        for optimizer in self._trainer.optimizers:
            num_steps += getattr(optimizer, "num_steps_begun", 0)
        return num_steps

    def __call__(self, save: Callable[..., None], filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Save, after what belongs to it."""
        trainer = self._trainer
        if trainer.state.fn is TrainerFn.FITTING:
            if is_ending(trainer):
                self._finish()
            elif _is_within(trainer) and self._batches.started > self._num_begun:
                self._tell_repeated(filepath)
        save(filepath, *args, **kwargs)

    def _finish(self) -> None:
        trainer = self._trainer
        if trainer.interrupted and trainer.world_size > 1:
            return  # other ranks may be elsewhere; nothing is saved then
        callbacks: list[Any] = trainer.callbacks
        for callback in callbacks:
            if not isinstance(callback, BatchFinisher):
                continue
            try:
                callback.finish_batch(trainer, trainer.lightning_module)
            except Exception:
                if not trainer.interrupted:
                    raise
                _log.exception(
                    "%s could not act on the end of the last batch, which is saved as trained",
                    type(callback).__name__,
                )

    def _tell_repeated(self, filepath: Any) -> None:
        trainer: Any = self._trainer
        twice, (num_batches, num_steps) = [], self._ended
        if num_batches == self._batches.processed and self._steps_begun() != num_steps:
            twice.append("an optimizer has updated weights in it already")
        names = [table.name for table in hash_tables(trainer.lightning_module) if _counts(table)]
        if names:
            twice.append(f"tables {names} have counted ids of its lookups already")
        if twice and trainer.is_global_zero:
            _log.warning(
                "%s is saved within training batch %d, which a run that resumes from it trains "
                "again: %s; one saved at a batch's end has it once",
                *(filepath, self._batches.started, ", and ".join(twice)),
            )


def _is_within(trainer: Any) -> bool:
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(progress.started > progress.completed == progress.processed)


def _counts(table: HashTable) -> bool:
    """Return whether training lookups of a table count ids: by its admission or its eviction."""
    storage = table.storage
    return storage.admission_counter is not None or "counts" in storage.kept_columns
