"""``TraceHook``: selected tensors of training steps, as a Parquet data set."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from recis_lightning.arguments import check_int, explain_arguments
from recis_lightning.callbacks.finished_batches import FinishedBatches, is_ending
from recis_lightning.callbacks.hook import Hook, batches_done
from recis_lightning.trace.collect import TraceCollection
from recis_lightning.trace.files import import_pyarrow
from recis_lightning.trace.writer import TraceWriter, check_flushing, check_names

__all__ = ["TraceHook"]

_log = logging.getLogger(__name__)


@explain_arguments()
class TraceHook(Hook):
    """Write the tensors of ``add_to_trace`` in training steps to a Parquet data set.

    In every ``every``-th training batch, ``add_to_trace(name, tensor)`` keeps a copy of the
    tensors named here, and a thread writes them: rows in the order of steps, with ``step``
    (training batches done, from 1), ``rank`` and, as a partition, ``epoch``. Every rank writes its
    own files, which ``pyarrow.dataset.dataset(path, partitioning="hive")`` reads together.
    ``recis_lightning.trace.TraceWriter`` describes columns and files, and works without a Trainer.

    Training waits while ``queue_size`` steps wait to be written, and fails when they cannot be: a
    full disk is an error, and so is a step that did not add one of ``tensors``. A run that fails
    for another reason leaves all steps that it finished. Before each checkpoint the files are
    completed; a run that resumes from one removes the rows of later steps, which it will trace
    again. A new run in a folder with traces is an error.

    Args:
        tensors: Names of the columns; None takes those that the first traced step adds.
        path: The data set's folder.
        every: Batches from one traced step to the next, at least 1.
        queue_size: Steps that may wait to be written, at least 1.
        flush_rows: Complete a file, for readers that follow the run, with the step that brings it
            to so many rows; None: never.
        flush_seconds: Complete a file so long after its first step; None: never.

    Raises:
        ImportError: pyarrow is not installed.
        TypeError, ValueError: An argument is of a wrong type or out of range; the error names it.

    Example:
        >>> hook = TraceHook(["user", "score"], "outputs/trace", every=10)
        >>> hook.every
        10
    """

    def __init__(
        self,
        tensors: Sequence[str] | None,
        path: str | os.PathLike[str],
        every: int = 1,
        queue_size: int = 16,
        flush_rows: int | None = None,
        flush_seconds: float | None = None,
    ) -> None:
        super().__init__()
        import_pyarrow()
        self.tensors = None if tensors is None else check_names(tensors)
        self.path = os.fspath(path)
        self.every = check_int("every", every, least=1)
        self.queue_size = check_int("queue_size", queue_size, least=1)
        check_flushing(flush_rows, flush_seconds)
        self.flush_rows, self.flush_seconds = flush_rows, flush_seconds
        self._writer: TraceWriter | None = None
        self._collection: TraceCollection | None = None
        self._step = 0
        self._said_empty = False

    def __getstate__(self) -> dict[str, Any]:
        # A thread can be neither pickled nor copied.
        return {**vars(self), "_writer": None, "_collection": None}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the data set, and remove the rows of steps that training will repeat.

        Raises:
            FileExistsError: The run is new and the folder holds traces.
        """
        FinishedBatches.attach(trainer)
        self._step, self._said_empty = batches_done(trainer), False
        self._writer = TraceWriter(
            self.path,
            self.tensors,
            rank=trainer.global_rank,
            queue_size=self.queue_size,
            flush_rows=self.flush_rows,
            flush_seconds=self.flush_seconds,
        )
        if self._step == 0 and any(self._writer.path.rglob(f"rank-{trainer.global_rank:05d}-*")):
            raise FileExistsError(
                f"path: {self.path} holds the trace of another run; name a new folder, or resume "
                "that run with ckpt_path"
            )
        removed = self._writer.rewind(self._step, trainer.world_size)
        if removed:
            _log.info(
                "Removed %d rows of steps after %d from the trace in %s",
                *(removed, self._step, self.path),
            )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step += 1
        if self._step % self.every == 0:
            self._collection = TraceCollection(self.tensors).open()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.finish_batch(trainer, pl_module)

    def finish_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the step that has ended, unless that is done; before a save."""
        if self._collection is None:
            return
        columns, self._collection = self._collection.close(), None
        assert self._writer is not None
        missing = [name for name in self.tensors or () if name not in columns]
        if missing:
            raise ValueError(
                f"tensors: step {self._step} added no {missing} by add_to_trace(name, tensor); it "
                f"added {sorted([*columns, *columns.passed_over])}"
            )
        if not columns and self._writer.tensors is None and not self._said_empty:
            self._said_empty = True
            _log.warning("Nothing to trace: step %d called no add_to_trace", self._step)
        if columns or self._writer.tensors is not None:
            self._writer.write(self._step, columns, {"epoch": trainer.current_epoch})

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._writer is not None:
            self._writer.flush()  # a run that resumes from here does not repeat these steps

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        FinishedBatches.detach(trainer)
        self._close()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        try:
            try:
                if self._collection is not None and is_ending(trainer):  # not trained again
                    self.finish_batch(trainer, pl_module)
            finally:
                self._close()
        except (RuntimeError, ValueError):  # the run's own exception matters more
            _log.exception("The trace in %s is incomplete", self.path)

    def _close(self) -> None:
        """Write the queued steps and close the files."""
        collection, self._collection = self._collection, None
        if collection is not None:
            collection.close()
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
