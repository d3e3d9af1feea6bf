"""Measurement of the phases of a Trainer's batches: its regions, our ops and optimizers' steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from recis_lightning.callbacks.profiler_regions import listen_to_regions, stop_listening
from recis_lightning.monitoring.phases import Frame, PhaseClock
from recis_lightning.ops import backend
from recis_lightning.optim.sparse_optimizer import SparseOptimizer

__all__ = ["StepPhases", "StepSample"]

_DATA = (
    ".train_dataloader_next",
    ".batch_to_device",
    "_batch_transfer",
    ".transfer_batch_to_device",
)
# Of an epoch. Validation is left out as a whole.
_NO_STEP = (".on_train_epoch_start", ".on_train_epoch_end")
_EXCHANGES = ("recis::all_to_all", "recis::all_reduce", "recis::exchange_heads")


class StepSample(NamedTuple):
    """Measurement of some batches.

    Attributes:
        num_batches: How many.
        seconds: By phase, of all of them.
        total: Seconds of all of them.
        exchanged_bytes: That this rank sent to others.
        table_bytes: That ops of tables moved in memory.
    """

    num_batches: int
    seconds: dict[str, float]
    total: float
    exchanged_bytes: int
    table_bytes: int


@final
class StepPhases:
    """Phases of consecutive training batches, each from the end of the one before.

    While it measures, it listens to the Trainer's regions, to our ops and to optimizers, and waits
    for the device between phases; otherwise it costs nothing. What runs on other threads counts to
    the phase of the thread that trains.
    """

    def __init__(self) -> None:
        self._own = ""  # start of the names of regions that belong to no phase
        self._trainer: Any = None  # of a measurement
        self._clock = PhaseClock()
        self._thread: int | None = None
        self._regions: list[tuple[str, Frame | None]] = []
        self._ops: list[Frame | None] = []
        self._steps: list[tuple[int, Frame]] = []
        self._backward: Frame | None = None
        self._handles: list[Any] = []
        self._wanted = self._num_batches = 0
        self._exchanged_bytes = self._table_bytes = 0

    @property
    def is_running(self) -> bool:
        """Whether it measures."""
        return self._trainer is not None

    def begin(self, trainer: Any, num_batches: int, own_key: str) -> None:
        """Begin to measure.

        Args:
            trainer: The Trainer.
            num_batches: Batches to measure.
            own_key: ``state_key`` of the callback that measures, whose time belongs to no phase.
        """
        self.cancel()
        self._own = f"[Callback]{own_key}."
        device = trainer.strategy.root_device
        wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
        self._trainer, self._clock = trainer, PhaseClock(wait)
        self._thread, self._wanted = threading.get_ident(), num_batches
        self._regions, self._ops, self._steps, self._backward = [], [], [], None
        listen_to_regions(trainer, self)
        backend.add_meter(self)
        self._handles = [
            register_optimizer_step_pre_hook(self._begin_step),
            register_optimizer_step_post_hook(self._end_step),
        ]
        self._num_batches = self._exchanged_bytes = self._table_bytes = 0
        self._clock.start()

    def end_batch(self) -> StepSample | None:
        """Note that a batch ends; return the measurement if it is complete."""
        self._num_batches += 1
        sample = self._num_batches, *self._clock.stop(), self._exchanged_bytes, self._table_bytes
        return StepSample(*sample) if self._num_batches == self._wanted else None

    def cancel(self) -> None:
        """Stop listening, whatever is open."""
        if self._trainer is not None:
            stop_listening(self._trainer, self)
            backend.remove_meter(self)
            for handle in self._handles:
                handle.remove()
            self._trainer, self._handles = None, []

    def pause(self, at_last: bool = False) -> None:
        """Leave out what follows, or ``at_last`` what followed the last reading of the clock."""
        if self.is_running:
            self._clock.pause(at_last)

    def resume(self) -> None:
        """End a pause."""
        if self.is_running:
            self._clock.resume()

    def pause_during(self, save: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint, and leave out its time."""
        self.pause()
        try:
            save(*args, **kwargs)
        finally:
            self.resume()

    def begin_backward(self) -> None:
        """Note that a backward pass begins after the callback that calls this."""
        if self._is_mine():
            self._backward = self._clock.enter_outside("backward")

    def end_backward(self) -> None:
        """Note that a backward pass has ended."""
        if self._is_mine() and self._backward is not None:
            self._clock.leave(self._backward)
            self._backward = None

    def start(self, action_name: str) -> None:
        """Note that a region of the Trainer begins."""
        if self._is_mine():
            is_phase, phase = self._phase_of(action_name)
            self._regions.append((action_name, self._clock.enter(phase) if is_phase else None))

    def stop(self, action_name: str) -> None:
        """Note that a region of the Trainer ends."""
        if not self._is_mine():
            return
        for index in range(len(self._regions) - 1, -1, -1):
            if self._regions[index][0] == action_name:
                frame = self._regions.pop(index)[1]
                if frame is not None:
                    self._clock.leave(frame)
                break

    def close(self) -> None:
        """Listen to no more regions."""
        self.cancel()

    def begin_op(self, name: str) -> None:
        """Note that an op of ours begins."""
        if self._is_mine():
            phase = None
            if name in _EXCHANGES:
                phase = "exchange"
            elif name == "recis::lookup":
                phase = "lookup"
            elif name == "recis::send_gradients":
                phase = "table_step"
            self._ops.append(None if phase is None else self._clock.enter(phase))

    def end_op(self, name: str, num_bytes: int) -> None:
        """Note that an op of ours ends."""
        if self._is_mine() and self._ops:
            frame = self._ops.pop()
            if frame is not None:
                self._clock.leave(frame)
            if name in _EXCHANGES:
                self._exchanged_bytes += num_bytes
            else:
                self._table_bytes += num_bytes

    def _is_mine(self) -> bool:
        return self._trainer is not None and self._thread == threading.get_ident()

    def _phase_of(self, action: str) -> tuple[bool, str | None]:
        """Return whether a region of Lightning is a phase, and which; None: of no step."""
        if action.startswith(self._own) or action.endswith(_NO_STEP):
            return True, None
        if action.endswith(_DATA):
            return True, "data"
        if action.startswith("[Strategy]"):
            is_forward = action.endswith(".training_step")
            return is_forward, "dense_forward" if is_forward else None
        if action.endswith(".optimizer_zero_grad"):
            return True, "dense_step"
        if action.startswith("[Callback]"):
            return True, "hooks"
        is_module = action.startswith(("[LightningModule]", "[LightningDataModule]"))
        is_hook = is_module and action.rpartition(".")[2].startswith("on_")
        return is_hook, "hooks" if is_hook else None

    def _begin_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._is_mine():
            phase = "table_step" if isinstance(optimizer, SparseOptimizer) else "dense_step"
            self._steps.append((id(optimizer), self._clock.enter(phase)))

    def _end_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._is_mine():
            for index in range(len(self._steps) - 1, -1, -1):
                if self._steps[index][0] == id(optimizer):
                    self._clock.leave(self._steps.pop(index)[1])
                    break
