"""``MLTrackerHook``: values of ``add_to_ml_tracker``, written to the Trainer's loggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from recis_lightning.arguments import explain_arguments
from recis_lightning.callbacks.finished_batches import is_ending
from recis_lightning.callbacks.hook import Hook
from recis_lightning.callbacks.log_values import log_distribution, log_values, to_host
from recis_lightning.metrics import take_tracked

__all__ = ["MLTrackerHook"]


@explain_arguments()
class MLTrackerHook(Hook):
    """Write the values of ``add_to_ml_tracker(name, data)`` to the Trainer's loggers, on rank 0.

    RecIS's hook writes to a service of its own; this one writes to the Trainer's loggers: CSV,
    TensorBoard, W&B, MLflow. After each training batch every value added since the last is written
    once, under Lightning's own step; values added elsewhere are written when validation, test or
    training ends. A number, or a tensor of one element, is a scalar. Of more elements every logger
    gets ``{name}_mean``, ``_std``, ``_min`` and ``_max``, and TensorBoard a histogram.

    ``project``, ``name`` and ``config`` go to the loggers as hyperparameters (``tracker_project``,
    ``tracker_name`` and the keys of ``config``). A logger's own project and run name are arguments
    of the logger.

    Args:
        project: Name of the experiment, or None.
        name: Name of the run, or None.
        config: Hyperparameters, or None.

    Raises:
        TypeError: An argument is of a wrong type.

    Example:
        >>> hook = MLTrackerHook("ctr", "deepfm", {"lr": 5e-4})
        >>> hook.hyperparameters
        {'tracker_project': 'ctr', 'tracker_name': 'deepfm', 'lr': 0.0005}
    """

    def __init__(
        self,
        project: str | None = None,
        name: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for argument, value, kind in (
            ("project", project, str),
            ("name", name, str),
            ("config", config, Mapping),
        ):
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{argument}: expected {kind.__name__} or None, got {value!r}")
        given = {"tracker_project": project, "tracker_name": name}
        self.hyperparameters: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        self.hyperparameters |= config or {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reject a Trainer without loggers, which would lose the values.

        Raises:
            MisconfigurationException: The Trainer has no logger.
        """
        if not trainer.loggers and not trainer.barebones:
            raise MisconfigurationException(
                "MLTrackerHook writes to the Trainer's loggers, and this one has none; expected "
                "for example Trainer(logger=CSVLogger('outputs'))"
            )
        take_tracked()  # drops the values of an earlier run

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.hyperparameters and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_hyperparams(dict(self.hyperparameters))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        _write(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if is_ending(trainer):  # not trained again
            _write(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _write(trainer)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _write(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _write(trainer)


def _write(trainer: Trainer) -> None:
    tracked = take_tracked()
    if not tracked or trainer.barebones or trainer.sanity_checking or not trainer.is_global_zero:
        return
    scalars: dict[str, Any] = {}
    for name, value in tracked.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            numbers = value.detach().cpu().to(torch.float64).reshape(-1)
            if numbers.numel():
                log_distribution(trainer, name, numbers)
                scalars |= {
                    f"{name}_mean": numbers.mean(),
                    f"{name}_std": numbers.std(correction=0),
                }
                scalars |= {f"{name}_min": numbers.min(), f"{name}_max": numbers.max()}
        else:
            scalars[name] = value
    log_values(trainer, to_host(scalars, trainer.strategy.root_device))
