"""``StepCosts``: what the modules and operators of one step cost, as text, JSON and HTML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from recis_lightning.monitoring.charts import number

__all__ = ["WIDE", "ModuleCost", "OperatorCost", "StepCosts"]


# Start of a table that may be wider than the screen, which a narrow one says.
WIDE = '<div class="wide" tabindex="0"><p class="scrolls">This table scrolls sideways →</p>'


class ModuleCost(NamedTuple):
    """Cost of a module and all of its submodules.

    Attributes:
        name: As ``named_modules`` has it; "" is the model itself.
        kind: Name of its class.
        forward_flops: Products of matrices, convolutions and attention.
        backward_flops: Of its backward pass.
        forward_ms: Time of torch's operators.
        backward_ms: Of its backward pass.
        table_ms: Time of the ops of tables, which is in none of the others.
        table_bytes: That these moved.
    """

    name: str
    kind: str
    forward_flops: int = 0
    backward_flops: int = 0
    forward_ms: float = 0.0
    backward_ms: float = 0.0
    table_ms: float = 0.0
    table_bytes: int = 0


class OperatorCost(NamedTuple):
    """Cost of all calls of an operator.

    Attributes:
        name: "aten::addmm", or "recis::gather" for an op of tables.
        num_calls: How many.
        num_bytes: Read and written, at least.
        ms: Time.
    """

    name: str
    num_calls: int
    num_bytes: int
    ms: float

    @property
    def gb_per_sec(self) -> float:
        """Bytes over time."""
        return self.num_bytes / self.ms / 1e6 if self.ms > 0 else 0.0


class StepCosts(NamedTuple):
    """Costs of one step.

    Attributes:
        step: Training batches done after it.
        modules: In the order of ``named_modules``; those that cost nothing are left out.
        operators: The longest first.

    Example:
        >>> costs = StepCosts(7, [], [OperatorCost("aten::mm", 2, 4_000_000, 0.5)])
        >>> print(costs.operators_text())
        Operators of the step that ended with batch 7
        operator  calls    bytes     ms   GB/s
        aten::mm      2  4.00 MB  0.500   8.00
        total         2  4.00 MB  0.500   8.00
    """

    step: int
    modules: list[ModuleCost]
    operators: list[OperatorCost]

    def modules_text(self) -> str:
        """Return the modules as a table."""
        return _text(f"Modules of the step that ended with batch {self.step}", *self._modules())

    def operators_text(self) -> str:
        """Return the operators as a table."""
        return _text(f"Operators of the step that ended with batch {self.step}", *self._operators())

    def as_json(self, *parts: str) -> str:
        """Return the costs as JSON.

        Args:
            parts: "modules", "operators" or both.
        """
        found: dict[str, Any] = {"step": self.step}
        if "modules" in parts:
            found["modules"] = [cost._asdict() for cost in self.modules]
        if "operators" in parts:
            found["operators"] = [
                {**cost._asdict(), "gb_per_sec": cost.gb_per_sec} for cost in self.operators
            ]
        return json.dumps(found, indent=1)

    def html(self) -> str:
        """Return the tables as a part of a page."""
        parts = []
        for title, (head, rows) in (
            ("Modules", self._modules()),
            ("Operators", self._operators()),
        ):
            if rows:
                about = f"of the step that ended with batch {self.step:,}"
                body = "".join(_row(row, "td") for row in rows)
                table = f"<table><thead>{_row(head, 'th')}</thead><tbody>{body}</tbody></table>"
                parts.append(
                    f"<section><h2>{title} <small>{about}</small></h2>{WIDE}{table}</div></section>"
                )
        return "".join(parts)

    def _modules(self) -> tuple[list[str], list[list[str]]]:
        head = ["module", "class", "forward FLOPs", "backward FLOPs", "forward ms", "backward ms"]
        rows = [
            [
                *(cost.name or "(model)", cost.kind),
                *map(number, (cost.forward_flops, cost.backward_flops)),
                *map(_ms, (cost.forward_ms, cost.backward_ms, cost.table_ms)),
                _size(cost.table_bytes),
            ]
            for cost in self.modules
        ]
        return [*head, "tables ms", "tables bytes"], rows

    def _operators(self) -> tuple[list[str], list[list[str]]]:
        if not self.operators:
            return [], []
        total = OperatorCost(
            "total",
            sum(cost.num_calls for cost in self.operators),
            sum(cost.num_bytes for cost in self.operators),
            sum(cost.ms for cost in self.operators),
        )
        rows = [
            [cost.name, str(cost.num_calls), _size(cost.num_bytes), _ms(cost.ms), _rate(cost)]
            for cost in [*self.operators, total]
        ]
        return ["operator", "calls", "bytes", "ms", "GB/s"], rows


def _ms(ms: float) -> str:
    return f"{ms:.3f}"


def _size(num_bytes: int) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"


def _rate(cost: OperatorCost) -> str:
    return f"{cost.gb_per_sec:.2f}"


def _row(cells: Sequence[str], cell: str) -> str:
    first, *others = map(escape, cells)
    return f"<tr><th>{first}</th>{''.join(f'<{cell}>{text}</{cell}>' for text in others)}</tr>"


def _text(title: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    return "\n".join([title, *shown])
