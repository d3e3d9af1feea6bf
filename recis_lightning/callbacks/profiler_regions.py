"""Regions of Lightning in torch's trace, none of which outlives the profiler that recorded it.

torch keeps a pointer into the profiler's memory with each open region. If the region ends under the
next profiler, that pointer is followed, and the heap is corrupted. So whoever stops a profiler ends
what is open first.
"""

from __future__ import annotations

import gc
import threading
from typing import Any, Protocol, final

from lightning.pytorch.profilers import Profiler
from torch.profiler import record_function
from typing_extensions import override

__all__ = [
    "OpenRegions",
    "RegionListener",
    "RegionRecorder",
    "end_open_regions",
    "listen_to_regions",
    "stop_listening",
]

# torch does not escape names in its JSON, and a callback's state_key may hold anything.
_UNSAFE = {ord('"'): "'", ord("\\"): "/", **dict.fromkeys(range(32), " ")}


class RegionListener(Protocol):
    """Follower of Lightning's regions."""

    def start(self, action_name: str) -> None:
        """Note that a region begins."""

    def stop(self, action_name: str) -> None:
        """Note that a region ends; it may have begun before this listened."""

    def close(self) -> None:
        """Listen no more."""


@final
class OpenRegions:
    """Regions of Lightning that are open in torch's trace, on the thread that made this.

    Lightning may enter or leave regions for longer than torch's profiler runs: once this is closed
    it does nothing.
    """

    def __init__(self) -> None:
        self._open: list[tuple[str, Any]] = []  # (action, region), the outermost first
        self._thread: int | None = threading.get_ident()  # torch's regions nest in a thread

    def start(self, action_name: str) -> None:
        """Begin a region."""
        if self._thread == threading.get_ident():
            region = record_function(action_name.translate(_UNSAFE))
            region.__enter__()
            self._open.append((action_name, region))

    def stop(self, action_name: str) -> None:
        """End the innermost region of that name, if there is one."""
        if self._thread == threading.get_ident():
            for index in range(len(self._open) - 1, -1, -1):
                if self._open[index][0] == action_name:
                    self._open.pop(index)[1].__exit__(None, None, None)
                    break

    def close(self) -> None:
        """End all open regions, the innermost first, and record no more."""
        self._thread = None
        while self._open:
            self._open.pop()[1].__exit__(None, None, None)


@final
class RegionRecorder(Profiler):
    """Profiler that tells listeners of Lightning's regions, and the Trainer's profiler.

    Once it is closed it does nothing but pass on to ``inner``.

    Args:
        inner: The Trainer's profiler.
        listener: The first listener; None: torch's trace.
    """

    def __init__(self, inner: Profiler, listener: RegionListener | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.listeners: list[RegionListener] = [OpenRegions() if listener is None else listener]

    @override
    def start(self, action_name: str) -> None:
        self.inner.start(action_name)
        for listener in tuple(self.listeners):
            listener.start(action_name)

    @override
    def stop(self, action_name: str) -> None:
        for listener in reversed(tuple(self.listeners)):
            listener.stop(action_name)
        self.inner.stop(action_name)

    def close(self) -> None:
        """End all open regions, the innermost first, and record no more."""
        listeners, self.listeners = self.listeners, []
        for listener in listeners:
            listener.close()


def listen_to_regions(trainer: Any, listener: RegionListener) -> None:
    """Tell a listener of the regions of a Trainer from now on, beside its profiler."""
    if isinstance(trainer.profiler, RegionRecorder):
        trainer.profiler.listeners.append(listener)
    else:
        trainer.profiler = RegionRecorder(trainer.profiler, listener)


def stop_listening(trainer: Any, listener: RegionListener) -> None:
    """Tell a listener no more, and give the Trainer its profiler back if nobody listens."""
    recorder = trainer.profiler
    if isinstance(recorder, RegionRecorder):
        recorder.listeners = [other for other in recorder.listeners if other is not listener]
        if not recorder.listeners:
            trainer.profiler = recorder.inner


def end_open_regions() -> None:
    """End every region of ``torch.profiler.record_function`` that anything in the process has open.

    To be called before a profiler stops. torch lists no open regions, so the collector is asked for
    all objects of the class: in one call, since the profiler records each. To end a region twice
    does nothing, so their owners may leave them as ever.
    """
    for part in gc.get_referrers(record_function):
        if type(part) is record_function and part.record is not None:
            record_function.__exit__(part, None, None, None)
