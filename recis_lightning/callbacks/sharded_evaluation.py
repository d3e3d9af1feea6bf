"""Evaluation on several ranks with unequal numbers of batches."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

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
            callbacks.insert(0, cls())

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        finish_evaluation(pl_module)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        finish_evaluation(pl_module)

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        finish_evaluation(pl_module)
