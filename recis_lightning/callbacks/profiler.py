"""``ProfilerHook``: Chrome traces of a few training batches, with Lightning's named regions."""

from __future__ import annotations

import logging
import os
import re
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.profilers import PyTorchProfiler
from torch import Tensor
from torch.profiler import ProfilerAction, ProfilerActivity
from typing_extensions import override

from recis_lightning.arguments import check_int
from recis_lightning.callbacks.hook import Hook, batches_done, is_new_trainer
from recis_lightning.callbacks.profiler_regions import RegionRecorder, end_open_regions
from recis_lightning.distributed import collectives

__all__ = ["ProfilerHook"]

_log = logging.getLogger(__name__)

_APP_BYTES = 128  # of APP_ID in the name of a trace; file systems allow 255 for the whole


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

    Args:
        wait: Batches of a cycle that are not profiled.
        warmup: Batches with the profiler on and nothing recorded; with 0, torch warns that the
            profiler's own start-up distorts the trace.
        active: Batches recorded.
        repeat: Number of cycles; 0 means until training ends, as in torch.
        output_dir: Folder of the traces; created if missing.

    Attributes:
        prof: The newest ``torch.profiler.profile``; None before the first window.
        trace_paths: Files written by this hook under its Trainer, in order.

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
        self.wait = check_int("wait", wait, least=0)
        self.warmup = check_int("warmup", warmup, least=0)
        self.active = check_int("active", active, least=1)
        self.repeat = check_int("repeat", repeat, least=0)
        self.output_dir = os.fspath(output_dir)
        self.prof: torch.profiler.profile | None = None
        self.trace_paths: list[str] = []
        self._cycle = 0
        self._position = 0  # batches done in this cycle
        self._running = False  # prof is started
        self._step = 0  # batches done in all
        self._begun = False

    def __getstate__(self) -> dict[str, Any]:
        # A torch profiler can be neither pickled nor copied.
        return {**vars(self), "prof": None, "_running": False}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reject profilers that cannot run beside this hook.

        Raises:
            MisconfigurationException: The Trainer has a ``PyTorchProfiler`` or another
                ``ProfilerHook``.
        """
        if stage != "fit":
            return
        if is_new_trainer(self, trainer):
            self.prof, self.trace_paths = None, []
        owner: Any = trainer
        if isinstance(owner.profiler, PyTorchProfiler):
            raise MisconfigurationException(
                "ProfilerHook and Trainer(profiler=PyTorchProfiler) both use torch's profiler, "
                "which runs once a process: remove one of them. SimpleProfiler and "
                "AdvancedProfiler work beside ProfilerHook."
            )
        hooks = [hook for hook in owner.callbacks if isinstance(hook, ProfilerHook)]
        if len(hooks) > 1:
            raise MisconfigurationException(
                f"expected one ProfilerHook, got {len(hooks)}: torch's profiler runs once a process"
            )

    @override
    def before_train(self) -> None:
        """Begin the first cycle, in a loop written by hand."""
        self._begin(None, 0)

    @override
    def after_step(self, _: Any, gstep: int | Tensor) -> None:
        """Count a batch, in a loop written by hand; the first call begins the first cycle.

        Args:
            _: Ignored.
            gstep: The global step, an int or a tensor of one element.
        """
        if not self._begun:
            self._begin(None, 0)
        self._advance(None, int(gstep))

    @override
    def end(self) -> None:
        """Write the trace of an open window, at the end of a loop written by hand."""
        self._begun = False
        self._finish(None)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, batches_done(trainer))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.repeat and self._cycle == self.repeat:
            return
        self._advance(trainer, self._step + 1)

    def _begin(self, trainer: Any, step: int) -> None:
        """Begin the first cycle, ``step`` batches done."""
        self._begun = True
        self._cycle = self._position = 0
        self._step = step
        self._update(trainer)

    def _advance(self, trainer: Any, step: int) -> None:
        """Count a batch, and start, step or stop the profiler where that is due."""
        if self.repeat and self._cycle == self.repeat:
            return
        self._step = step
        self._position += 1
        if self._position < self.wait + self.warmup and self._position != self.wait:
            return
        closes = self._position == self.wait + self.warmup + self.active
        if self._running and self._position >= self.wait + self.warmup:
            assert self.prof is not None
            if closes:
                _close_regions(trainer)
                end_open_regions()
            self.prof.step()  # opens the window, or writes the trace when it closes
        if closes:
            self._stop()
            self._cycle += 1
            self._position = 0
        self._update(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        try:
            self._finish(trainer)
        except Exception:  # the run's own exception matters more
            _log.exception("Could not finish the trace of the window that was open")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._finish(trainer)

    def _update(self, trainer: Any) -> None:
        """Start a profiler when the wait is over; record Lightning's regions within a window."""
        finished = self.repeat != 0 and self._cycle == self.repeat
        if not self._running and not finished and self._position == self.wait:
            if torch._C._autograd._profiler_enabled():  # torch would end that one without a word
                _log.warning("Not profiled at step %d: another profiler of torch runs", self._step)
            else:
                self._start(trainer)
        recording = (
            self._running
            and self.prof is not None
            and self.prof.current_action in (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)
        )
        if not recording:
            _close_regions(trainer)
        elif trainer is not None and not isinstance(trainer.profiler, RegionRecorder):
            trainer.profiler = RegionRecorder(trainer.profiler)

    def _start(self, trainer: Any) -> None:
        """Start a profiler of one cycle.

        Each cycle has its own profiler: torch warns when a profiler begins its second cycle. The
        whole warm-up is one step of torch's, since each step costs and only the last has an effect.
        """
        if trainer is None:
            of_several, number = collectives.world_size() > 1, collectives.rank()
        else:
            of_several, number = trainer.world_size > 1, trainer.global_rank
        rank = f"-rank{number}" if of_several else ""

        def write(prof: torch.profiler.profile) -> None:
            self._write(prof, f"{_app_name()}-timeline-{self._step}{rank}.json")

        self.prof = torch.profiler.profile(
            activities=_activities(),
            schedule=torch.profiler.schedule(
                wait=0, warmup=min(self.warmup, 1), active=self.active, repeat=1
            ),
            on_trace_ready=write,
            record_shapes=True,
            profile_memory=True,
            with_stack=True,
            with_flops=True,
        )
        self.prof.start()
        self._running = True

    def _stop(self) -> None:
        if self._running:
            self._running = False
            assert self.prof is not None
            end_open_regions()
            self.prof.stop()  # within a window this writes the trace

    def _finish(self, trainer: Any) -> None:
        """Write the trace of an open window, and restore the Trainer's profiler."""
        _close_regions(trainer)
        self._stop()

    def _write(self, prof: torch.profiler.profile, name: str) -> None:
        folder = Path(self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path, unfinished = folder / name, folder / f".{name}.part"
        if self._position <= self.wait + self.warmup and str(path) in self.trace_paths:
            return  # a window without a batch, which opened where the last one closed
        prof.export_chrome_trace(str(unfinished))
        unfinished.replace(path)
        if str(path) not in self.trace_paths:
            self.trace_paths.append(str(path))
        _log.info("Wrote the trace %s", path)


def _close_regions(trainer: Any) -> None:
    """Give the Trainer its own profiler back, and end the regions that were recorded beside it."""
    if trainer is not None and isinstance(trainer.profiler, RegionRecorder):
        recorder, trainer.profiler = trainer.profiler, trainer.profiler.inner
        recorder.close()


def _app_name() -> str:
    """Return ``APP_ID`` as a part of a file name; a digest tells apart those that are altered."""
    app = os.environ.get("APP_ID") or "local"
    safe = (
        re.sub(r"[^\w.-]", "_", app).encode(errors="replace")[:_APP_BYTES].decode(errors="ignore")
    )
    return safe if safe == app else f"{safe}-{zlib.crc32(app.encode(errors='replace')):08x}"


def _activities() -> list[ProfilerActivity]:
    if torch.cuda.is_available():
        return [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    # On the CPU torch's tracer logs only its start and stop, in the middle of the progress bar.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    return [ProfilerActivity.CPU]
