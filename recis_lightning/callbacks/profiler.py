"""``ProfilerHook``: Chrome traces of a few training batches, with Lightning's named regions."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.profilers import Profiler, PyTorchProfiler
from torch.profiler import ProfilerAction, ProfilerActivity, record_function
from typing_extensions import override

from recis_lightning.arguments import check_int
from recis_lightning.callbacks.hook import Hook, batches_done

__all__ = ["ProfilerHook"]

_log = logging.getLogger(__name__)

# torch does not escape names in its JSON, and a callback's state_key may hold anything.
_UNSAFE = {ord('"'): "'", ord("\\"): "/", **dict.fromkeys(range(32), " ")}


class ProfilerHook(Hook):
    """Profile training in cycles of ``wait + warmup + active`` batches, one trace for each cycle.

    Each trace is a file ``{APP_ID}-timeline-{step}.json`` in ``output_dir`` for
    ``chrome://tracing`` or Perfetto: ``APP_ID`` is the environment variable, or ``local``;
    ``step`` is the number of training batches done, counted over resumed runs; with several
    ranks each writes its own, ``...-{step}-rank{rank}.json``. It holds CPU and device
    activities with shapes, memory, Python stacks and FLOPs, Lightning's named regions
    (``run_training_batch``, ``[Callback]...``) and the tables' ops (``recis::...``). A run that
    ends or fails within a window writes a trace of the batches so far.

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
        trace_paths: Files written by this hook, in order.

    Raises:
        TypeError: An argument is not an int.
        ValueError: ``active`` is below 1, or another is negative.

    Example:
        >>> hook = ProfilerHook(wait=1, warmup=28, active=2, repeat=1, output_dir="timeline")
        >>> hook.trace_paths
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
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._cycle = self._position = 0
        self._step = batches_done(trainer)
        self._update(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.repeat and self._cycle == self.repeat:
            return
        self._step += 1
        self._position += 1
        if self._position < self.wait + self.warmup and self._position != self.wait:
            return
        if self._running and self._position >= self.wait + self.warmup:
            assert self.prof is not None
            self.prof.step()  # opens the window, or writes the trace when it closes
        if self._position == self.wait + self.warmup + self.active:
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
            self._start(trainer)
        recording = (
            self._running
            and self.prof is not None
            and self.prof.current_action in (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)
        )
        if recording and not isinstance(trainer.profiler, _RegionRecorder):
            trainer.profiler = _RegionRecorder(trainer.profiler)
        elif not recording and isinstance(trainer.profiler, _RegionRecorder):
            trainer.profiler = trainer.profiler.inner

    def _start(self, trainer: Trainer) -> None:
        """Start a profiler of one cycle.

        Each cycle has its own profiler: torch warns when a profiler begins its second cycle. The
        whole warm-up is one step of torch's, since each step costs and only the last has an effect.
        """
        rank = f"-rank{trainer.global_rank}" if trainer.world_size > 1 else ""

        def write(prof: torch.profiler.profile) -> None:
            app = os.environ.get("APP_ID") or "local"
            self._write(prof, f"{app}-timeline-{self._step}{rank}.json")

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
            self.prof.stop()  # within a window this writes the trace

    def _finish(self, trainer: Any) -> None:
        """Write the trace of an open window, and restore the Trainer's profiler."""
        try:
            self._stop()
        finally:
            if isinstance(trainer.profiler, _RegionRecorder):
                trainer.profiler = trainer.profiler.inner

    def _write(self, prof: torch.profiler.profile, name: str) -> None:
        folder = Path(self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path, unfinished = folder / name, folder / f".{name}.part"
        prof.export_chrome_trace(str(unfinished))
        unfinished.replace(path)
        if str(path) not in self.trace_paths:
            self.trace_paths.append(str(path))
        _log.info("Wrote the trace %s", path)


class _RegionRecorder(Profiler):
    """Profiler that records Lightning's regions in torch's trace and in the Trainer's profiler."""

    def __init__(self, inner: Profiler) -> None:
        super().__init__()
        self.inner = inner
        self._open: defaultdict[str, list[record_function]] = defaultdict(list)

    @override
    def start(self, action_name: str) -> None:
        self.inner.start(action_name)
        region = record_function(action_name.translate(_UNSAFE))
        region.__enter__()
        self._open[action_name].append(region)

    @override
    def stop(self, action_name: str) -> None:
        if self._open[action_name]:
            self._open[action_name].pop().__exit__(None, None, None)
        self.inner.stop(action_name)


def _activities() -> list[ProfilerActivity]:
    if torch.cuda.is_available():
        return [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    # On the CPU torch's tracer logs only its start and stop, in the middle of the progress bar.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    return [ProfilerActivity.CPU]
