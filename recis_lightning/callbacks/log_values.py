"""Logging of numbers to a Trainer's metrics and loggers: each number once, and exactly."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor

__all__ = [
    "TensorCache",
    "log_distribution",
    "log_histogram",
    "log_values",
    "logging_step",
    "to_host",
    "write_values",
]


@final
class TensorCache:
    """Tensors of named numbers; a tensor is reused until its number changes.

    For callers that log many names again and again: most numbers stay the same from one report to
    the next, and to make a tensor costs more than to compare two numbers.

    Example:
        >>> cache = TensorCache()
        >>> first = cache.tensors({"rows": 3, "loss": 0.5}, torch.float64)
        >>> later = cache.tensors({"rows": 3, "loss": 0.25}, torch.float64)
        >>> later["rows"] is first["rows"], later["loss"]
        (True, tensor(0.2500, dtype=torch.float64))
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[float, Tensor]] = {}  # the last number and its tensor

    def tensors(self, values: Mapping[str, float], dtype: torch.dtype) -> dict[str, Tensor]:
        """Return a tensor for each number.

        Args:
            values: Name -> number.
            dtype: Of new tensors; the same in all calls.
        """
        entries = self._entries
        changed = {n: v for n, v in values.items() if n not in entries or entries[n][0] != v}
        new = torch.from_numpy(np.array([*changed.values()], np.float64)).to(dtype).unbind()
        entries.update(zip(changed, zip(changed.values(), new, strict=True), strict=True))
        return {name: entries[name][1] for name in values}


def log_values(
    trainer: Trainer,
    values: Mapping[str, float],
    exact: bool = False,
    cache: TensorCache | None = None,
) -> None:
    """Put values where ``self.log`` puts them, and write them to every logger, once.

    For what ``self.log`` would falsify or repeat: TensorBoard would get 16777216 for 16777217 rows,
    which float32 does not have; and Lightning would handle each name after every batch, write it
    again at each of its own logging steps until the epoch ends, and not at all where the two
    intervals do not meet. ``LoggerHook`` does use ``self.log``.

    Args:
        trainer: Owner of the metrics and loggers.
        values: Name -> number.
        exact: Whether metrics, and TensorBoard's scalars, have 64 bits; other loggers always get
            the numbers as they are.
        cache: Tensors of earlier calls with the same ``exact``; None: none.
    """
    if trainer.barebones:
        return
    cache = TensorCache() if cache is None else cache
    tensors = cache.tensors(values, torch.float64 if exact else torch.float32)
    trainer.callback_metrics.update(tensors)
    trainer.logged_metrics.update(tensors)
    write_values(trainer, values, logging_step(trainer), exact)


def write_values(
    trainer: Trainer, values: Mapping[str, float], step: int, exact: bool = False
) -> None:
    """Write values to every logger, with a step that may lie behind.

    Args:
        trainer: Owner of the loggers.
        values: Name -> number; without any, nothing is written.
        step: The loggers' x-axis (``logging_step``).
        exact: Whether TensorBoard's scalars have 64 bits.
    """
    if not trainer.is_global_zero or trainer.barebones or not values:
        return
    for logger in trainer.loggers:
        if exact and _is_tensorboard(logger):
            for name, value in values.items():
                logger.experiment.add_scalar(  # type: ignore[attr-defined]
                    _tag(logger, name), value, step, new_style=True, double_precision=True
                )
        else:
            logger.log_metrics(dict(values), step=step)


def log_histogram(
    trainer: Trainer, name: str, edges: Sequence[float], counts: Sequence[int]
) -> None:
    """Write a histogram to every logger that shows histograms: TensorBoard.

    Args:
        trainer: Owner of the loggers.
        name: Of the histogram.
        edges: Ascending, one more than there are counts; the last may be infinite.
        counts: Number of values between an edge and the next.
    """
    total = sum(counts)
    if not trainer.is_global_zero or trainer.barebones or not total:
        return
    for logger in filter(_is_tensorboard, trainer.loggers):
        used = [index for index, count in enumerate(counts) if count]
        first, last = used[0], used[-1] + 1
        limits = [min(edge, 2.0 * edges[-2]) for edge in edges[first + 1 : last + 1]]
        lowers, shown = edges[first:last], counts[first:last]
        middles = [(low + high) / 2 for low, high in zip(lowers, limits, strict=True)]
        logger.experiment.add_histogram_raw(  # type: ignore[attr-defined]
            _tag(logger, name),
            min=lowers[0],
            max=limits[-1],
            num=total,
            sum=sum(count * middle for count, middle in zip(shown, middles, strict=True)),
            sum_squares=sum(count * mid**2 for count, mid in zip(shown, middles, strict=True)),
            bucket_limits=limits,
            bucket_counts=list(shown),
            global_step=logging_step(trainer),
        )


def log_distribution(trainer: Trainer, name: str, values: Tensor) -> None:
    """Write the distribution of values to every logger that shows histograms: TensorBoard."""
    if trainer.is_global_zero and not trainer.barebones:
        for logger in filter(_is_tensorboard, trainer.loggers):
            logger.experiment.add_histogram(  # type: ignore[attr-defined]
                _tag(logger, name), values, logging_step(trainer)
            )


def logging_step(trainer: Trainer) -> int:
    """Return Lightning's own x-axis: batches after which the optimizer stepped."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def to_host(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return values with one-element tensors as numbers: one synchronisation for all of them.

    Args:
        values: Name -> tensor or anything else; all but one-element tensors are left as they are.
        device: The Trainer's; a CUDA device is synchronised even if no value lies on it.
    """
    scalars = {k: v for k, v in values.items() if isinstance(v, Tensor) and v.numel() == 1}
    on_device = [name for name, value in scalars.items() if value.device.type != "cpu"]
    if on_device:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        stacked = torch.stack([scalars[name].detach().reshape(()).to(dtype) for name in on_device])
        numbers: dict[str, Any] = dict(zip(on_device, stacked.tolist(), strict=True))
    else:
        numbers = {}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    for name, value in scalars.items():
        number = numbers[name] if name in numbers else value.item()
        numbers[name] = number if value.is_floating_point() else int(number)
    return {**values, **numbers}


def _is_tensorboard(logger: Logger) -> bool:
    """Return whether a logger writes with torch's own SummaryWriter."""
    return isinstance(logger, TensorBoardLogger) and isinstance(
        logger.experiment, _summary_writer()
    )


@functools.cache
def _summary_writer() -> type | tuple[()]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # Lightning writes with tensorboardX, which has no 64-bit scalars
        return ()
    return SummaryWriter


def _tag(logger: Any, name: str) -> str:
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}{name}" if logger._prefix else name
