"""Evaluation on several ranks with unequal numbers of batches."""

from __future__ import annotations

import functools
import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from recis_lightning.distributed import collectives
from recis_lightning.lookup import finish_evaluation

__all__ = ["ShardedEvaluation"]


class ShardedEvaluation(Callback):
    """Keep ranks that finish evaluation early serving the lookups of those that still evaluate.

    Every rank has a part of every table, so an evaluation lookup needs all of them. Lightning gives
    all ranks the same number of batches in validation and test, but not always in prediction, nor
    with custom samplers. The first evaluation lookup on several ranks adds this callback to the
    Trainer; there is no need to pass it.

    Example:
        >>> ShardedEvaluation.attach(trainer := Trainer(logger=False, accelerator="cpu"))
        >>> isinstance(trainer.callbacks[0], ShardedEvaluation)
        True
    """

    @classmethod
    def attach(cls, trainer: Trainer) -> None:
        """Add the callback to a Trainer without one, before callbacks that may use collectives."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, cls) for callback in callbacks):
            # Another list: Lightning may go through this one.
            trainer.callbacks = [cls(), *callbacks]  # type: ignore[attr-defined]

    @classmethod
    def join(cls, trainer: Trainer) -> None:
        """Add the callback, and let a rank without a batch take part in validation and test.

        It must be called before these begin: such a rank looks nothing up that would tell.
        """
        cls.attach(trainer)
        of_fit: Any = trainer.fit_loop.epoch_loop.val_loop
        for loop in (of_fit, trainer.validate_loop, trainer.test_loop):
            _run_without_batches(loop)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        finish_evaluation(pl_module)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        finish_evaluation(pl_module)

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        finish_evaluation(pl_module)


def _run_without_batches(loop: Any) -> None:
    """Have a loop run on a rank without a batch if other ranks have some; Lightning skips it."""
    original = loop.setup_data
    if getattr(original, "asks_ranks", False):
        return

    @functools.wraps(original)
    def setup_data() -> None:
        before, module = loop._combined_loader, loop.trainer.lightning_module
        allows = module.allow_zero_length_dataloader_with_multiple_devices
        module.allow_zero_length_dataloader_with_multiple_devices = True
        try:
            original()
        finally:
            module.allow_zero_length_dataloader_with_multiple_devices = allows
        if loop._combined_loader is before or loop._combined_loader is None:
            return
        found = collectives.exchange_number("batches to evaluate", int(loop.skip))
        if loop.skip and not all(found):
            # Of a length of 0 nothing comes, whatever the bound.
            loop._max_batches = [math.inf] * len(loop._max_batches)

    setup_data.asks_ranks = True  # type: ignore[attr-defined]
    loop.setup_data = setup_data
