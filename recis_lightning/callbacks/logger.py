"""``LoggerHook``: training progress every so many batches.

Its throughput leaves out the time of validation and of writing checkpoints.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast, final

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor
from typing_extensions import override

from recis_lightning.arguments import check_int, explain_arguments
from recis_lightning.callbacks.batch_size import batch_size_of
from recis_lightning.callbacks.hook import Hook, batches_done
from recis_lightning.callbacks.log_values import logging_step, to_host, write_values
from recis_lightning.callbacks.progress_line import LateWindow, is_number, line_of, shown
from recis_lightning.callbacks.training_clock import TrainingClock
from recis_lightning.distributed import collectives
from recis_lightning.metrics.background import BackgroundMetrics
from recis_lightning.metrics.values import registered_values

__all__ = ["LoggerHook", "loss_of"]

_log = logging.getLogger(__name__)

_SAMPLES = "samples of this window"


@explain_arguments()
class LoggerHook(Hook):
    """Report progress every ``log_step`` training batches.

    On rank 0, the logger ``recis_lightning.callbacks.logger`` gets a line at INFO::

        <gstep=100> <lstep=50> <qps=12.3400> <loss=0.123> <accuracy=0.95>

    ``gstep`` is ``trainer.global_step`` (optimizer steps), ``lstep`` the training batches done
    on this rank (resumed runs continue the count), ``qps`` the batches per second since the last
    line. Then come the loss that ``training_step`` returned, unless one is registered, and
    everything registered by ``add_metric`` under names of its own.

    ``qps``, ``samples_per_sec`` (of all ranks) and the numbers among the rest go through
    ``self.log(on_step=True, on_epoch=False, prog_bar=True)``, to the progress bar,
    ``trainer.callback_metrics`` and every logger, as float64: counts are exact to 2**53, save in
    TensorBoard, which stores 32 bits. As with any such value, loggers get it at the Trainer's own
    logging steps. Each gets the newest whole window: the last ``log_step`` batches that ended
    together, even if they ended in the epoch before. So with ``log_every_n_steps`` above
    ``log_step`` some windows reach the line and the progress bar only, and below it a window is
    written several times; equal intervals write each window once. A loss that the module itself
    logs as ``"loss"`` is not logged again.

    Metrics that keep samples (AUROC without thresholds, ``GAUC``, rankings) take long to compute:
    a thread does that, from a snapshot of their states, while training goes on. The window's line
    waits for it, and loggers get the values once, with the window's own step. The progress bar and
    ``callback_metrics`` get them with the next window, or before a validation or the end of an
    epoch, whichever comes first: at the same batch on all ranks. By then the thread is waited for;
    an error of a metric is raised there at the latest. Metrics of constant size, metrics around
    other metrics, callables and numbers are computed in the training step.

    Time in validation, in the sanity check and in writing checkpoints is not counted. A device is
    synchronised at most once for each line. With several ranks, all must register the same
    ``torchmetrics``, which gather in the training step. The loss is the mean over the ranks that
    have one; other values are rank 0's.

    In a loop written by hand, call ``after_step(metrics, global_step)`` after each step; it
    computes all metrics itself.

    Args:
        log_step: Training batches between lines, at least 1.

    Raises:
        TypeError: ``log_step`` is not an int.
        ValueError: ``log_step`` is below 1.

    Example:
        >>> LoggerHook(log_step=50).log_step
        50
    """

    log: Callable[..., None]  # the module's; Lightning gives it to all callbacks

    # on_train_batch_end does the same under a Trainer.
    _self_called = frozenset({"after_step"})

    def __init__(self, log_step: int = 10) -> None:
        super().__init__()
        self.log_step = check_int("log_step", log_step, least=1)
        self._clock = TrainingClock()
        self._lstep = 0
        self._by_hand = False
        self._num_batches = 0  # in this window, as is the next
        self._num_samples: int | None = 0  # None: a batch of unknown size
        self._logged: dict[str, Tensor] = {}  # of the newest window, float64 []
        self._is_forgotten = False  # Lightning forgets all values when an epoch ends
        self._is_held = False  # Lightning goes through them after each batch
        self._released: dict[str, Any] = {}  # Lightning's own holders of what was taken from it
        self._waiting: LateWindow | None = None  # for its metrics
        self._arrived: dict[str, float] = {}  # computed by a thread, and not logged yet
        self._late: dict[str, Tensor] = {}  # the newest that are logged, float64 []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_waiting": None}  # a thread cannot be copied

    @override
    def after_step(self, metrics: Mapping[str, Any] | None, gstep: int | Tensor) -> None:
        """Count a step of a loop written by hand, and print a line if it is due.

        Time is counted from the first call on, so the first line's ``qps`` leaves one step out.

        Args:
            metrics: Name -> value, shown in the line before what ``add_metric`` registered; or
                None.
            gstep: The global step, an int or a tensor of one element.

        Raises:
            TypeError: ``metrics`` is neither a mapping nor None.
        """
        if metrics is not None and not isinstance(metrics, Mapping):
            raise TypeError(f"metrics: expected a dict or None, got {type(metrics).__name__}")
        if not self._by_hand:
            self._by_hand, self._lstep, self._num_batches = True, 0, -1
            self._clock.start(None)
        self._lstep += 1
        self._num_batches += 1
        if self._lstep % self.log_step:
            self._clock.mark()
            return
        values = {**(metrics or {}), **registered_values(collectives.world_size())}
        values = shown(to_host(values, torch.device("cpu")))
        seconds = self._clock.lap()
        qps = self._num_batches / seconds if seconds > 0 else math.inf
        self._num_batches = 0
        if collectives.rank() == 0:
            _log.info("%s", line_of(int(gstep), self._lstep, qps, values))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._by_hand = False
        self._lstep = batches_done(trainer)
        self._num_batches = self._num_samples = 0
        self._logged, self._released = {}, {}
        self._waiting, self._arrived, self._late = None, {}, {}
        self._is_forgotten = self._is_held = False
        self._clock.start(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_forgotten = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._lstep += 1
        self._num_batches += 1
        if self._num_samples is not None:
            size = batch_size_of(batch)
            self._num_samples = None if size is None else self._num_samples + size
        if self._lstep % self.log_step:
            if self._is_forgotten or trainer._logger_connector.should_update_logs:
                self._log(trainer)
            elif self._is_held:
                self._is_held = False
                self._release(trainer, (*self._logged, *self._late))
            self._clock.mark()
        else:
            self._report(trainer, pl_module, outputs)
            self._num_batches = self._num_samples = 0
        if self._waiting is not None:
            if trainer.is_last_batch:
                self._settle(trainer)
            elif self._waiting.is_done:
                self._publish(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(trainer)
        self._clock.pause(at_mark=True)  # the time since the last batch set validation up

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.resume()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close(trainer)
        self._settle(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._close(trainer)
        try:
            self._publish(trainer)
        except Exception:  # the run's own exception matters more
            _log.exception("Could not compute the metrics of the last window")

    def _close(self, trainer: Trainer) -> None:
        self._clock.stop(trainer)

    def _report(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> None:
        self._publish(trainer)
        samples: Any = math.nan if self._num_samples is None else float(self._num_samples)
        loss = loss_of(trainer, pl_module, outputs)
        if trainer.world_size > 1:
            samples, loss = _over_ranks(trainer, samples, loss)
        values = registered_values(trainer.world_size, background=True)
        is_registered = "loss" in values
        if not is_registered:
            values = {"loss": loss, **values}
        on_host = to_host({**values, _SAMPLES: samples}, trainer.strategy.root_device)
        samples = on_host.pop(_SAMPLES)

        seconds = self._clock.lap()
        rates = {"qps": self._num_batches / seconds if seconds > 0 else math.inf}
        if not math.isnan(samples):
            rates["samples_per_sec"] = samples / seconds if seconds > 0 else math.inf
        values = shown(on_host)
        step, qps = trainer.global_step, rates["qps"]
        if any(isinstance(value, BackgroundMetrics) for value in values.values()):
            self._waiting = LateWindow(step, self._lstep, logging_step(trainer), qps, {**values})
        elif trainer.is_global_zero:
            _log.info("%s", line_of(step, self._lstep, qps, values))
        if not is_registered and _module_logs(trainer, "loss"):
            values.pop("loss", None)
        numbers = rates | {k: v for k, v in values.items() if is_number(v)}
        late = {k: v for k, v in self._arrived.items() if k not in numbers}
        self._logged, self._late, self._arrived = _host_tensors(numbers), _host_tensors(late), {}
        self._log(trainer)

    def _publish(self, trainer: Trainer) -> None:
        """Wait for the window whose metrics a thread computes; give it to the line and loggers."""
        window, self._waiting = self._waiting, None
        if window is not None:
            line, self._arrived = window.finish()
            if trainer.is_global_zero:
                _log.info("%s", line)
            write_values(trainer, self._arrived, window.step)

    def _settle(self, trainer: Trainer) -> None:
        """Bring what a thread computes to where Lightning and callbacks read it, before they do."""
        self._publish(trainer)
        if not self._arrived or trainer.barebones:
            return
        self._release(trainer, self._arrived)  # it holds older values
        self._late, self._arrived = _host_tensors(self._arrived), {}
        trainer.callback_metrics.update(self._late)
        trainer.logged_metrics.update(self._late)
        numbers = {name: number.item() for name, number in self._late.items()}
        trainer.progress_bar_metrics.update(numbers)

    def _log(self, trainer: Trainer) -> None:
        """Log the newest window.

        The tensors are the host's, on a GPU too: to write them Lightning need not wait for it.
        """
        self._is_forgotten, self._is_held = False, True
        if not trainer.barebones:  # Lightning warns of what it does not log
            results = cast(Any, trainer._results)
            results.update(self._released)  # to make new ones takes 1 ms
            self._released = {}
            for name, number in self._logged.items():
                self._log_one(results, name, number)
            for name, number in self._late.items():  # loggers have it, with its own step
                self._log_one(results, name, number, logger=False)

    def _log_one(self, results: Any, name: str, number: Tensor, **kwargs: bool) -> None:
        key = f"on_train_batch_end.{name}"
        if key in results and results[key].meta.logger != kwargs.get("logger", True):
            del results[key]  # the metric of this name was another
        self.log(name, number, on_step=True, on_epoch=False, prog_bar=True, **kwargs)
        # Lightning asks it to move to the host, where it is, and it takes 0.3 ms to do so.
        if key in results:
            vars(results[key])["to"] = _stay

    def _release(self, trainer: Trainer, names: Iterable[str]) -> None:
        """Take values out of what Lightning goes through after each batch.

        It would handle each there, at 10 us, until the epoch ends. The progress bar and
        ``callback_metrics`` have them by now; before a logging step they are logged again.
        """
        results = cast(Any, trainer.fit_loop.epoch_loop._results)
        for name in names:
            key = f"on_train_batch_end.{name}"
            if key in results:
                self._released[key] = results.pop(key)


def _stay(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""


@final
class TqdmLoggingHandler(logging.Handler):
    """Handler that prints lines to stderr, above a live progress bar, unless others print them.

    So a plain script prints our INFO lines, as it prints Lightning's, and an application that
    configures logging, before or after the import, gets each line once, by its own handlers.
    """

    @override
    def emit(self, record: logging.LogRecord) -> None:
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(not isinstance(h, _SILENT_HANDLERS) for h in logger.handlers):
                return
            logger = logger.parent if logger.propagate else None
        try:
            Tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


_SILENT_HANDLERS = (TqdmLoggingHandler, logging.NullHandler)
AboveTheBar = TqdmLoggingHandler  # an alias


def loss_of(trainer: Trainer, pl_module: LightningModule, outputs: Any) -> Tensor | None:
    """Return the loss as ``training_step`` returned it."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return None
    # Lightning divides it by the number of micro-batches.
    scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
    return loss.detach() * scale if scale != 1 else loss.detach()


def _over_ranks(trainer: Trainer, samples: float, loss: Tensor | None) -> tuple[Tensor, Any]:
    """Return the sum of the ranks' samples and the mean loss of those that have one.

    One all-reduce for both.
    """
    device = trainer.strategy.root_device
    own = torch.tensor([samples, 0, loss is not None], dtype=torch.float64, device=device)
    if loss is not None:
        own[1] = loss.reshape(()).to(device)
    total: Any = trainer.strategy.reduce(own, reduce_op="sum")
    return total[0], None if loss is None else total[1] / total[2]


def _module_logs(trainer: Trainer, name: str) -> bool:
    return f"training_step.{name}" in (trainer._results or ())


def _host_tensors(numbers: Mapping[str, float]) -> dict[str, Tensor]:
    return {k: torch.tensor(v, dtype=torch.float64, device="cpu") for k, v in numbers.items()}
