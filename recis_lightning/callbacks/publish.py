"""How hooks give numbers to a Trainer and its loggers: once each, and exactly."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor

__all__ = ["fetch", "logging_step", "publish", "publish_histogram", "publish_values"]


Made = dict[str, tuple[float, Tensor]]


def publish(
    trainer: Trainer,
    values: Mapping[str, float],
    prog_bar: bool = False,
    exact: bool = False,
    made: Made | None = None,
) -> None:
    """Put values where ``self.log`` puts them, and write them to every logger, once.

    ``self.log`` itself would have Lightning handle them after every batch (40 us, 1% of a step of
    the demo, and on a GPU a synchronisation each), write them again at each of its own logging
    steps until the epoch ends, not at all where the two intervals do not meet, and as float32: of
    16777217 rows it would see 16777216. Lightning's metrics are float32 here too unless ``exact``.

    Args:
        trainer: Whose metrics and loggers.
        values: Name -> number.
        prog_bar: Whether the progress bar shows them.
        exact: Whether metrics, and TensorBoard's scalars, have 64 bits; other loggers always get
            the numbers as they are.
        made: Each name's last number and its tensor, which serves until the number changes; kept by
            a caller with many names. A tensor costs more than the look whether it is needed.
    """
    if trainer.barebones:
        return
    if prog_bar:
        trainer.progress_bar_metrics.update(values)
    tensors = _tensors(
        values, torch.float64 if exact else torch.float32, {} if made is None else made
    )
    trainer.callback_metrics.update(tensors)
    trainer.logged_metrics.update(tensors)
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if exact and _is_tensorboard(logger):
            for name, value in values.items():
                logger.experiment.add_scalar(  # type: ignore[attr-defined]
                    _tag(logger, name),
                    value,
                    logging_step(trainer),
                    new_style=True,
                    double_precision=True,
                )
        else:
            logger.log_metrics(dict(values), step=logging_step(trainer))


def _tensors(values: Mapping[str, float], dtype: torch.dtype, made: Made) -> dict[str, Tensor]:
    changed = {name: v for name, v in values.items() if name not in made or made[name][0] != v}
    together = torch.from_numpy(np.array([*changed.values()], np.float64)).to(dtype)
    made.update(zip(changed, zip(changed.values(), together.unbind(), strict=True), strict=True))
    return {name: made[name][1] for name in values}


def publish_histogram(
    trainer: Trainer, name: str, edges: Sequence[float], counts: Sequence[int]
) -> None:
    """Write a histogram to every logger that shows histograms: TensorBoard.

    Args:
        trainer: Whose loggers.
        name: Of the histogram.
        edges: Ascending, one more than there are counts; the last may be infinite.
        counts: Values between an edge and the next.
    """
    total = sum(counts)
    if not trainer.is_global_zero or trainer.barebones or not total:
        return
    for logger in filter(_is_tensorboard, trainer.loggers):
        used = [number for number, count in enumerate(counts) if count]
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


def publish_values(trainer: Trainer, name: str, values: Tensor) -> None:
    """Write the distribution of values to every logger that shows histograms: TensorBoard."""
    if trainer.is_global_zero and not trainer.barebones:
        for logger in filter(_is_tensorboard, trainer.loggers):
            logger.experiment.add_histogram(  # type: ignore[attr-defined]
                _tag(logger, name), values, logging_step(trainer)
            )


def logging_step(trainer: Trainer) -> int:
    """Return Lightning's own x-axis: batches after which the optimizer stepped."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def fetch(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Bring one-element tensors to the host as numbers: one synchronisation for all."""
    scalars = {k: v for k, v in values.items() if isinstance(v, Tensor) and v.numel() == 1}
    away = [name for name, value in scalars.items() if value.device.type != "cpu"]
    if away:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        together = torch.stack([scalars[name].detach().reshape(()).to(dtype) for name in away])
        numbers: dict[str, Any] = dict(zip(away, together.tolist(), strict=True))
    else:
        numbers = {}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    for name, value in scalars.items():
        number = numbers[name] if name in numbers else value.item()
        numbers[name] = number if value.is_floating_point() else int(number)
    return {**values, **numbers}


def _is_tensorboard(logger: Logger) -> bool:
    """Whether a logger writes with torch's own SummaryWriter."""
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
