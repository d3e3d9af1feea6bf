"""``RunHistory``: the numbers of a run over its steps, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from recis_lightning.arguments import check_int

__all__ = ["RunHistory"]

Point = npt.NDArray[np.float64]


class RunHistory:
    """Named numbers over steps; when there are too many points, every second one is dropped.

    The first and the newest point are always kept, and those between are evenly spaced. Counts that
    only grow, such as those of tables, lose nothing by it.

    Args:
        max_points: Points kept at most, at least 8.

    Attributes:
        steps: The step of each point, ascending.
        distributions: Name -> counts by bin, of the newest step only.
        facts: Name -> text, what a page says of the run as a whole.

    Raises:
        TypeError, ValueError: ``max_points`` is no int, or below 8.

    Example:
        >>> history = RunHistory()
        >>> history.append(10, {"rows": 3})
        >>> history.append(20, {"rows": 5, "loss": 0.5})
        >>> history.steps, history.column("rows"), history.column("loss")
        ([10, 20], [3.0, 5.0], [nan, 0.5])
    """

    def __init__(self, max_points: int = 512) -> None:
        self.max_points = check_int("max_points", max_points, least=8)
        self.steps: list[int] = []
        self.distributions: dict[str, list[int]] = {}
        self.facts: dict[str, str] = {}
        # A point has the columns known when it was appended; it counts as NaN in later ones.
        self._columns: dict[str, int] = {}  # name -> index in a point
        self._points: list[Point] = []
        self._num_appended = 0
        self._stride = 1  # one of so many appended points is kept

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def names(self) -> list[str]:
        """Names of the columns, in the order in which they first appeared."""
        return list(self._columns)

    def column(self, name: str) -> list[float]:
        """Return a number for each point, NaN where there is none; all NaN for an unknown name."""
        index = self._columns.get(name, len(self._columns))
        return [float(p[index]) if index < len(p) else math.nan for p in self._points]

    def last(self, name: str, default: float = math.nan) -> float:
        """Return the newest number of a column."""
        index = self._columns.get(name, len(self._columns))
        known = (float(p[index]) for p in reversed(self._points) if index < len(p))
        return next((value for value in known if not math.isnan(value)), default)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point.

        Args:
            step: At least the newest point's; at the same step, values are added to that point.
            values: Name -> number.
        """
        columns = self._columns
        if not columns.keys() >= values.keys():
            for name in values:
                columns.setdefault(name, len(columns))
        if not self.steps or step != self.steps[-1]:
            self._drop_surplus()
            self.steps.append(int(step))
            self._points.append(np.full(len(columns), math.nan))
            self._num_appended += 1
        point = self._points[-1]
        if len(point) < len(columns):
            more = np.full(len(columns) - len(point), math.nan)
            self._points[-1] = point = np.append(point, more)
        point[[*map(columns.__getitem__, values)]] = [*values.values()]

    def _drop_surplus(self) -> None:
        """Make room: keep the newest point only if it is on the stride."""
        if self._num_appended and (self._num_appended - 1) % self._stride:
            self._keep(range(len(self.steps) - 1))
        if len(self.steps) >= self.max_points:
            self._stride *= 2
            self._keep(range(0, len(self.steps), 2))

    def _keep(self, points: range) -> None:
        self.steps = [self.steps[point] for point in points]
        self._points = [self._points[point] for point in points]

    def truncate(self, step: int) -> None:
        """Drop the points after a step."""
        self._keep(range(sum(known <= step for known in self.steps)))

    def state_dict(self) -> dict[str, Any]:
        """Return everything, as tensors and primitives."""
        table = np.full((len(self._points), len(self._columns)), math.nan)
        for line, point in zip(table, self._points, strict=True):
            line[: len(point)] = point
        return {
            "steps": torch.tensor(self.steps, dtype=torch.int64, device="cpu"),
            "columns": {
                name: torch.from_numpy(table[:, index].copy())
                for name, index in self._columns.items()
            },
            "distributions": {
                name: torch.tensor(counts, dtype=torch.int64, device="cpu")
                for name, counts in self.distributions.items()
            },
            "facts": dict(self.facts),
            "num_appended": self._num_appended,
            "every": self._stride,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of ``state_dict``; ``max_points`` is kept."""
        self.steps = state["steps"].tolist()
        columns = state["columns"]
        self._columns = {name: index for index, name in enumerate(columns)}
        table = np.empty((len(self.steps), len(columns)))
        for index, column in enumerate(columns.values()):
            table[:, index] = column.numpy()
        self._points = [*map(np.copy, table)]
        self.distributions = {
            name: counts.tolist() for name, counts in state["distributions"].items()
        }
        self.facts = dict(state.get("facts", {}))
        self._num_appended, self._stride = state["num_appended"], state["every"]
