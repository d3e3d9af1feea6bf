"""``AutoProfilerHook``: a trace of every long run, without being asked."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, final

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.profilers import PyTorchProfiler
from typing_extensions import override

from recis_lightning.arguments import check_bool, check_int
from recis_lightning.callbacks.hook import Hook, is_new_trainer
from recis_lightning.callbacks.profiler import ProfilerHook, begin_timeline
from recis_lightning.callbacks.timeline import Timeline
from recis_lightning.callbacks.timeline_profiler import TimelineProfiler

__all__ = ["AutoProfilerHook"]

SWITCH = "RECIS_LIGHTNING_AUTO_PROFILER"  # environment variable; "0" turns the hook off
_OFF = ("0", "false", "off", "no")

_log = logging.getLogger(__name__)


@final
class AutoProfilerHook(Hook):
    """Trace of one batch of every run that is long enough, on some ranks.

    Its traces are those of ``ProfilerHook``, which says what is in them and how they are named.
    It gives way: beside a ``ProfilerHook``, or ``Trainer(profiler=...)`` with a
    ``TimelineProfiler`` or a ``PyTorchProfiler``, and where another profiler of torch runs when its
    own would start, it writes nothing and says so in the log. A trace that cannot be written is
    logged, and fails no run. ``RECIS_LIGHTNING_AUTO_PROFILER=0`` in the environment turns it off.

    Args:
        enabled: Whether it profiles at all, for YAML and flags.
        ranks: Global ranks that write traces; others only hold the hook.
        wait: Batches of a cycle that are not profiled; a shorter run has no trace.
        warmup: Batches with the profiler on and nothing recorded.
        active: Batches recorded.
        repeat: Number of cycles; 0 means until training ends.
        output_dir: Folder of the traces; None: ``auto_profiler`` in the Trainer's
            ``default_root_dir``.

    Raises:
        TypeError: An argument is of another type.
        ValueError: ``active`` is below 1, or another number is negative.

    Example:
        >>> hook = AutoProfilerHook(wait=1000)
        >>> hook.trace_paths
        []
    """

    def __init__(
        self,
        enabled: bool = True,
        ranks: Sequence[int] = (0,),
        wait: int = 100,
        warmup: int = 1,
        active: int = 1,
        repeat: int = 1,
        output_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        self.enabled = check_bool("enabled", enabled)
        if isinstance(ranks, str) or not isinstance(ranks, Sequence):
            raise TypeError(f"ranks: expected a sequence of ints, got {ranks!r}")
        self.ranks = tuple(check_int("ranks", rank, least=0) for rank in ranks)
        self._timeline = Timeline(wait, warmup, active, repeat, output_dir or "./")
        self._has_folder = output_dir is not None

    @property
    def trace_paths(self) -> list[str]:
        """Files written by this hook under its Trainer, in order."""
        return self._timeline.paths

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note the folder of the traces.

        Raises:
            MisconfigurationException: The Trainer has two of these hooks.
        """
        if stage != "fit":
            return
        if is_new_trainer(self, trainer):
            self._timeline.forget()
        count = sum(isinstance(hook, AutoProfilerHook) for hook in _callbacks(trainer))
        if count > 1:
            raise MisconfigurationException(f"expected one AutoProfilerHook, got {count}")
        if not self._has_folder:
            self._timeline.output_dir = os.path.join(trainer.default_root_dir, "auto_profiler")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled or os.environ.get(SWITCH, "").strip().lower() in _OFF:
            return
        if trainer.global_rank not in self.ranks:
            return
        other = _other_profiler(trainer)
        if other is not None:
            _log.info("AutoProfilerHook gives way to %s", other)
            return
        begin_timeline(self._timeline, trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._timeline.has_begun:
            try:
                self._timeline.advance(self._timeline.step + 1)
            except Exception:
                _log.exception("AutoProfilerHook could not write its trace")
                self._finish()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._finish()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._finish()

    def _finish(self) -> None:
        """Write the trace of an open window; what nobody asked for must not fail a run."""
        if self._timeline.has_begun:
            try:
                self._timeline.finish()
            except Exception:
                _log.exception("AutoProfilerHook could not finish its trace")


def _callbacks(trainer: Trainer) -> list[Any]:
    owner: Any = trainer
    return list(owner.callbacks)


def _other_profiler(trainer: Trainer) -> str | None:
    """Return the name of a profiler of torch that someone asked this Trainer for."""
    owner: Any = trainer
    if isinstance(owner.profiler, PyTorchProfiler | TimelineProfiler):
        return f"Trainer(profiler={type(owner.profiler).__name__})"
    if any(isinstance(hook, ProfilerHook) for hook in _callbacks(trainer)):
        return "ProfilerHook"
    return None
