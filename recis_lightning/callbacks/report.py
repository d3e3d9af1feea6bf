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

from recis_lightning.arguments import check_bool, check_bound, check_int, explain_arguments
from recis_lightning.callbacks.fit_checks import check_table_names
from recis_lightning.callbacks.hook import Hook, batches_done, is_new_trainer
from recis_lightning.callbacks.log_values import TensorCache, log_histogram, log_values, to_host
from recis_lightning.callbacks.logger import loss_of
from recis_lightning.callbacks.run_values import (
    learning_rates,
    settings_of,
    validation_metrics,
)
from recis_lightning.callbacks.step_report import StepReport
from recis_lightning.callbacks.training_clock import TrainingClock
from recis_lightning.close_names import did_you_mean
from recis_lightning.distributed import collectives
from recis_lightning.monitoring.history import RunHistory
from recis_lightning.monitoring.report import TableReport, check_path, costs_of
from recis_lightning.monitoring.run_facts import run_facts
from recis_lightning.monitoring.watch import FIGURES, TableFigures, TableMonitor
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.listing import hash_tables
from recis_lightning.table.scan import AGE_EDGES, NORM_EDGES

__all__ = ["MetricReportHook"]

_log = logging.getLogger(__name__)

# Few enough for a page of a logger: with all, seven tables make 124 charts.
DEFAULT_FIGURES = ("rows", "admitted", "evicted", "nonfinite_rows", "ages", "norms")
_HISTOGRAMS = ("ages", "norms")

# Methods that Lightning calls in some batches only.
_OCCASIONAL = ("on_train_batch_start", "on_before_backward", "on_after_backward")

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

    With ``phases`` the history and loggers get where the time of a step goes, as milliseconds a
    training batch: ``step/data_ms`` (waiting for data), ``lookup``, ``exchange`` (with other
    ranks), ``dense_forward``, ``backward``, ``dense_step``, ``table_step``, ``hooks`` (callbacks
    but this one, and the module's ``on_*``), ``other`` (the Trainer) and their sum ``total``. They
    are those of the batch before each report (with accumulated gradients of as many as these are
    of), without validation and the writing of checkpoints; beside a GPU that batch waits for the
    device at each change of phase. Also of these batches: ``step/exchanged_bytes``,
    ``step/table_bytes`` (that the tables' ops move in memory at least), ``step/table_gb_per_sec``
    and ``step/bandwidth_utilisation``, the share of the rate at which the machine copies memory,
    measured once. Of a run's first batch ``step/dense_flops``, by torch's ``FlopCounterMode``; with
    the batches a second of the interval ``step/dense_tflops``, and ``step/mfu`` where the device's
    peak is known. Of all ranks: the mean of times and FLOPs, the sum of bytes.

    Args:
        interval: Training batches between reports, at least 1.
        on_nan: "warn", "raise" or "evict".
        report: Path of the ``TableReport`` written when training ends or fails; ends in ``.html``
            or ``.png``. None writes no report.
        survey_rows: Rows scanned in each report, at least 1.
        figures: Figures that loggers get, of each table and of all; None gives them all. The
            history, and so the report, has all in any case. "ages" and "norms" are histograms.
        phases: Whether to measure where the time of a step goes.
        tflops_peak: What a device could do, in TFLOP/s, for ``step/mfu``; None: what data sheets
            say of common GPUs.

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
        phases: bool = False,
        tflops_peak: float | None = None,
    ) -> None:
        super().__init__()
        self.interval = check_int("interval", interval, least=1)
        if on_nan not in _ON_NAN:
            raise ValueError(f"on_nan: expected one of {_ON_NAN}, got {on_nan!r}")
        self.on_nan = on_nan
        self.report = None if report is None else os.fspath(check_path("report", report))
        self.figures = None if figures is None else _check_figures(figures)
        self.monitor = TableMonitor([], check_int("survey_rows", survey_rows, least=1))
        self.phases = check_bool("phases", phases)
        self.tflops_peak = None if tflops_peak is None else _check_peak(tflops_peak)
        self._steps = StepReport(self.interval, self.tflops_peak)
        self._clock = TrainingClock()
        self._resumed, self._saved_counts = False, dict[str, int]()
        self._num_batches = self._first = self._window = 0
        self._eval_batches, self._eval_start = 0, 0.0
        self._cache = TensorCache()
        self._let_call(False, *_OCCASIONAL)

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
            self._cache, self._resumed, self._saved_counts = TensorCache(), False, {}
            self._num_batches = self._first = self._window = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._num_batches = self._first = self._window = batches_done(trainer)
        self.monitor.watch(hash_tables(pl_module), self._resumed, self._saved_counts)
        self._resumed = False
        self.history.facts = run_facts(settings_of(trainer))
        for table in self.monitor.tables:
            if table.eviction is not None:
                table.track_readmissions()
        self._clock.start(trainer)
        if self.phases:
            self._steps.start_run(trainer, self.state_key, self.monitor.tables)
        self._prepare_next_batch()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.phases:
            self._steps.start_epoch(trainer, self._num_batches)
            self._prepare_next_batch()

    @override
    def on_train_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self._steps.pause()

    @override
    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._steps.start_batch()

    @override
    def on_before_backward(self, *args: Any, **kwargs: Any) -> None:
        self._steps.begin_backward()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps.end_backward()
        if self._is_due():
            self.monitor.note_batch()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._num_batches += 1
        if self.phases:
            self._steps.end_batch()
        since = self._num_batches % self.interval
        if since:
            self._clock.mark()
            if since + 1 < self.interval and not self.phases:
                return
        else:
            self._report(trainer, pl_module, outputs)
        if self.phases:
            self._steps.start_if_due(trainer, self._num_batches)
        self._prepare_next_batch()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.pause(at_mark=True)
        self._steps.pause()
        self._start_evaluation()

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._eval_batches += 1

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = validation_metrics(trainer)
        if metrics:
            self.history.append(self._num_batches, metrics)
        self._end_evaluation(trainer)
        self._steps.resume()
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
        self._let_call(False, *_OCCASIONAL)
        self._close(trainer)
        if self._num_batches > self._first:
            self._log(trainer, self.monitor.record(self._num_batches, full=True))
        self._write(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._let_call(False, *_OCCASIONAL)
        self._close(trainer)
        try:
            self._write(trainer)
        except Exception:  # the run's own exception matters more
            _log.exception("Could not write %s", self.report)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.state_dict(), "counts": self.monitor.counts()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history.load_state_dict(state_dict["history"])
        self._saved_counts = state_dict.get("counts", {})  # there were none in 0.1.0
        self._resumed = True

    def _let_call(self, wanted: bool, *methods: str) -> None:
        """Let Lightning call some methods of this hook only if that is wanted.

        Lightning spends 12 us on a call, and passes over a method that is None.
        """
        for method in methods:
            if wanted:
                vars(self).pop(method, None)
            else:
                vars(self)[method] = None

    def _is_due(self) -> bool:
        """Return whether the next batch will be reported."""
        return (self._num_batches + 1) % self.interval == 0

    def _prepare_next_batch(self) -> None:
        """Count the unique ids of the next batch, and note its phases, if they are reported."""
        due, measures = self._is_due(), self._steps.is_measuring
        self._let_call(due or measures, "on_after_backward")
        self._let_call(measures, "on_before_backward")
        self._let_call(self.phases and self._steps.counts_flops, "on_train_batch_start")
        if due:
            self.monitor.start_batch()

    def _close(self, trainer: Trainer) -> None:
        self._steps.end_run(trainer)
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
        if self.phases:
            more |= self._steps.report(more.get("train_qps", math.nan))
        nonfinite = loss is not None and not math.isfinite(loss)
        full = collectives.any_rank([nonfinite], device)[0]
        kept = {**more, **learning_rates(trainer)}
        if loss is not None:
            kept["loss"] = loss
        figures = self.monitor.record(self._num_batches, kept, full)
        if self.phases:
            of_batch = ("tables/ids", "tables/distinct_ids")
            more |= {name: figures.values[name] for name in of_batch if name in figures.values}
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
            TableReport.of_monitor(self.monitor, title, costs_of(trainer)).write(self.report)
            _log.info("Wrote the report %s", self.report)


def _check_peak(tflops_peak: float) -> float:
    """Return a peak in TFLOP/s, or raise."""
    check_bound("tflops_peak", tflops_peak)
    if not tflops_peak > 0:
        raise ValueError(f"tflops_peak: expected a number above 0 or None, got {tflops_peak!r}")
    return float(tflops_peak)


def _check_figures(figures: Sequence[str]) -> tuple[str, ...]:
    """Return names of figures, or raise if one is none."""
    known = (*FIGURES, *_HISTOGRAMS)
    if isinstance(figures, str) or not all(isinstance(figure, str) for figure in figures):
        raise TypeError(f"figures: expected a sequence of names or None, got {figures!r}")
    unknown = [figure for figure in figures if figure not in known]
    if unknown:
        advice = did_you_mean(unknown, known)
        raise ValueError(f"figures: expected some of {known}, got {unknown}{advice}")
    return tuple(figures)
