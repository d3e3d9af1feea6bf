"""``UnevenBatches``: ranks with unequal numbers of batches begin and end an epoch together."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from torch import Tensor
from typing_extensions import override

from recis_lightning.callbacks.level_fetcher import LevelFetcher
from recis_lightning.callbacks.sharded_evaluation import ShardedEvaluation

__all__ = ["UnevenBatches"]

_log = logging.getLogger(__name__)


class UnevenBatches(Callback):
    """Let ranks with unequal numbers of training batches end an epoch together.

    A training step is one of all ranks: a rank that goes on alone would wait for the others for
    ever. Each hook of this package (``HashTableFilterHook``, ``LoggerHook``, ...) brings this
    callback with ``on_uneven="stop"``; pass it for "pad", or where there is no such hook.

    Where the data have a length, ranks compare it once an epoch. Data without one cost a small
    message in each batch.

    It also lets a rank without a single batch take part in validation and test.

    Args:
        on_uneven: "stop" ends the epoch on all ranks with the first rank whose data end; RecIS does
            so. "pad" trains on all data: a rank whose data have ended gets batches without samples
            until the last rank has ended. ``training_step`` must return a finite loss for these, as
            ``loss.sum() / max(len(loss), 1)`` is; DDP averages over all ranks.

    Raises:
        ValueError: ``on_uneven`` is neither.

    Example:
        >>> UnevenBatches(on_uneven="pad").on_uneven
        'pad'
    """

    def __init__(self, on_uneven: Literal["stop", "pad"] = "stop") -> None:
        if on_uneven not in ("stop", "pad"):
            raise ValueError(f"on_uneven: expected 'stop' or 'pad', got {on_uneven!r}")
        self.on_uneven: Literal["stop", "pad"] = on_uneven
        self._fetcher: LevelFetcher | None = None
        self._num_padded = 0  # before this batch

    @classmethod
    def attach(cls, trainer: Trainer) -> None:
        """Add the callback to a Trainer of several ranks that has none."""
        if trainer.world_size == 1:
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, cls) for callback in callbacks):
            # Another list: Lightning may go through this one.
            trainer.callbacks = [*callbacks, cls()]  # type: ignore[attr-defined]
        ShardedEvaluation.join(trainer)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            ShardedEvaluation.join(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._level(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._level(trainer)  # where data were loaded anew
        self._num_padded = 0

    def _level(self, trainer: Any) -> None:
        loop = trainer.fit_loop
        fetcher = loop._data_fetcher
        if trainer.world_size == 1 or type(fetcher) is not _PrefetchDataFetcher:
            return

        def set_length(length: float) -> None:
            if length != loop.max_batches and isinstance(trainer.val_check_interval, float):
                share = length * trainer.val_check_interval
                trainer.val_check_batch = share if math.isinf(share) else max(1, int(share))
            loop.max_batches = length

        loop._data_fetcher = self._fetcher = LevelFetcher(fetcher, self.on_uneven, set_length)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._fetcher = None

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        fetcher = self._fetcher
        if fetcher is None or fetcher.num_padded <= self._num_padded:
            return
        self._num_padded = fetcher.num_padded
        if not bool(torch.isfinite(loss.detach()).all()):
            raise RuntimeError(
                f"training_step: expected a finite loss of a batch without samples, got {loss}, "
                "which would spoil the weights of all ranks; return loss.sum() / max(len(loss), 1)"
                ", or use UnevenBatches('stop')"
            )
