"""``TraceHook``: chosen tensors of every training step, as a Parquet data set."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from recis_lightning.arguments import check_int
from recis_lightning.callbacks.hook import Hook, batches_done
from recis_lightning.trace.collect import TraceCollection
from recis_lightning.trace.writer import TraceWriter, check_names

__all__ = ["TraceHook"]

_log = logging.getLogger(__name__)


class TraceHook(Hook):
    """Write what ``add_to_trace`` collects in training steps to a Parquet data set.

    In every ``every``-th training batch, ``add_to_trace(name, tensor)`` keeps a copy of the
    tensors named here, and a thread writes them: rows in the order of steps, with ``step``
    (training batches done, from 1), ``rank`` and, as a partition, ``epoch``. Every rank writes its
    own files, which ``pyarrow.dataset.dataset(path, partitioning="hive")`` reads together. See
    ``recis_lightning.trace.TraceWriter`` for columns and files, and for use without a Trainer.

    Training waits when ``queue_size`` steps wait to be written, and fails when they cannot be: a
    full disk is an error, and so is a step that did not add one of ``tensors``. A run that fails
    for another reason leaves all steps that it finished. Before each checkpoint the files are made
    whole; a run that resumes from one removes the rows of later steps, which it will trace again.
    A run that starts anew in a folder with traces is refused.

    Args:
        tensors: Names of the columns; None takes those that the first traced step adds.
        path: The data set's folder.
        every: Batches from one traced step to the next, at least 1.
        queue_size: Steps that may wait to be written, at least 1.

    Raises:
        TypeError, ValueError: An argument is not what it should be (names it).

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
    ) -> None:
        super().__init__()
        self.tensors = None if tensors is None else check_names(tensors)
        self.path = os.fspath(path)
        self.every = check_int("every", every, least=1)
        self.queue_size = check_int("queue_size", queue_size, least=1)
        self._writer: TraceWriter | None = None
        self._collection: TraceCollection | None = None
        self._step = 0

    def __getstate__(self) -> dict[str, Any]:
        # A thread can be neither pickled nor copied.
        return {**vars(self), "_writer": None, "_collection": None}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the data set, and make it what it was at the step from which training goes on.

        Raises:
            FileExistsError: Training starts anew and the folder holds traces.
        """
        self._step = batches_done(trainer)
        self._writer = TraceWriter(
            self.path, self.tensors, rank=trainer.global_rank, queue_size=self.queue_size
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

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Collect what this batch adds, if it is one to be traced."""
        self._step += 1
        if self._step % self.every == 0:
            self._collection = TraceCollection(self.tensors).open()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hand over what was collected."""
        if self._collection is None:
            return
        found, self._collection = self._collection.close(), None
        assert self._writer is not None
        if found or self._writer.tensors is not None:
            self._writer.write(self._step, found, {"epoch": trainer.current_epoch})

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Make the files whole: a checkpoint vouches for the steps before it."""
        if self._writer is not None:
            self._writer.flush()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is queued and close the files."""
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write what is queued and close the files."""
        try:
            self._close()
        except RuntimeError:  # what stopped the run matters more
            _log.exception("The trace is not whole")

    def _close(self) -> None:
        collection, self._collection = self._collection, None
        if collection is not None:
            collection.close()
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
