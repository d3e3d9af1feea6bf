"""``MetricReportHook``: monitoring of tables during training."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from recis_lightning.arguments import check_int, explain_arguments
from recis_lightning.callbacks.fit_checks import check_table_names
from recis_lightning.callbacks.hook import Hook, batches_done, is_new_trainer
from recis_lightning.callbacks.log_values import TensorCache, log_histogram, log_values, to_host
from recis_lightning.callbacks.logger import loss_of
from recis_lightning.callbacks.training_clock import TrainingClock
from recis_lightning.distributed import collectives
from recis_lightning.monitoring.history import RunHistory
from recis_lightning.monitoring.report import TableReport, check_path
from recis_lightning.monitoring.watch import FIGURES, TableFigures, TableMonitor
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.listing import hash_tables
from recis_lightning.table.scan import AGE_EDGES, NORM_EDGES

__all__ = ["MetricReportHook"]

_log = logging.getLogger(__name__)

# Few enough for a page of a logger: with all, seven tables make 124 charts.
DEFAULT_FIGURES = ("rows", "admitted", "evicted", "nonfinite_rows", "ages", "norms")
_HISTOGRAMS = ("ages", "norms")

_ON_NAN = ("warn", "raise", "evict")
_SHOWN_IDS = 10


@explain_arguments()
class MetricReportHook(Hook):
    """Report size and turnover of every table, every ``interval`` training batches.

    Loggers get, once for each report and as exact numbers, ``table/{name}/{figure}`` for each table
    and ``tables/{figure}`` for all of them over all ranks, of the ``figures`` chosen;
    ``TableMonitor`` of ``recis_lightning.monitoring`` lists those there are. They are in
    ``trainer.callback_metrics`` too, as float64. TensorBoard also gets histograms of ages (steps
    since a row was last seen) and of norms. ``train_qps`` is training batches a second, without
    validation and the writing of checkpoints; ``eval_qps`` batches of validation or test a second,
    at the end of each.

    A report reads all counters and scans about ``survey_rows`` rows of one table, in turn, so that
    its cost does not depend on the size of tables; the first report scans as many of every table.
    If the loss is NaN or Inf, and when training ends, all rows are scanned. Rows with NaN or Inf
    among weights or optimizer state are named in a warning (logger
    ``recis_lightning.callbacks.report``), stop training, or are removed, by ``on_nan``; a removed
    id starts from its initial row when it comes again.

    The history of all figures is part of Lightning's checkpoints, so that a report drawn after a
    resume shows the whole run. Tables with an eviction policy are made to track ids that come back
    (``HashTable.track_readmissions``). One hook per Trainer.

    Args:
        interval: Training batches between reports, at least 1.
        on_nan: "warn", "raise" or "evict".
        report: Path of the ``TableReport`` written when training ends or fails; ends in ``.html``
            or ``.png``. None writes no report.
        survey_rows: Rows scanned in each report, at least 1.
        figures: Figures that loggers get, of each table and of all; None gives them all. The
            history, and so the report, has all in any case. "ages" and "norms" are histograms.

    Attributes:
        monitor: Reader of the tables, with the ``history`` of what it read; ``watch`` is an alias.

    Raises:
        TypeError, ValueError: An argument is of a wrong type or out of range; the error names it.

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
        figures: Sequence[str] | None = DEFAULT_FIGURES,
    ) -> None:
        super().__init__()
        self.interval = check_int("interval", interval, least=1)
        if on_nan not in _ON_NAN:
            raise ValueError(f"on_nan: expected one of {_ON_NAN}, got {on_nan!r}")
        self.on_nan = on_nan
        self.report = None if report is None else os.fspath(check_path("report", report))
        self.figures = None if figures is None else _check_figures(figures)
        self.monitor = TableMonitor([], check_int("survey_rows", survey_rows, least=1))
        self._clock = TrainingClock()
        self._resumed = False
        self._num_batches = self._first = self._window = 0
        self._eval_batches, self._eval_start = 0, 0.0
        self._cache = TensorCache()
        self._call_after_backward(False)

    @property
    def watch(self) -> TableMonitor:
        """Alias of ``monitor``."""
        return self.monitor

    @property
    def history(self) -> RunHistory:
        """Figures reported so far."""
        return self.monitor.history

    def idle_reason(self, tables: Sequence[HashTable]) -> str | None:
        """Return why there is nothing to do for a module's tables; None if there is something."""
        return None if tables else "the module has no tables"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the tables' names, and start anew in another Trainer.

        Raises:
            ValueError: Two tables have the same name.
        """
        check_table_names("MetricReportHook", hash_tables(pl_module))
        if stage == "fit" and is_new_trainer(self, trainer):
            self.monitor = TableMonitor([], self.monitor.survey_rows)
            self._cache, self._resumed = TensorCache(), False
            self._num_batches = self._first = self._window = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._num_batches = self._first = self._window = batches_done(trainer)
        self.monitor.watch(hash_tables(pl_module), resumed=self._resumed)
        self._resumed = False
        for table in self.monitor.tables:
            if table.eviction is not None:
                table.track_readmissions()
        self._clock.start(trainer)
        self._prepare_next_batch()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.monitor.note_batch()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._num_batches += 1
        since = self._num_batches % self.interval
        if since:
            self._clock.mark()
            if since + 1 < self.interval:
                return
        else:
            self._report(trainer, pl_module, outputs)
        self._prepare_next_batch()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.pause(at_mark=True)
        self._start_evaluation()

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._eval_batches += 1

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_evaluation(trainer)
        self._clock.resume()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_evaluation()

    @override
    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._eval_batches += 1

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_evaluation(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._call_after_backward(False)
        self._close(trainer)
        if self._num_batches > self._first:
            self._log(trainer, self.monitor.record(self._num_batches, full=True))
        self._write(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._call_after_backward(False)
        self._close(trainer)
        try:
            self._write(trainer)
        except Exception:  # the run's own exception matters more
            _log.exception("Could not write %s", self.report)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history.load_state_dict(state_dict["history"])
        self._resumed = True

    def _call_after_backward(self, wanted: bool) -> None:
        """Let Lightning call this hook after the next backward pass only if it is wanted.

        Lightning spends 12 us on the call, and passes over a method that is None.
        """
        if wanted:
            vars(self).pop("on_after_backward", None)
        else:
            vars(self)["on_after_backward"] = None

    def _prepare_next_batch(self) -> None:
        """Count the unique ids of the next batch, if that will be reported."""
        due = (self._num_batches + 1) % self.interval == 0
        self._call_after_backward(due)
        if due:
            self.monitor.start_batch()

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
        log_values(trainer, values, exact=True)

    def _report(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> None:
        device = trainer.strategy.root_device
        loss = to_host({"loss": loss_of(trainer, pl_module, outputs)}, device)["loss"]
        seconds = self._clock.lap()
        num_batches, self._window = self._num_batches - self._window, self._num_batches
        more = {"train_qps": num_batches / seconds} if seconds > 0 else {}
        nonfinite = loss is not None and not math.isfinite(loss)
        full = collectives.any_rank([nonfinite], device)[0]
        figures = self.monitor.record(
            self._num_batches, more if loss is None else {**more, "loss": loss}, full
        )
        self._log(trainer, figures, more)

    def _log(
        self, trainer: Trainer, figures: TableFigures, more: dict[str, float] | None = None
    ) -> None:
        logged = {**self._chosen(figures.values), **(more or {})}
        log_values(trainer, logged, exact=True, cache=self._cache)
        for table_name in figures.surveyed:
            for kind, edges in (("norms", NORM_EDGES), ("ages", AGE_EDGES)):
                name = f"table/{table_name}/{kind}"
                if name in self.history.distributions and self._logs(kind):
                    log_histogram(trainer, name, edges, self.history.distributions[name])
        for table in self.monitor.tables:
            if figures.nonfinite.get(table.name):
                self._handle_nonfinite(table, figures.nonfinite[table.name])

    def _logs(self, figure: str) -> bool:
        return self.figures is None or figure in self.figures

    def _chosen(self, values: dict[str, float]) -> dict[str, float]:
        """Return the values of the figures that loggers get."""
        if self.figures is None:
            return values
        return {name: values[name] for name in values if name.rpartition("/")[2] in self.figures}

    def _handle_nonfinite(self, table: HashTable, num_nonfinite: int) -> None:
        """Warn of non-finite rows, raise or remove them, by ``on_nan``.

        Args:
            table: Their table.
            num_nonfinite: Number of them that the scan found on all ranks.
        """
        ids = self.monitor.nonfinite_ids(table)
        shown = ids[:_SHOWN_IDS].tolist()
        message = (
            f"table {table.name!r} at step {self._num_batches}: {num_nonfinite} or more rows hold "
            f"NaN or Inf; on this rank {ids.numel()} of {len(table)}, ids {shown}"
            f"{', ...' if ids.numel() > _SHOWN_IDS else ''}"
        )
        if self.on_nan == "raise":
            raise RuntimeError(message)
        if self.on_nan == "evict":
            table.delete(ids)
            message += "; removed"
        if ids.numel():
            _log.warning("%s", message[0].upper() + message[1:])

    def _write(self, trainer: Trainer) -> None:
        if self.report is not None and trainer.is_global_zero and len(self.history):
            title = f"Tables of {type(trainer.lightning_module).__name__}"
            TableReport.of_monitor(self.monitor, title).write(self.report)
            _log.info("Wrote the report %s", self.report)


def _check_figures(figures: Sequence[str]) -> tuple[str, ...]:
    """Return names of figures, or raise if one is none."""
    known = (*FIGURES, *_HISTOGRAMS)
    if isinstance(figures, str) or not all(isinstance(figure, str) for figure in figures):
        raise TypeError(f"figures: expected a sequence of names or None, got {figures!r}")
    unknown = [figure for figure in figures if figure not in known]
    if unknown:
        raise ValueError(f"figures: expected some of {known}, got {unknown}")
    return tuple(figures)
