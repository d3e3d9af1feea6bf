"""Type of the hooks that inspect one step and report on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from recis_lightning.callbacks.hook import Hook, batches_done
from recis_lightning.callbacks.step_inspection import StepInspection
from recis_lightning.monitoring.step_costs import StepCosts

__all__ = ["InspectionHook"]


class InspectionHook(Hook, ABC):
    """Hook that inspects one step; its heirs say what they report of it."""

    _inspection: StepInspection  # made and owned by each heir

    @abstractmethod
    def _report_of(self, costs: StepCosts) -> tuple[str, str, Any]:
        """Return name, text and JSON of the report of a step."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._inspection.begin_run()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._inspection.start_batch(trainer, pl_module)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        costs = self._inspection.end_batch(trainer, batches_done(trainer))
        if costs is not None:
            self._inspection.write(trainer, *self._report_of(costs))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._inspection.pause(True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._inspection.pause(False)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._inspection.end_run(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._inspection.end_run(trainer)
