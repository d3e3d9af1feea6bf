"""``History``: losses, validation scores, table sizes and evictions of a training run."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from recis_lightning import HashTable, hash_tables


class History(Callback):
    """Record the data of a run's picture and summary; any order among callbacks works.

    Attributes:
        losses: The loss of each training batch.
        scores: ``(batches done, {metric: value})`` for each validation.
        rows: For each table its number of rows in each training batch.
        evicted: For each table the number of rows evicted in all.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.scores: list[tuple[int, dict[str, float]]] = []
        self.rows: dict[str, list[int]] = {}
        self.evicted: dict[str, int] = {}
        self._tables: list[HashTable] = []

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tables = hash_tables(pl_module)
        for table in self._tables:
            self.rows.setdefault(table.name, [])
            self.evicted.setdefault(table.name, 0)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._count_evicted()

    @override
    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        # The batch's new ids have rows by now, and none has been evicted.
        self.losses.append(float(loss.detach()))
        for table in self._tables:
            self.rows[table.name].append(len(table))

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._count_evicted()

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.scores.append((len(self.losses), scores))

    def _count_evicted(self) -> None:
        for table in self._tables:
            if rows := self.rows[table.name]:
                self.evicted[table.name] += max(0, rows[-1] - len(table))
                rows[-1] = min(rows[-1], len(table))
