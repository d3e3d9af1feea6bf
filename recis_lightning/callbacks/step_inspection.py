"""Inspection of one step of a Trainer, shared by the hooks that report on it."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import final

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils._python_dispatch import _get_current_dispatch_mode

from recis_lightning.arguments import check_int
from recis_lightning.monitoring.step_costs import StepCosts
from recis_lightning.monitoring.step_inspector import StepInspector
from recis_lightning.ops import backend

__all__ = ["StepInspection"]

_log = logging.getLogger(__name__)
_KEY = "_recis_lightning_inspection"  # on a Trainer: the inspection that runs


@final
class StepInspection:
    """Inspection of one step: of as many training batches as gradients accumulate over.

    It waits until no profiler of torch runs, and nobody else measures or inspects, and gives up
    when training ends. Two hooks that ask for the same step share an inspection.

    Args:
        hook: Name of the hook, for the log.
        step: First training batch of a run to inspect, from 1.
        output_dir: Folder of the reports; None: the Trainer's ``default_root_dir``.

    Attributes:
        costs: What was found; None before.
    """

    def __init__(self, hook: str, step: int, output_dir: str | os.PathLike[str] | None) -> None:
        self._hook, self.step = hook, check_int("step", step, least=1)
        self.output_dir = None if output_dir is None else os.fspath(output_dir)
        self.costs: StepCosts | None = None
        self._num_batches = self._left = 0
        self._inspector: StepInspector | None = None

    def begin_run(self) -> None:
        """Prepare for a run."""
        self.costs, self._num_batches, self._inspector = None, 0, None

    def start_batch(self, trainer: Trainer, module: LightningModule) -> None:
        """Inspect the batch that starts, if it is time."""
        self._num_batches += 1
        if self.costs is not None or self._inspector is not None:
            return
        if self._num_batches < self.step or not trainer.is_global_zero:
            return
        shared = vars(trainer).get(_KEY)
        if shared is None and _is_busy():
            return
        self._left = max(trainer.accumulate_grad_batches, 1)
        if shared is None:
            device = trainer.strategy.root_device
            wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
            shared = StepInspector(module, wait)
            shared.start()
            vars(trainer)[_KEY] = shared
        self._inspector = shared

    def end_batch(self, trainer: Trainer, num_batches: int) -> StepCosts | None:
        """Note that a batch ends; return the costs if it was the last to inspect.

        Args:
            trainer: The Trainer.
            num_batches: Training batches done.
        """
        if self._inspector is None:
            return None
        self._left -= 1
        if self._left:
            return None
        self.costs = self._inspector.stop(num_batches)
        vars(trainer).pop(_KEY, None)
        self._inspector = None
        return self.costs

    def pause(self, is_paused: bool) -> None:
        """Leave out what follows, a validation, or go on."""
        if self._inspector is not None:
            self._inspector.is_paused = is_paused

    def end_run(self, trainer: Trainer) -> None:
        """Stop an inspection that is not complete."""
        if self._inspector is not None:
            self._inspector.stop(0)
            vars(trainer).pop(_KEY, None)
            self._inspector = None
        if self.costs is None and self._num_batches >= self.step and trainer.is_global_zero:
            _log.warning(
                "%s inspected no step: a profiler, or another measurement, ran in each batch from "
                "%d on",
                self._hook,
                self.step,
            )

    def write(self, trainer: Trainer, name: str, text: str, json: str) -> None:
        """Write a report as text and as JSON."""
        folder = Path(self.output_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, content in ((".txt", text), (".json", json)):
            unfinished = folder / f".{name}{suffix}.part"
            unfinished.write_text(content + "\n", encoding="utf-8")
            unfinished.replace(folder / f"{name}{suffix}")
        _log.info("Wrote %s", folder / f"{name}.txt")


def _is_busy() -> bool:
    """Return whether somebody else looks at what runs."""
    return bool(
        torch._C._autograd._profiler_enabled()
        or backend.has_meters()
        or _get_current_dispatch_mode() is not None
    )
