"""Cycles of a torch profiler over training batches, with a Chrome trace for each."""

from __future__ import annotations

import logging
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch
from torch.profiler import ProfilerAction, ProfilerActivity

from recis_lightning.arguments import check_int
from recis_lightning.callbacks.profiler_regions import end_open_regions

__all__ = ["Timeline"]

_log = logging.getLogger(__name__)

_APP_BYTES = 128  # of APP_ID in the name of a trace; file systems allow 255 for the whole
_RECORDING = (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)


def _nothing() -> None:
    """Do nothing when a window opens or closes."""


@final
class Timeline:
    """Profiler of batches in cycles of ``wait + warmup + active``, which writes a trace for each.

    ``ProfilerHook`` and ``TimelineProfiler`` tell it when a batch ends.

    Args:
        wait: Batches of a cycle that are not profiled.
        warmup: Batches with the profiler on and nothing recorded.
        active: Batches recorded, the window.
        repeat: Number of cycles; 0 means until ``finish``.
        output_dir: Folder of the traces; created if missing.

    Attributes:
        prof: The newest ``torch.profiler.profile``; None before the first window.
        paths: Files written, in order.
        has_begun: Whether ``begin`` was called, and ``finish`` was not since.

    Raises:
        TypeError: A number is not an int.
        ValueError: ``active`` is below 1, or another is negative.

    Example:
        >>> timeline = Timeline(1, 28, 2, 1, "timeline")
        >>> timeline.begin(step=0)
        >>> timeline.advance(1)
        >>> timeline.finish()
        >>> timeline.paths
        []
    """

    def __init__(
        self, wait: int, warmup: int, active: int, repeat: int, output_dir: str | os.PathLike[str]
    ) -> None:
        self.wait = check_int("wait", wait, least=0)
        self.warmup = check_int("warmup", warmup, least=0)
        self.active = check_int("active", active, least=1)
        self.repeat = check_int("repeat", repeat, least=0)
        self.output_dir = os.fspath(output_dir)
        self.prof: torch.profiler.profile | None = None
        self.paths: list[str] = []
        self.has_begun = False
        self._cycle = 0
        self._position = 0  # batches done in this cycle
        self._running = False  # prof is started
        self._step = 0  # batches done in all
        self._rank: int | None = None
        self._on_open: Callable[[], None] = _nothing
        self._on_close: Callable[[], None] = _nothing

    def __getstate__(self) -> dict[str, Any]:
        # A torch profiler can be neither pickled nor copied.
        of_run = {"prof": None, "_running": False, "_on_open": _nothing, "_on_close": _nothing}
        return {**vars(self), **of_run}

    @property
    def is_finished(self) -> bool:
        """Whether all cycles are done."""
        return self.repeat != 0 and self._cycle == self.repeat

    @property
    def step(self) -> int:
        """Batches done in all."""
        return self._step

    def forget(self) -> None:
        """Drop the profiler and the paths of a finished run."""
        self.prof, self.paths = None, []

    def begin(
        self,
        step: int,
        rank: int | None = None,
        on_open: Callable[[], None] = _nothing,
        on_close: Callable[[], None] = _nothing,
    ) -> None:
        """Begin the first cycle.

        Args:
            step: Batches done before.
            rank: Part of the traces' names; None where there is one rank.
            on_open: Called when a window is open, before each of its batches.
            on_close: Called before a window closes, and may be called without one: end the regions
                that ``on_open`` began.
        """
        self._rank, self._on_open, self._on_close = rank, on_open, on_close
        self.has_begun = True
        self._cycle = self._position = 0
        self._step = step
        self._update()

    def advance(self, step: int) -> None:
        """Count a batch, and start, step or stop the profiler where that is due.

        Args:
            step: Batches done, this one included.
        """
        if self.is_finished:
            return
        self._step = step
        self._position += 1
        if self._position < self.wait + self.warmup and self._position != self.wait:
            return
        closes = self._position == self.wait + self.warmup + self.active
        if self._running and self._position >= self.wait + self.warmup:
            assert self.prof is not None
            if closes:
                self._on_close()
                end_open_regions()
            self.prof.step()  # opens the window, or writes the trace when it closes
        if closes:
            self._stop()
            self._cycle += 1
            self._position = 0
        self._update()

    def finish(self) -> None:
        """Write the trace of an open window, and stop the profiler; may be called again."""
        self.has_begun = False
        self._on_close()
        self._stop()

    def _update(self) -> None:
        """Start a profiler when the wait is over; tell whether a window is open."""
        if not self._running and not self.is_finished and self._position == self.wait:
            if torch._C._autograd._profiler_enabled():  # torch would end that one without a word
                _log.warning("Not profiled at step %d: another profiler of torch runs", self._step)
            else:
                self._start()
        if self._running and self.prof is not None and self.prof.current_action in _RECORDING:
            self._on_open()
        else:
            self._on_close()

    def _start(self) -> None:
        """Start a profiler of one cycle.

        Each cycle has its own profiler: torch warns when a profiler begins its second cycle. The
        whole warm-up is one step of torch's, since each step costs and only the last has an effect.
        """
        rank = "" if self._rank is None else f"-rank{self._rank}"

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

    def _write(self, prof: torch.profiler.profile, name: str) -> None:
        folder = Path(self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path, unfinished = folder / name, folder / f".{name}.part"
        if self._position <= self.wait + self.warmup and str(path) in self.paths:
            return  # a window without a batch, which opened where the last one closed
        prof.export_chrome_trace(str(unfinished))
        unfinished.replace(path)
        if str(path) not in self.paths:
            self.paths.append(str(path))
        _log.info("Wrote the trace %s", path)


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
