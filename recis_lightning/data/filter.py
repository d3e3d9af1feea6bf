"""Row filters, written as Python comparisons of columns."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

import pyarrow.compute as pc

__all__ = ["columns_of", "parse_filter"]

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def parse_filter(text: str) -> pc.Expression:
    """Translate a filter to an Arrow expression; nothing in it is executed.

    Args:
        text: Comparisons of columns with constants (``==``, ``!=``, ``<``, ``<=``, ``>``, ``>=``,
            ``in``, ``not in``, ``is None``, ``is not None``), joined by ``and``, ``or`` and
            ``not``. A row for which the result is null is left out.

    Raises:
        ValueError: It is something else; names the part.

    Example:
        >>> print(parse_filter("country == 'DE' and not 1 < price"))
        ((country == "DE") and invert((1 < price)))
    """
    return _expression(_parsed(text), text)


def columns_of(text: str) -> list[str]:
    """Return the columns that a filter reads, each once.

    Example:
        >>> columns_of("b > 1 and a == 2 or b < 0")
        ['a', 'b']
    """
    return sorted({node.id for node in ast.walk(_parsed(text)) if isinstance(node, ast.Name)})


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, AttributeError, ValueError) as error:
        raise ValueError(
            f"filter: expected comparisons such as \"country == 'DE'\", got {text!r}"
        ) from error


def _expression(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.BoolOp):
        parts = [_expression(part, text) for part in node.values]
        joined = parts[0]
        for part in parts[1:]:
            joined = joined & part if isinstance(node.op, ast.And) else joined | part
        return joined
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return ~_expression(node.operand, text)
    if isinstance(node, ast.Compare):
        operands = [node.left, *node.comparators]
        pairs = zip(operands, node.ops, operands[1:], strict=False)
        found = [_comparison(left, kind, right, text) for left, kind, right in pairs]
        joined = found[0]
        for part in found[1:]:
            joined = joined & part
        return joined
    raise _refusal(node, text)


def _comparison(left: ast.expr, kind: ast.cmpop, right: ast.expr, text: str) -> Any:
    if not any(isinstance(side, ast.Name) for side in (left, right)):
        raise _refusal(left, text)
    if isinstance(kind, ast.In | ast.NotIn):
        values = _constant(right, text)
        if not isinstance(values, tuple):
            raise _refusal(right, text)
        found = _operand(left, text).isin(list(values))
        return ~found if isinstance(kind, ast.NotIn) else found
    if isinstance(kind, ast.Is | ast.IsNot):
        if not (isinstance(right, ast.Constant) and right.value is None):
            raise _refusal(right, text)
        column = _operand(left, text)
        return column.is_null() if isinstance(kind, ast.Is) else column.is_valid()
    return _COMPARISONS[type(kind)](_operand(left, text), _operand(right, text))


def _operand(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name):
        return pc.field(node.id)
    value = _constant(node, text)
    if value is None or isinstance(value, tuple):
        raise _refusal(node, text)
    return pc.scalar(value)


def _constant(node: ast.expr, text: str) -> Any:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise _refusal(node, text) from None
    return tuple(value) if isinstance(value, list | set) else value


def _refusal(node: ast.expr, text: str) -> ValueError:
    return ValueError(
        f"filter: expected comparisons of columns with constants, got {ast.unparse(node)!r} "
        f"in {text!r}"
    )
