"""Values of ``add_metric``, computed, or begun by a thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchmetrics import Metric, MetricCollection

from recis_lightning.metrics.background import (
    BackgroundMetrics,
    fill_without_samples,
    is_costly,
    take_snapshot,
)
from recis_lightning.metrics.registry import get_metrics

__all__ = ["by_member", "registered_values"]


def registered_values(world_size: int, background: bool = False) -> dict[str, Any]:
    """Return the values of ``add_metric``, computed; a collection gives one for each member.

    Args:
        world_size: Number of ranks; those with several must call this together.
        background: Whether costly metrics are left to a thread. Its ``BackgroundMetrics`` is then
            at each of their names.
    """
    registry = get_metrics()
    results: dict[str, Any] = {}
    late: dict[str, Metric | MetricCollection] = {}
    # Sorted by name, since ranks must gather in one order.
    metrics = {
        k: v for k, v in sorted(registry.items()) if isinstance(v, Metric | MetricCollection)
    }
    if world_size > 1 and metrics:
        fill_without_samples(metrics.values())
    for name, metric in metrics.items():
        if world_size == 1 and not _has_samples(metric):
            results[name] = None  # with several ranks, another may have some
        elif background and is_costly(metric):
            late[name] = take_snapshot(metric)
        else:
            results[name] = metric.compute()
    if late:
        results.update(dict.fromkeys(late, BackgroundMetrics(late)))
    values: dict[str, Any] = {}
    for name, value in registry.items():
        if name in results:
            value = results[name]
        elif callable(value):
            value = value()
        values.update(by_member(name, value))
    return values


def by_member(name: str, value: Any) -> dict[str, Any]:
    """Return a value by its name, or those of a dict by ``{name}_{key}``.

    Example:
        >>> by_member("both", {"sum": 3, "mean": 1.5})
        {'both_sum': 3, 'both_mean': 1.5}
    """
    if isinstance(value, Mapping):
        return {f"{name}_{key}": part for key, part in value.items()}
    return {name: value}


def _has_samples(metric: Metric | MetricCollection) -> bool:
    members = metric.values(copy_state=False) if isinstance(metric, MetricCollection) else [metric]
    return any(member.update_called for member in members)
