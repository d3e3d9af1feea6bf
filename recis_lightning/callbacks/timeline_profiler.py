"""``TimelineProfiler``: the traces of ``ProfilerHook`` by ``Trainer(profiler=...)``."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, final

import torch
from lightning.pytorch.profilers import Profiler
from typing_extensions import override

from recis_lightning.arguments import explain_arguments
from recis_lightning.callbacks.hook import batches_done
from recis_lightning.callbacks.profiler_regions import OpenRegions
from recis_lightning.callbacks.timeline import Timeline

__all__ = ["TimelineProfiler"]

_log = logging.getLogger(__name__)

_MODULE = "[LightningModule]"  # its methods run last at each point, whether or not it has them


@explain_arguments()
@final
class TimelineProfiler(Profiler):
    """Lightning profiler that writes Chrome traces of a few training batches.

    Its traces are those of ``ProfilerHook``, which says what is in them and how they are named; but
    a batch ends after all callbacks' ``on_train_batch_end``. Lightning's own ``PyTorchProfiler``
    writes one trace however often it is told to repeat, and counts micro-batches before their
    backward pass. Validation, test and prediction on their own are not profiled.

    Args:
        wait: Batches of a cycle that are not profiled.
        warmup: Batches with the profiler on and nothing recorded; with 0, torch warns that the
            profiler's own start-up distorts the trace.
        active: Batches recorded.
        repeat: Number of cycles; 0 means until training ends, as in torch.
        output_dir: Folder of the traces; created if missing.

    Raises:
        TypeError: A number is not an int.
        ValueError: ``active`` is below 1, or another is negative.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> profiler = TimelineProfiler(warmup=28, active=2, repeat=1, output_dir="timeline")
        >>> trainer = Trainer(profiler=profiler, logger=False, accelerator="cpu")
        >>> trainer.profiler.trace_paths
        []
    """

    def __init__(
        self,
        wait: int = 1,
        warmup: int = 48,
        active: int = 1,
        repeat: int = 4,
        output_dir: str | os.PathLike[str] = "./",
    ) -> None:
        super().__init__()
        self._timeline = Timeline(wait, warmup, active, repeat, output_dir)
        self._regions: OpenRegions | None = None  # of an open window
        self._lightning_module: Any = None  # the Trainer sets it before each run
        self._handled: BaseException | None = None  # while this was handled, training began

    @property
    def prof(self) -> torch.profiler.profile | None:
        """The newest ``torch.profiler.profile``; None before the first window."""
        return self._timeline.prof

    @property
    def trace_paths(self) -> list[str]:
        """Files written, in order."""
        return self._timeline.paths

    def __getstate__(self) -> dict[str, Any]:
        of_run = {"_regions": None, "_lightning_module": None, "_handled": None}
        return {**vars(self), **of_run}

    @override
    def start(self, action_name: str) -> None:
        if action_name.endswith(".on_exception"):
            self._finish_quietly()
        elif self._regions is not None:
            self._regions.start(action_name)

    @override
    def stop(self, action_name: str) -> None:
        if self._regions is not None:
            self._regions.stop(action_name)
        if action_name == "run_training_batch":
            error = sys.exc_info()[1]
            if self._timeline.has_begun and error is not None and error is not self._handled:
                self._finish_quietly()
        elif action_name.startswith(_MODULE):
            point = action_name.rpartition(".")[2]
            if point == "on_train_batch_end" and self._timeline.has_begun:
                self._timeline.advance(self._timeline.step + 1)
            elif point == "on_train_start":
                self._begin()
            elif point == "on_train_end":
                self._timeline.finish()

    @override
    def summary(self) -> str:
        """List the traces, for the report at the end of a run."""
        return "\n".join(["Traces:", *self.trace_paths]) if self.trace_paths else ""

    @override
    def teardown(self, stage: str | None) -> None:
        """Write the trace of a window that is still open."""
        if hasattr(self, "_timeline"):  # __del__ calls this too, whatever the arguments were
            self._timeline.finish()
        super().teardown(stage)

    def _begin(self) -> None:
        trainer = self._lightning_module.trainer
        self._handled = sys.exc_info()[1]
        rank = trainer.global_rank if trainer.world_size > 1 else None
        self._timeline.begin(batches_done(trainer), rank, self._open, self._close)

    def _open(self) -> None:
        if self._regions is None:
            self._regions = OpenRegions()

    def _close(self) -> None:
        if self._regions is not None:
            regions, self._regions = self._regions, None
            regions.close()

    def _finish_quietly(self) -> None:
        """Write the trace of an open window of a run that fails, whose exception matters more."""
        try:
            self._timeline.finish()
        except Exception:
            _log.exception("Could not finish the trace of the window that was open")
