"""``DeltaHook``: write what changed in the tables, every so many batches or seconds."""

from __future__ import annotations

import os
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from recis_lightning.arguments import check_bool, check_bound, check_int, explain_arguments
from recis_lightning.callbacks.hook import Hook
from recis_lightning.distributed import collectives
from recis_lightning.serving.chain_sink import ChainSink
from recis_lightning.serving.delta import DeltaSink, ModelMark, uninitialized

__all__ = ["DeltaHook"]


@explain_arguments()
class DeltaHook(Hook):
    """Write what changed in a model's tables since the last time, for those who serve it.

    When training begins it writes a base: all rows, parameters and buffers (after the first batch,
    where a ``LazyLinear`` or its like waits for one). Then, every so many
    batches or seconds and when training ends, a delta: the rows that are new or changed, the ids
    that were evicted or deleted, and the parameters. ``serving.follow(folder)`` takes them up while
    it answers, ``serving.restore(folder, model)`` loads the state behind the last one. A process
    that is killed at any moment leaves a chain that loads; the next run begins it anew with a base.

    Each hook has a mark of its own: give a Trainer several for several consumers, each with its
    own folder or sink; a table has eight marks at most.

    Args:
        folder: Where the chain goes, in its folder ``deltas``: such as a folder of
            ``serving.export``. None if ``sink`` is given.
        every_n_batches: Training batches between deltas.
        seconds: Time between deltas, in place of that. On several ranks it becomes a number of
            batches by the time that the last ones took.
        state: Whether deltas have optimizer state, columns of policies, pins and admission counts
            too, for ``serving.restore``. Pins and counts are written whole.
        compact_every: Deltas after which they become a new base, in a thread of rank 0; None never.
        sink: Taker of the deltas, in place of a folder.

    Raises:
        TypeError, ValueError: An argument is not what it should be.

    Example:
        >>> hook = DeltaHook("served/", seconds=0.5)
        >>> hook.seconds
        0.5
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        every_n_batches: int | None = None,
        seconds: float | None = None,
        state: bool = False,
        compact_every: int | None = 100,
        sink: DeltaSink | None = None,
    ) -> None:
        super().__init__()
        if (folder is None) == (sink is None):
            raise ValueError("folder: give a folder or a sink, one of them")
        if (every_n_batches is None) == (seconds is None):
            raise ValueError("every_n_batches: give every_n_batches or seconds, one of them")
        if every_n_batches is not None:
            check_int("every_n_batches", every_n_batches, least=1, alternative=" or None")
        if seconds is not None:
            check_bound("seconds", seconds)
            if seconds == 0:
                raise ValueError("seconds: expected a number > 0, got 0; or give every_n_batches=1")
        check_bool("state", state)
        if sink is None:
            assert folder is not None
            sink = ChainSink(folder, compact_every)
        elif not all(callable(getattr(sink, name, None)) for name in ("write", "close")):
            raise TypeError(f"sink: expected an object with write and close, got {sink!r}")
        self.sink, self.state = sink, state
        self.every_n_batches, self.seconds = every_n_batches, seconds
        self._mark: ModelMark | None = None
        self._num_batches = self._next = self._last = 0
        self._last_time = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the base, or leave it to the first batch if parameters wait for that."""
        self._num_batches = self._last = 0
        if not uninitialized(pl_module):
            self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark = ModelMark(pl_module, self.state)
        self._write(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a delta if it is time."""
        self._num_batches += 1
        if self._mark is None:
            self._begin(trainer, pl_module)
        elif self._is_due():
            self._write(trainer)

    def _is_due(self) -> bool:
        if self.seconds is not None and collectives.world_size() == 1:
            return time.monotonic() - self._last_time >= self.seconds
        return self._num_batches >= self._next

    def _write(self, trainer: Trainer) -> None:
        assert self._mark is not None
        delta = self._mark.take(trainer.global_step)
        try:
            self.sink.write(delta)
        except BaseException:
            self._mark.put_back()
            raise
        now, done = time.monotonic(), self._num_batches - self._last
        self._next = self._num_batches + self._batches_until_next(done, now - self._last_time)
        self._last, self._last_time = self._num_batches, now

    def _batches_until_next(self, num_batches: int, took: float) -> int:
        """Return after how many batches the next delta is due, the same on all ranks."""
        if self.every_n_batches is not None:
            return self.every_n_batches
        assert self.seconds is not None
        wanted = 1 if num_batches == 0 else round(num_batches * self.seconds / max(took, 1e-6))
        wanted = min(max(wanted, 1), 4 * max(num_batches, 1))  # the first batches take longer
        return collectives.exchange_number("batches until the next delta", wanted)[0]

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last delta, and end."""
        if self._mark is not None:
            try:
                if self._num_batches > self._last:
                    self._write(trainer)
            finally:
                self._close()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """End without another delta."""
        self._close()

    def _close(self) -> None:
        mark, self._mark = self._mark, None
        if mark is not None:
            mark.close()
            self.sink.close()
