"""``ModuleFlopsHook``: FLOPs and time of each submodule of one step."""

from __future__ import annotations

import os
from typing import Any, final

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from recis_lightning.arguments import explain_arguments
from recis_lightning.callbacks.hook import Hook, batches_done
from recis_lightning.callbacks.step_inspection import StepInspection
from recis_lightning.monitoring.step_costs import StepCosts

__all__ = ["ModuleFlopsHook"]


@final
@explain_arguments()
class ModuleFlopsHook(Hook):
    """Report of FLOPs and time of each submodule in one step, forward and backward.

    FLOPs are those that torch's ``flop_registry`` knows: products of matrices, convolutions and
    attention. Times are those of operators, submodules included; a backward operator belongs to
    the modules whose forward pass made its node. Ops of tables have columns of their own.

    The step is the training batches of one optimizer step, the first of them the ``step``-th of the
    run, on rank 0; validation in between is left out. It runs several times as slowly as others,
    operator by operator, and gives the same weights to the bit; other steps cost nothing. Where a
    profiler records that batch, or ``MetricReportHook`` measures it, a later one is taken, and if
    there is none the log says so. What ``torch.compile`` has compiled is not seen.

    Reports are ``module_flops.txt`` and ``module_flops.json``, and a part of the page of
    ``MetricReportHook(report=...)`` and ``recis_lightning.report``.

    Args:
        step: Training batch of the run, from 1.
        output_dir: Folder of the reports; None: the Trainer's ``default_root_dir``.

    Raises:
        TypeError, ValueError: ``step`` is no int, or below 1.

    Example:
        >>> hook = ModuleFlopsHook(step=100)
        >>> hook.costs is None
        True
    """

    def __init__(self, step: int = 10, output_dir: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self._inspection = StepInspection("ModuleFlopsHook", step, output_dir)

    @property
    def costs(self) -> StepCosts | None:
        """The modules of the step; None before it."""
        costs = self._inspection.costs
        return None if costs is None else costs._replace(operators=[])

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
            text, json = costs.modules_text(), costs.as_json("modules")
            self._inspection.write(trainer, "module_flops", text, json)

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
