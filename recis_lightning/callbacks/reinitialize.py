"""``ReinitializeRowsHook``: start embeddings afresh in every epoch, and keep the dense part."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, final

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from recis_lightning.arguments import check_int, explain_arguments
from recis_lightning.callbacks.hook import Hook, is_new_trainer
from recis_lightning.close_names import did_you_mean
from recis_lightning.distributed import collectives
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.listing import hash_tables

__all__ = ["ReinitializeRowsHook"]

_log = logging.getLogger(__name__)


@explain_arguments()
@final
class ReinitializeRowsHook(Hook):
    """Give all rows of tables new initial weights between epochs (MEDA).

    Models with large tables overfit in their second epoch: rows of rare ids remember the labels of
    the first. Each epoch but the first begins with ``HashTable.reinitialize`` for every trainable
    table: rows start from other initial weights and an empty optimizer state, while ids, what
    policies keep of them, and the dense part stay. So train one more epoch rather than stop within
    one: rows know only the epoch that they are in.

    The last epoch that began so is part of Lightning's checkpoints: a run that is resumed within an
    epoch keeps its rows.

    Args:
        every_n_epochs: Epochs that rows live, at least 1.
        tables: Names of the tables; None for all trainable ones.

    Raises:
        TypeError, ValueError: An argument is of a wrong type or out of range, or when training
            starts, the module has no table of a name.

    Example:
        >>> ReinitializeRowsHook(tables=["user", "item"]).every_n_epochs
        1

    Source: Fan et al., Multi-Epoch learning with Data Augmentation, arXiv 2407.01607.
    """

    def __init__(self, every_n_epochs: int = 1, tables: Sequence[str] | None = None) -> None:
        super().__init__()
        self.every_n_epochs = check_int("every_n_epochs", every_n_epochs, least=1)
        if isinstance(tables, str) or not all(isinstance(name, str) for name in tables or ()):
            raise TypeError(f"tables: expected a list of tables' names or None, got {tables!r}")
        self.tables = None if tables is None else list(tables)
        self._last_epoch = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start anew in another Trainer."""
        if stage == "fit" and is_new_trainer(self, trainer):
            self._last_epoch = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._chosen(pl_module)  # a name that is wrong is told before anything is trained

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if epoch <= self._last_epoch or epoch % self.every_n_epochs:
            return
        chosen = self._chosen(pl_module)
        for table in chosen:
            table.reinitialize()
        self._last_epoch = epoch
        if collectives.rank() == 0:
            names = ", ".join(table.name for table in chosen)
            _log.info("Epoch %d begins with new rows in %s", epoch, names or "no table")

    def _chosen(self, pl_module: LightningModule) -> list[HashTable]:
        tables = hash_tables(pl_module)
        if self.tables is None:
            return [table for table in tables if table.trainable]
        named = {table.name: table for table in tables}
        if missing := sorted(set(self.tables) - set(named)):
            advice = did_you_mean(missing, named)
            raise ValueError(f"tables: the module has {sorted(named)}, got {missing}{advice}")
        return [named[name] for name in self.tables]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self._last_epoch}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_epoch = state_dict["last_epoch"]
