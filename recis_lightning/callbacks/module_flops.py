"""``ModuleFlopsHook``: FLOPs and time of each submodule of one step."""

from __future__ import annotations

import os
from typing import Any, final

from typing_extensions import override

from recis_lightning.arguments import explain_arguments
from recis_lightning.callbacks.inspection_hook import InspectionHook
from recis_lightning.callbacks.step_inspection import StepInspection
from recis_lightning.monitoring.step_costs import StepCosts

__all__ = ["ModuleFlopsHook"]


@final
@explain_arguments()
class ModuleFlopsHook(InspectionHook):
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
    def _report_of(self, costs: StepCosts) -> tuple[str, str, Any]:
        return "module_flops", costs.modules_text(), costs.as_json("modules")
