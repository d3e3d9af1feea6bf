"""Computation of metrics by a thread, from snapshots of their states."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, final

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from recis_lightning.distributed import collectives

__all__ = ["BackgroundMetrics", "fill_without_samples", "is_costly", "take_snapshot"]

AnyMetric: TypeAlias = Metric | MetricCollection


def is_costly(metric: AnyMetric) -> bool:
    """Return whether a metric keeps samples, so that the time to compute it grows with them.

    Such a metric has a list among its states: AUROC without thresholds, ``GAUC``, rankings. One
    that wraps other metrics is not counted: a snapshot of its own states would not be of theirs.

    Example:
        >>> from recis_lightning.metrics import GAUC, BinnedAUROC
        >>> is_costly(GAUC()), is_costly(BinnedAUROC())
        (True, False)
    """
    if isinstance(metric, MetricCollection):
        members = _members(metric)
        return any(map(is_costly, members)) and not any(map(_wraps, members))
    states = metric._defaults.values()
    return not _wraps(metric) and any(isinstance(state, list) for state in states)


def fill_without_samples(metrics: Iterable[AnyMetric]) -> None:
    """Let ranks whose metrics have no samples yet join those that have some; a collective.

    torchmetrics sends an empty float32 tensor for a rank without samples, and a rank with ids of
    samples sends int64: the message would end the process. Here the former gets an empty tensor
    of the latter's dtype.

    Args:
        metrics: The same on all ranks, in the same order.
    """
    states = [
        (member, name)
        for metric in metrics
        for member in _members(metric)
        for name, default in member._defaults.items()
        if isinstance(default, list)
    ]
    own = [_kind_of(getattr(member, name)) for member, name in states]
    ranks = collectives.gather(own)
    for index, (member, name) in enumerate(states):
        found = next((kinds[index] for kinds in ranks if kinds[index] is not None), None)
        if own[index] is None and found is not None:
            dtype, shape = found
            setattr(member, name, [torch.empty(0, *shape, dtype=dtype, device=member.device)])


def take_snapshot(metric: AnyMetric) -> AnyMetric:
    """Return a metric with the present states, which another thread may compute.

    It shares the tensors of states that are lists, to which a metric adds and which it never
    changes. Ranks' states are joined here, so all ranks must call this together; to compute the
    snapshot takes no collective.

    Args:
        metric: It goes on as it was, and may be updated or reset meanwhile.

    Example:
        >>> from torchmetrics import CatMetric
        >>> metric = CatMetric()
        >>> metric.update(1.0)
        >>> before = take_snapshot(metric)
        >>> metric.update(2.0)
        >>> before.compute(), metric.compute()
        (tensor(1.), tensor([1., 2.]))
    """
    if isinstance(metric, MetricCollection):
        members = metric.items(keep_base=True, copy_state=False)
        copied = copy.copy(metric)
        vars(copied)["_modules"] = {name: take_snapshot(member) for name, member in members}
        return copied
    with metric.sync_context(
        dist_sync_fn=metric.dist_sync_fn,
        should_sync=metric._to_sync and not metric._is_synced,
        should_unsync=metric._should_unsync,
    ):
        taken = copy.copy(metric)
        if metric._is_synced:  # other ranks may have samples
            taken._update_count = max(metric._update_count, 1)
        for name in metric._defaults:
            state = getattr(metric, name)
            setattr(taken, name, list(state) if isinstance(state, list) else state.detach().clone())
    taken._is_synced, taken._cache, taken._to_sync = False, None, False
    return taken


@final
class BackgroundMetrics:
    """Values of metrics that a thread computes, begun at once.

    The thread keeps an interpreter from ending before it has. Its values are on the host: nobody
    else waits for a device.

    Args:
        snapshots: Name -> metric, which nothing else uses (``take_snapshot``).

    Example:
        >>> from recis_lightning.metrics import GAUC
        >>> gauc = GAUC()
        >>> gauc.update(torch.tensor([0.9, 0.1]), torch.tensor([1, 0]), torch.tensor([7, 7]))
        >>> BackgroundMetrics({"gauc": take_snapshot(gauc)}).values()
        {'gauc': tensor(1.)}
    """

    def __init__(self, snapshots: Mapping[str, AnyMetric]) -> None:
        self._snapshots = dict(snapshots)
        self._values: dict[str, Any] = {}
        self._error: BaseException | None = None
        # A default device belongs to a thread.
        self._device = torch.get_default_device()
        self._thread = threading.Thread(target=self._run, name="recis_lightning.metrics")
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether ``values`` need not wait."""
        return not self._thread.is_alive()

    def values(self) -> dict[str, Any]:
        """Wait, and return name -> value: a tensor on the CPU, a dict of them, or anything else.

        Raises:
            Exception: That of a metric's ``compute``.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._values

    def _run(self) -> None:
        try:
            with torch.no_grad(), torch.device(self._device):
                while self._snapshots:  # each is let go as soon as it is computed
                    name, snapshot = self._snapshots.popitem()
                    self._values[name] = _on_host(snapshot.compute())
        except BaseException as error:
            self._error = error
        finally:
            self._snapshots.clear()


def _members(metric: AnyMetric) -> list[Metric]:
    if isinstance(metric, MetricCollection):
        return [member for _, member in metric.items(keep_base=True, copy_state=False)]
    return [metric]


def _kind_of(state: list[Any]) -> tuple[torch.dtype, tuple[int, ...]] | None:
    """Return the dtype and shape of a list's samples; None if it has none."""
    if not state or not isinstance(state[0], Tensor):
        return None
    return state[0].dtype, tuple(state[0].shape[1:])


def _wraps(metric: Metric) -> bool:
    return any(isinstance(child, Metric | MetricCollection) for child in metric.children())


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {name: _on_host(part) for name, part in value.items()}
    return value
