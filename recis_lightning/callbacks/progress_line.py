"""Values of a window of training, and its line: ``LoggerHook``'s text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from recis_lightning.callbacks.log_values import to_host
from recis_lightning.metrics.background import BackgroundMetrics
from recis_lightning.metrics.values import by_member

__all__ = ["LateWindow", "is_number", "line_of", "shown"]

# Names that the hook itself gives to values.
_OWN_NAMES = frozenset({"gstep", "lstep", "qps", "samples_per_sec"})
_CPU = torch.device("cpu")


class LateWindow(NamedTuple):
    """Window whose line waits for metrics that a thread computes.

    Attributes:
        gstep: The global step.
        lstep: Batches done.
        step: The loggers' step.
        qps: Batches a second.
        values: Name -> value, and the thread of all values to come at the name of each.
    """

    gstep: int
    lstep: int
    step: int
    qps: float
    values: dict[str, Any]

    @property
    def is_done(self) -> bool:
        """Whether ``finish`` need not wait."""
        return all(v.is_done for v in self.values.values() if isinstance(v, BackgroundMetrics))

    def finish(self) -> tuple[str, dict[str, float]]:
        """Wait for the thread, and return the line and the numbers that it computed.

        Raises:
            Exception: That of a metric's ``compute``.
        """
        line: dict[str, Any] = {}
        computed: dict[str, Any] = {}
        for name, value in self.values.items():
            if not isinstance(value, BackgroundMetrics):
                line[name] = value
                continue
            found = shown(to_host(by_member(name, value.values()[name]), _CPU))
            line.update(found)
            computed.update({k: v for k, v in found.items() if is_number(v)})
        return line_of(self.gstep, self.lstep, self.qps, line), computed


def shown(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a line, without those that have none, or a name of the hook itself."""
    return {k: v for k, v in values.items() if v is not None and k not in _OWN_NAMES}


def is_number(value: Any) -> bool:
    """Return whether loggers take a value."""
    return isinstance(value, int | float)


def line_of(gstep: int, lstep: int, qps: float, values: Mapping[str, Any]) -> str:
    """Return the line of a window.

    Example:
        >>> line_of(100, 50, 12.34, {"loss": 0.123, "phase": "warm"})
        '<gstep=100> <lstep=50> <qps=12.3400> <loss=0.123> <phase=warm>'
    """
    line = [f"<gstep={gstep}> <lstep={lstep}> <qps={qps:.4f}>"]
    return " ".join(line + [f"<{name}={_format(value)}>" for name, value in values.items()])


def _format(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
