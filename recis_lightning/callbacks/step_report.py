"""Report of where the time of a step goes, and how much of the machine it uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from lightning.pytorch import Trainer
from torch.utils._python_dispatch import _get_current_dispatch_mode

from recis_lightning.callbacks.save_interception import intercept_saves, release_saves
from recis_lightning.callbacks.step_phases import StepPhases, StepSample
from recis_lightning.distributed import collectives
from recis_lightning.monitoring.device_rates import copy_rate, peak_tflops
from recis_lightning.monitoring.flop_count import FlopCount
from recis_lightning.monitoring.phases import PHASES
from recis_lightning.table.hash_table import HashTable

__all__ = ["StepReport"]

_TABLE_PHASES = ("lookup", "table_step")


@final
class StepReport:
    """Phases of the batches before each report, and FLOPs of a run's first batch.

    ``MetricReportHook`` tells it of batches. The batches measured before a report are as many as
    gradients accumulate over, so that a step is among them.

    Args:
        interval: Training batches between reports.
        tflops_peak: Of a device, in TFLOP/s; None: that of common GPUs.
    """

    def __init__(self, interval: int, tflops_peak: float | None) -> None:
        self._interval, self._given_peak = interval, tflops_peak
        self._phases = StepPhases()
        self._flop_count = FlopCount()
        self._sample: StepSample | None = None
        self._flops: float = math.nan  # of a batch
        self._peak: float | None = None
        self._copy_rate = math.nan
        self._own_key = ""

    @property
    def is_measuring(self) -> bool:
        """Whether phases are measured now."""
        return self._phases.is_running

    @property
    def counts_flops(self) -> bool:
        """Whether the next batch is the one whose operations are counted."""
        return math.isnan(self._flops)

    def start_run(self, trainer: Any, own_key: str, tables: Sequence[HashTable]) -> None:
        """Prepare for a run.

        Args:
            trainer: The Trainer.
            own_key: ``state_key`` of the callback, whose own time belongs to no phase.
            tables: Those of the model.
        """
        device = tables[0].device if tables else trainer.strategy.root_device
        self._own_key = own_key
        self._sample, self._flops = None, math.nan
        self._copy_rate = copy_rate(device)
        self._peak = self._given_peak or _peak_of(trainer)
        intercept_saves(trainer, self._phases.pause_during)

    def end_run(self, trainer: Trainer) -> None:
        """Listen no more."""
        self._flop_count.stop()
        self._phases.cancel()
        release_saves(trainer, self._phases.pause_during)

    def start_epoch(self, trainer: Trainer, num_batches: int) -> None:
        """Note that an epoch starts.

        Args:
            trainer: The Trainer.
            num_batches: Training batches done.
        """
        self._flop_count.stop()
        self._phases.resume()
        self.start_if_due(trainer, num_batches)

    def start_batch(self) -> None:
        """Count the operations of the batch that starts."""
        self._flop_count.stop()  # of a batch that was skipped
        if self.counts_flops and _get_current_dispatch_mode() is None:  # else in a later batch
            self._flop_count.start()

    def end_batch(self) -> None:
        """Note that a batch ends."""
        flops = self._flop_count.stop()
        if flops is not None:
            self._flops = flops
        if self.is_measuring:
            self._sample = self._phases.end_batch()

    def start_if_due(self, trainer: Trainer, num_batches: int) -> None:
        """Measure from now on, if the batches up to the next report are those to measure.

        Args:
            trainer: The Trainer.
            num_batches: Training batches done.
        """
        wanted = min(max(trainer.accumulate_grad_batches, 1), self._interval)
        is_due = (num_batches + wanted) % self._interval == 0 or wanted == self._interval
        if is_due and not self.is_measuring and not self.counts_flops:
            self._sample = None
            self._phases.begin(trainer, wanted, self._own_key)

    def begin_backward(self) -> None:
        """Note that a backward pass begins."""
        self._phases.begin_backward()

    def end_backward(self) -> None:
        """Note that a backward pass has ended."""
        self._phases.end_backward()

    def pause(self) -> None:
        """Note that an epoch ends, or validation starts, which began when the last batch ended."""
        self._flop_count.stop()
        self._phases.pause(at_last=True)

    def resume(self) -> None:
        """Note that validation has ended."""
        self._phases.resume()

    def report(self, batches_per_sec: float) -> dict[str, float]:
        """Return the figures of the batches measured, over all ranks, and measure no more.

        A collective operation. Of times and operations the ranks' mean, of bytes their sum.

        Args:
            batches_per_sec: Over the whole interval; NaN if it is not known.
        """
        self._phases.cancel()
        sample, self._sample = self._sample, None
        ranks = collectives.gather_numbers([*_numbers(sample), self._flops, self._copy_rate])
        *seconds, total, exchanged, moved, flops, rate = map(_mean, zip(*ranks, strict=True))
        figures: dict[str, float] = {}
        if not math.isnan(total):
            by_phase = dict(zip(PHASES, seconds, strict=True))
            figures |= {f"step/{phase}_ms": 1e3 * spent for phase, spent in by_phase.items()}
            figures["step/total_ms"] = 1e3 * total
            figures["step/exchanged_bytes"] = exchanged * len(ranks)
            figures["step/table_bytes"] = moved * len(ranks)
            spent = sum(by_phase[phase] for phase in _TABLE_PHASES)
            if spent > 0 and moved:
                figures["step/table_gb_per_sec"] = moved / spent / 1e9
                figures["step/bandwidth_utilisation"] = moved / spent / rate
        if not math.isnan(flops):
            figures["step/dense_flops"] = flops
            if math.isfinite(batches_per_sec):
                figures["step/dense_tflops"] = flops * batches_per_sec / 1e12
                if self._peak is not None:
                    figures["step/mfu"] = flops * batches_per_sec / (1e12 * self._peak)
        return figures


def _numbers(sample: StepSample | None) -> list[float]:
    """Return the numbers of a batch: seconds by phase and in total, bytes; NaN without a sample."""
    if sample is None:
        return [math.nan] * (len(PHASES) + 3)
    numbers = [sample.seconds[phase] for phase in PHASES]
    numbers += [sample.total, sample.exchanged_bytes, sample.table_bytes]
    return [number / sample.num_batches for number in numbers]


def _mean(numbers: Sequence[float]) -> float:
    known = [number for number in numbers if not math.isnan(number)]
    return sum(known) / len(known) if known else math.nan


def _peak_of(trainer: Any) -> float | None:
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return peak_tflops(torch.cuda.get_device_name(device), str(trainer.precision), tf32)
