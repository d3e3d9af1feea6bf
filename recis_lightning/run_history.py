"""The numbers of a run over its steps, in bounded memory: what a report is drawn from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from recis_lightning.arguments import check_int

__all__ = ["RunHistory"]


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
        self._columns: dict[str, list[float]] = {}
        self._num_appended = 0
        self._every = 1  # of the points appended, which are kept

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def names(self) -> list[str]:
        """Names of the columns, in the order of their first sight."""
        return list(self._columns)

    def column(self, name: str) -> list[float]:
        """Return a number for each point, NaN where there was none; all NaN for an unknown name."""
        return list(self._columns.get(name, [math.nan] * len(self.steps)))

    def last(self, name: str, default: float = math.nan) -> float:
        """Return the newest number of a column."""
        found = (value for value in reversed(self.column(name)) if not math.isnan(value))
        return next(found, default)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point.

        Args:
            step: Not before the newest point's; one of the same step adds to it.
            values: Name -> number.
        """
        if not self.steps or step != self.steps[-1]:
            self._drop_surplus()
            self.steps.append(int(step))
            for column in self._columns.values():
                column.append(math.nan)
            self._num_appended += 1
        for name, value in values.items():
            column = self._columns.setdefault(name, [math.nan] * len(self.steps))
            column[-1] = float(value)

    def _drop_surplus(self) -> None:
        """Make room: the newest point stays only if its turn has come."""
        if self._num_appended and (self._num_appended - 1) % self._every:
            self._keep(range(len(self.steps) - 1))
        if len(self.steps) >= self.max_points:
            self._every *= 2
            self._keep(range(0, len(self.steps), 2))

    def _keep(self, points: range) -> None:
        self.steps = [self.steps[point] for point in points]
        for name, column in self._columns.items():
            self._columns[name] = [column[point] for point in points]

    def truncate(self, step: int) -> None:
        """Forget the points after a step."""
        self._keep(range(sum(known <= step for known in self.steps)))

    def state_dict(self) -> dict[str, Any]:
        """Return everything, as tensors and primitives."""
        return {
            "steps": torch.tensor(self.steps, dtype=torch.int64),
            "columns": {
                name: torch.tensor(column, dtype=torch.float64)
                for name, column in self._columns.items()
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
        self._columns = {name: column.tolist() for name, column in state["columns"].items()}
        self.distributions = {name: part.tolist() for name, part in state["distributions"].items()}
        self._num_appended, self._every = state["num_appended"], state["every"]
