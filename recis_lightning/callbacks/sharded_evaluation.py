"""Evaluation on many ranks whose batches do not come out even."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from recis_lightning.lookup import finish_evaluation

__all__ = ["ShardedEvaluation"]


class ShardedEvaluation(Callback):
    """Lets a rank that has no more batches answer the lookups of those that still have some.

    Every rank has a part of every table, so an evaluation lookup needs all of them. Lightning gives
    ranks as many batches as there are in validation and test, but not always in prediction, nor
    with samplers of one's own. The first evaluation lookup on several ranks adds this callback to
    the Trainer; there is no need to pass it.

    Example:
        >>> ShardedEvaluation.attach(trainer := Trainer(logger=False, accelerator="cpu"))
        >>> isinstance(trainer.callbacks[0], ShardedEvaluation)
        True
    """

    @classmethod
    def attach(cls, trainer: Trainer) -> None:
        """Add the callback to a Trainer that has none, before those that may gather something."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, cls) for callback in callbacks):
            callbacks.insert(0, cls())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer until all ranks are done."""
        finish_evaluation(pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer until all ranks are done."""
        finish_evaluation(pl_module)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer until all ranks are done."""
        finish_evaluation(pl_module)
