"""``ProfilerHook``: Chrome traces of a few training batches, with Lightning's named regions."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.profilers import PyTorchProfiler
from torch import Tensor
from typing_extensions import override

from recis_lightning.arguments import explain_arguments
from recis_lightning.callbacks.hook import Hook, batches_done, is_new_trainer
from recis_lightning.callbacks.profiler_regions import (
    OpenRegions,
    listen_to_regions,
    stop_listening,
)
from recis_lightning.callbacks.timeline import Timeline
from recis_lightning.callbacks.timeline_profiler import TimelineProfiler
from recis_lightning.distributed import collectives

__all__ = ["ProfilerHook", "begin_timeline"]

_log = logging.getLogger(__name__)


@explain_arguments()
class ProfilerHook(Hook):
    """Profile training in cycles of ``wait + warmup + active`` batches, one trace for each cycle.

    Each trace is a file ``{APP_ID}-timeline-{step}.json`` in ``output_dir`` for
    ``chrome://tracing`` or Perfetto: ``APP_ID`` is the environment variable, or ``local``
    (what a file name cannot hold is replaced, and a long one is cut); ``step`` is the number of
    training batches done, counted over resumed runs; with several ranks each writes its own,
    ``...-{step}-rank{rank}.json``. It holds CPU and device activities with shapes, memory, Python
    stacks and FLOPs, Lightning's named regions (``run_training_batch``, ``[Callback]...``) and the
    tables' ops (``recis::...``). A run that ends or fails within a window writes a trace of the
    batches so far.

    In a loop written by hand call ``before_train()`` (so that the first batch is in the first
    cycle), ``after_step(None, global_step)`` after each step, and ``end()``.

    Outside its windows the hook only counts. A ``SimpleProfiler`` or ``AdvancedProfiler`` of the
    Trainer keeps working beside it. ``PyTorchProfiler`` cannot: torch has one profiler a process.
    ``Trainer(profiler=TimelineProfiler(...))`` writes the same traces without a callback.

    Args:
        wait: Batches of a cycle that are not profiled.
        warmup: Batches with the profiler on and nothing recorded; with 0, torch warns that the
            profiler's own start-up distorts the trace.
        active: Batches recorded.
        repeat: Number of cycles; 0 means until training ends, as in torch.
        output_dir: Folder of the traces; created if missing.

    Raises:
        TypeError: An argument is not an int.
        ValueError: ``active`` is below 1, or another is negative.

    Example:
        >>> hook = ProfilerHook(wait=1, warmup=28, active=2, repeat=1, output_dir="timeline")
        >>> hook.trace_paths
        []
    """

    # Of loops written by hand. Lightning's methods do the same under a Trainer.
    _self_called = frozenset({"before_train", "after_step", "end"})

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

    @property
    def wait(self) -> int:
        """Batches of a cycle that are not profiled."""
        return self._timeline.wait

    @property
    def warmup(self) -> int:
        """Batches with the profiler on and nothing recorded."""
        return self._timeline.warmup

    @property
    def active(self) -> int:
        """Batches recorded."""
        return self._timeline.active

    @property
    def repeat(self) -> int:
        """Number of cycles; 0 means until training ends."""
        return self._timeline.repeat

    @property
    def output_dir(self) -> str:
        """Folder of the traces."""
        return self._timeline.output_dir

    @property
    def prof(self) -> torch.profiler.profile | None:
        """The newest ``torch.profiler.profile``; None before the first window."""
        return self._timeline.prof

    @property
    def trace_paths(self) -> list[str]:
        """Files written by this hook under its Trainer, in order."""
        return self._timeline.paths

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reject profilers that cannot run beside this hook.

        Raises:
            MisconfigurationException: The Trainer has a ``PyTorchProfiler``, a
                ``TimelineProfiler`` or another ``ProfilerHook``.
        """
        if stage != "fit":
            return
        if is_new_trainer(self, trainer):
            self._timeline.forget()
        owner: Any = trainer
        if isinstance(owner.profiler, PyTorchProfiler | TimelineProfiler):
            raise MisconfigurationException(
                f"ProfilerHook and Trainer(profiler={type(owner.profiler).__name__}) both use "
                "torch's profiler, which runs once a process: remove one of them. SimpleProfiler "
                "and AdvancedProfiler work beside ProfilerHook."
            )
        hooks = [hook for hook in owner.callbacks if isinstance(hook, ProfilerHook)]
        if len(hooks) > 1:
            raise MisconfigurationException(
                f"expected one ProfilerHook, got {len(hooks)}: torch's profiler runs once a process"
            )

    @override
    def before_train(self) -> None:
        """Begin the first cycle, in a loop written by hand."""
        rank = collectives.rank() if collectives.world_size() > 1 else None
        self._timeline.begin(0, rank)

    @override
    def after_step(self, _: Any, gstep: int | Tensor) -> None:
        """Count a batch, in a loop written by hand; the first call begins the first cycle.

        Args:
            _: Ignored.
            gstep: The global step, an int or a tensor of one element.
        """
        if not self._timeline.has_begun:
            self.before_train()
        self._timeline.advance(int(gstep))

    @override
    def end(self) -> None:
        """Write the trace of an open window, at the end of a loop written by hand."""
        self._timeline.finish()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        begin_timeline(self._timeline, trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._timeline.advance(self._timeline.step + 1)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._timeline.finish()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        try:
            self._timeline.finish()
        except Exception:  # the run's own exception matters more
            _log.exception("Could not finish the trace of the window that was open")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._timeline.finish()


def begin_timeline(timeline: Timeline, trainer: Trainer) -> None:
    """Begin a timeline's first cycle under a Trainer, whose named regions its windows record."""
    recorded: list[OpenRegions] = []  # one while a window is open

    def record_regions() -> None:
        if not recorded:
            recorded.append(OpenRegions())
            listen_to_regions(trainer, recorded[0])

    def end_regions() -> None:
        while recorded:
            regions = recorded.pop()
            stop_listening(trainer, regions)
            regions.close()

    timeline.begin(
        batches_done(trainer),
        trainer.global_rank if trainer.world_size > 1 else None,
        on_open=record_regions,
        on_close=end_regions,
    )
