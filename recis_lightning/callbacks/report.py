"""``MetricReportHook``: eyes on every table while it trains."""

from __future__ import annotations

import logging
import math
import os
import time
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from recis_lightning.arguments import check_int
from recis_lightning.callbacks.hook import Hook, batches_done
from recis_lightning.callbacks.logger import loss_of
from recis_lightning.callbacks.publish import Made, fetch, publish, publish_histogram
from recis_lightning.callbacks.training_clock import TrainingClock
from recis_lightning.distributed import collectives
from recis_lightning.monitoring.history import RunHistory
from recis_lightning.monitoring.report import TableReport, check_path
from recis_lightning.monitoring.watch import TableFigures, TableWatch
from recis_lightning.table.hash_table import HashTable, hash_tables
from recis_lightning.table.scan import AGE_EDGES, NORM_EDGES

__all__ = ["MetricReportHook"]

_log = logging.getLogger(__name__)

_ON_NAN = ("warn", "raise", "evict")
_SHOWN_IDS = 10


class MetricReportHook(Hook):
    """Report what every table holds, and who comes and goes, every ``interval`` training batches.

    Loggers get, once for each report and as exact numbers, ``table/{name}/{figure}`` for each table
    and ``tables/{figure}`` for all of them over all ranks; ``recis_lightning.table_watch`` lists
    the figures. They are in ``trainer.callback_metrics`` too, as float64. TensorBoard also gets
    histograms of ages (steps since a row was seen) and of norms. ``train_qps`` is training batches
    a second, without validation and the writing of checkpoints; ``eval_qps`` batches of validation
    or test a second, at the end of each.

    A report reads all counters and surveys about ``survey_rows`` rows of one table, in turn, so
    that it costs the same however large tables are; the first report surveys as many of every
    table. If the loss is NaN or Inf, and when training ends, all rows are surveyed. Rows with NaN
    or Inf among weights or optimizer state are named in a warning (logger
    ``recis_lightning.callbacks.report``), stop training, or are removed, as ``on_nan`` says; a
    removed id starts from its initial row when it comes again.

    The history of all figures is part of Lightning's checkpoints, so that a report drawn after a
    resume shows the whole run. Tables with an eviction policy are made to track ids that come back
    (``HashTable.track_readmissions``). One hook per Trainer.

    Args:
        interval: Training batches between reports, at least 1.
        on_nan: "warn", "raise" or "evict".
        report: Where to write a ``TableReport`` when training ends or fails: a path that ends in
            ``.html`` or ``.png``; None writes none.
        survey_rows: Rows looked at in each report, at least 1.

    Attributes:
        watch: What reads the tables; its ``history`` holds what was read.

    Raises:
        TypeError, ValueError: An argument is not what it should be (names it).

    Example:
        >>> hook = MetricReportHook(interval=200, on_nan="raise", report="report.html")
        >>> hook.interval, len(hook.history)
        (200, 0)
    """

    def __init__(
        self,
        interval: int = 100,
        on_nan: Literal["warn", "raise", "evict"] = "warn",
        report: str | os.PathLike[str] | None = None,
        survey_rows: int = 1024,
    ) -> None:
        super().__init__()
        self.interval = check_int("interval", interval, least=1)
        if on_nan not in _ON_NAN:
            raise ValueError(f"on_nan: expected one of {_ON_NAN}, got {on_nan!r}")
        self.on_nan = on_nan
        self.report = None if report is None else os.fspath(check_path("report", report))
        self.watch = TableWatch([], check_int("survey_rows", survey_rows, least=1))
        self._clock = TrainingClock()
        self._resumed = False
        self._num_batches = self._first = self._window = 0
        self._eval_batches, self._eval_start = 0, 0.0
        self._made: Made = {}
        self._listen(False)

    @property
    def history(self) -> RunHistory:
        """What was reported so far."""
        return self.watch.history

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the tables and open the first window."""
        self._num_batches = self._first = self._window = batches_done(trainer)
        self.watch.watch(hash_tables(pl_module), resumed=self._resumed)
        self._resumed = False
        for table in self.watch.tables:
            if table.eviction is not None:
                table.track_readmissions()
        self._clock.start(trainer)
        self._arm()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the unique ids of the batch that will be reported."""
        self.watch.note_batch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; report when the window is full."""
        self._num_batches += 1
        since = self._num_batches % self.interval
        if since:
            self._clock.mark()
            if since + 1 < self.interval:
                return
        else:
            self._report(trainer, pl_module, outputs)
        self._arm()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the training clock, start that of evaluation."""
        self._clock.pause(at_mark=True)
        self._start_evaluation()

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Count the batch."""
        self._eval_batches += 1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report batches a second, and let the training clock go on."""
        self._end_evaluation(trainer)
        self._clock.resume()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of evaluation."""
        self._start_evaluation()

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Count the batch."""
        self._eval_batches += 1

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report batches a second."""
        self._end_evaluation(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at every row once more, and write the page."""
        self._listen(False)
        self._close(trainer)
        if self._num_batches > self._first:
            self._publish(trainer, self.watch.look(self._num_batches, full=True))
        self._write(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write the page of what was seen."""
        self._listen(False)
        self._close(trainer)
        try:
            self._write(trainer)
        except Exception:  # what stopped the run matters more
            _log.exception("Could not write %s", self.report)

    def state_dict(self) -> dict[str, Any]:
        """Return the history."""
        return {"history": self.history.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the history of a checkpoint."""
        self.history.load_state_dict(state_dict["history"])
        self._resumed = True

    def _listen(self, yes: bool) -> None:
        """Be called after the next backward pass, or not: a call by Lightning takes 12 us."""
        if yes:
            vars(self).pop("on_after_backward", None)
        else:
            vars(self)["on_after_backward"] = None

    def _arm(self) -> None:
        due = (self._num_batches + 1) % self.interval == 0
        self._listen(due)
        if due:
            self.watch.start_batch()

    def _close(self, trainer: Trainer) -> None:
        self._clock.stop(trainer)

    def _start_evaluation(self) -> None:
        self._eval_batches, self._eval_start = 0, time.perf_counter()

    def _end_evaluation(self, trainer: Trainer) -> None:
        seconds = time.perf_counter() - self._eval_start
        if trainer.sanity_checking or not self._eval_batches or seconds <= 0:
            return
        values = {"eval_qps": self._eval_batches / seconds}
        self.history.append(self._num_batches, values)
        publish(trainer, values, exact=True)

    def _report(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> None:
        device = trainer.strategy.root_device
        loss = fetch({"loss": loss_of(trainer, pl_module, outputs)}, device)["loss"]
        seconds = self._clock.lap()
        num_batches, self._window = self._num_batches - self._window, self._num_batches
        more = {"train_qps": num_batches / seconds} if seconds > 0 else {}
        ruined = loss is not None and not math.isfinite(loss)
        full = collectives.any_rank([ruined], device)[0]
        figures = self.watch.look(
            self._num_batches, more if loss is None else {**more, "loss": loss}, full
        )
        self._publish(trainer, figures, more)

    def _publish(
        self, trainer: Trainer, figures: TableFigures, more: dict[str, float] | None = None
    ) -> None:
        publish(trainer, {**figures.values, **(more or {})}, exact=True, made=self._made)
        for surveyed in figures.surveyed:
            for kind, edges in (("norms", NORM_EDGES), ("ages", AGE_EDGES)):
                name = f"table/{surveyed}/{kind}"
                if name in self.history.distributions:
                    publish_histogram(trainer, name, edges, self.history.distributions[name])
        for table in self.watch.tables:
            if figures.nonfinite.get(table.name):
                self._handle(table, figures.nonfinite[table.name])

    def _handle(self, table: HashTable, num_nonfinite: int) -> None:
        """Do as ``on_nan`` says; ``num_nonfinite`` rows were found on all ranks."""
        ids = self.watch.nonfinite_ids(table)
        shown = ids[:_SHOWN_IDS].tolist()
        what = (
            f"table {table.name!r} at step {self._num_batches}: {num_nonfinite} or more rows hold "
            f"NaN or Inf; on this rank {ids.numel()} of {len(table)}, ids {shown}"
            f"{', ...' if ids.numel() > _SHOWN_IDS else ''}"
        )
        if self.on_nan == "raise":
            raise RuntimeError(what)
        if self.on_nan == "evict":
            table.delete(ids)
            what += "; removed"
        if ids.numel():
            _log.warning("%s", what[0].upper() + what[1:])

    def _write(self, trainer: Trainer) -> None:
        if self.report is not None and trainer.is_global_zero and len(self.history):
            title = f"Tables of {type(trainer.lightning_module).__name__}"
            TableReport.of_watch(self.watch, title).write(self.report)
            _log.info("Wrote the report %s", self.report)
