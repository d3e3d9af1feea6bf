"""The numbers of a run over its steps, in bounded memory: what a report is drawn from."""

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
    """Named numbers over steps; when there are too many points, every second one goes.

    The first and the newest point are always there, and those between lie evenly. Counts that only
    grow, as tables give them, lose nothing by it.

    Args:
        max_points: Points kept at most, at least 8.

    Attributes:
        steps: The step of each point, ascending.
        distributions: What is known of its newest moment only: name -> counts by bin.

    Raises:
        TypeError, ValueError: ``max_points`` is not what it should be.

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
        # Each point holds the columns known when it was made; those that came later are NaN.
        self._places: dict[str, int] = {}
        self._points: list[Point] = []
        self._num_appended = 0
        self._every = 1  # of the points appended, which are kept

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def names(self) -> list[str]:
        """Names of the columns, in the order of their first sight."""
        return list(self._places)

    def column(self, name: str) -> list[float]:
        """Return a number for each point, NaN where there was none; all NaN for an unknown name."""
        place = self._places.get(name, len(self._places))
        return [float(p[place]) if place < len(p) else math.nan for p in self._points]

    def last(self, name: str, default: float = math.nan) -> float:
        """Return the newest number of a column."""
        place = self._places.get(name, len(self._places))
        known = (float(p[place]) for p in reversed(self._points) if place < len(p))
        return next((value for value in known if not math.isnan(value)), default)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point.

        Args:
            step: Not before the newest point's; one of the same step adds to it.
            values: Name -> number.
        """
        places = self._places
        if not places.keys() >= values.keys():
            for name in values:
                places.setdefault(name, len(places))
        if not self.steps or step != self.steps[-1]:
            self._drop_surplus()
            self.steps.append(int(step))
            self._points.append(np.full(len(places), math.nan))
            self._num_appended += 1
        point = self._points[-1]
        if len(point) < len(places):
            more = np.full(len(places) - len(point), math.nan)
            self._points[-1] = point = np.append(point, more)
        point[[*map(places.__getitem__, values)]] = [*values.values()]

    def _drop_surplus(self) -> None:
        """Make room: the newest point stays only if its turn has come."""
        if self._num_appended and (self._num_appended - 1) % self._every:
            self._keep(range(len(self.steps) - 1))
        if len(self.steps) >= self.max_points:
            self._every *= 2
            self._keep(range(0, len(self.steps), 2))

    def _keep(self, points: range) -> None:
        self.steps = [self.steps[point] for point in points]
        self._points = [self._points[point] for point in points]

    def truncate(self, step: int) -> None:
        """Forget the points after a step."""
        self._keep(range(sum(known <= step for known in self.steps)))

    def state_dict(self) -> dict[str, Any]:
        """Return everything, as tensors and primitives."""
        table = np.full((len(self._points), len(self._places)), math.nan)
        for line, point in zip(table, self._points, strict=True):
            line[: len(point)] = point
        return {
            "steps": torch.tensor(self.steps, dtype=torch.int64),
            "columns": {
                name: torch.from_numpy(table[:, place].copy())
                for name, place in self._places.items()
            },
            "distributions": {
                name: torch.tensor(counts, dtype=torch.int64)
                for name, counts in self.distributions.items()
            },
            "num_appended": self._num_appended,
            "every": self._every,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become what ``state_dict`` saved; ``max_points`` stays."""
        self.steps = state["steps"].tolist()
        columns = state["columns"]
        self._places = {name: place for place, name in enumerate(columns)}
        table = np.empty((len(self.steps), len(columns)))
        for place, column in enumerate(columns.values()):
            table[:, place] = column.numpy()
        self._points = [*map(np.copy, table)]
        self.distributions = {name: part.tolist() for name, part in state["distributions"].items()}
        self._num_appended, self._every = state["num_appended"], state["every"]
