"""Values of a run that its page shows beside those of tables: settings, rates and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from recis_lightning.callbacks.log_values import to_host

__all__ = ["learning_rates", "settings_of", "validation_metrics"]

_MOST_METRICS = 24  # of one validation, on the page


def settings_of(trainer: Any) -> dict[str, Any]:
    """Return the settings of a run: the Trainer's main ones, and saved hyperparameters."""
    settings: dict[str, Any] = {
        "ranks": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "precision": trainer.precision,
        "max_epochs": trainer.max_epochs,
        "max_steps": None if trainer.max_steps == -1 else trainer.max_steps,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "model class": type(trainer.lightning_module).__name__,
    }
    for name, owner in (("model", trainer.lightning_module), ("data", trainer.datamodule)):
        hparams = getattr(owner, "hparams", None)
        if isinstance(hparams, Mapping) and hparams:
            settings[name] = dict(hparams)
    return settings


def learning_rates(trainer: Any) -> dict[str, float]:
    """Return ``lr/{optimizer}/{group}`` of every parameter group with a learning rate."""
    rates: dict[str, Any] = {}
    for number, optimizer in enumerate(trainer.optimizers):
        kind = type(optimizer).__name__
        owner = kind if len(trainer.optimizers) == 1 else f"{number} {kind}"
        groups = optimizer.param_groups
        for index, group in enumerate(groups):
            if "lr" in group:
                name = group.get("name", f"pg{index + 1}")
                rates[f"lr/{owner}" if len(groups) == 1 else f"lr/{owner}/{name}"] = group["lr"]
    on_host = to_host(rates, trainer.strategy.root_device)
    return {name: float(rate) for name, rate in on_host.items()}


def validation_metrics(trainer: Any) -> dict[str, float]:
    """Return ``validation/{name}`` of each number that a validation that ends has logged."""
    results = getattr(trainer, "_results", None)
    if results is None or trainer.sanity_checking:
        return {}
    logged = results.metrics(on_step=False)["callback"]
    scalars = {name: v for name, v in logged.items() if isinstance(v, Tensor) and v.numel() == 1}
    on_host = to_host(dict([*scalars.items()][:_MOST_METRICS]), trainer.strategy.root_device)
    return {f"validation/{name}": float(value) for name, value in on_host.items()}
