"""Row filters, written as Python comparisons of columns."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa
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


def parse_filter(
    text: str,
    kinds: Mapping[str, pa.DataType] | None = None,
    values: Mapping[str, str | None] | None = None,
) -> pc.Expression | bool:
    """Translate a filter to an Arrow expression; nothing in it is executed.

    Args:
        text: Comparisons of columns with constants (``==``, ``!=``, ``<``, ``<=``, ``>``, ``>=``,
            ``in``, ``not in``, ``is None``, ``is not None``), joined by ``and``, ``or`` and
            ``not``. A row for which the result is null is left out. Times and dates are compared
            with strings such as ``'2026-11-30'``.
        kinds: Column -> its type in the file, where it is known.
        values: Column -> its text, or None, for columns of a path: they are compared with strings
            as text, and with numbers as numbers.

    Returns:
        The expression; or True or False, if all rows or none of such a path pass.

    Raises:
        ValueError: It is something else; names the part.

    Example:
        >>> print(parse_filter("country == 'DE' and not 1 < price"))
        ((country == "DE") and invert((1 < price)))
    """
    found = _Translation(text, kinds or {}, values or {}).condition(_parsed(text))
    return False if found is None else found


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


class _Translation:
    """One filter, for the columns of one file.

    A condition is an expression or, where the path's columns decide it, True, False or None: Arrow
    counts rows wrongly by expressions without columns.
    """

    def __init__(
        self, text: str, kinds: Mapping[str, pa.DataType], values: Mapping[str, str | None]
    ) -> None:
        self._text, self._kinds, self._values = text, kinds, values

    def condition(self, node: ast.expr) -> Any:
        """Translate a condition."""
        if isinstance(node, ast.BoolOp):
            is_and = isinstance(node.op, ast.And)
            return _joined([self.condition(part) for part in node.values], is_and)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            found = self.condition(node.operand)
            if found is None or isinstance(found, bool):
                return None if found is None else not found
            return ~found
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            pairs = zip(operands, node.ops, operands[1:], strict=False)
            return _joined([self._comparison(*pair) for pair in pairs], True)
        raise _refusal(node, self._text)

    def _comparison(self, left: ast.expr, kind: ast.cmpop, right: ast.expr) -> Any:
        names = [side.id for side in (left, right) if isinstance(side, ast.Name)]
        if not names:
            raise _refusal(left, self._text)
        if isinstance(kind, ast.In | ast.NotIn):
            constants = _constant(right, self._text)
            if not isinstance(constants, tuple) or not isinstance(left, ast.Name):
                raise _refusal(right, self._text)
            if left.id in self._values:
                value = self._value_of(left.id, constants)
                return (value in constants) == isinstance(kind, ast.In)
            found = self._column(left.id).isin([self._typed(one, left.id) for one in constants])
            return ~found if isinstance(kind, ast.NotIn) else found
        if isinstance(kind, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None) or len(names) > 1:
                raise _refusal(right, self._text)
            if names[0] in self._values:
                return (self._values[names[0]] is None) == isinstance(kind, ast.Is)
            column = self._column(names[0])
            return column.is_null() if isinstance(kind, ast.Is) else column.is_valid()
        sides = [self._operand(left, right), self._operand(right, left)]
        if None in [side if side is None else 0 for side in sides]:
            return None
        try:
            return _COMPARISONS[type(kind)](*sides)
        except TypeError as error:
            raise ValueError(f"filter: {error}, in {self._text!r}") from error

    def _operand(self, node: ast.expr, other: ast.expr) -> Any:
        """Return a column, or a constant as what the other side is compared with."""
        other_is_path = isinstance(other, ast.Name) and other.id in self._values
        if isinstance(node, ast.Name):
            if node.id not in self._values:
                return self._column(node.id)
            if isinstance(other, ast.Name):
                is_text = "string" in str(self._kinds.get(other.id, "string"))
                value = self._value_of(node.id, [""] if is_text and not other_is_path else [])
                return value if other_is_path or value is None else pc.scalar(value)
            return self._value_of(node.id, [_constant(other, self._text)])
        constant = _constant(node, self._text)
        if constant is None or isinstance(constant, tuple):
            raise _refusal(node, self._text)
        if other_is_path or not isinstance(other, ast.Name):
            return constant
        return pc.scalar(self._typed(constant, other.id))

    def _value_of(self, name: str, constants: Sequence[Any]) -> Any:
        """Return the value of a path's column: text beside strings, else a number if it is one."""
        text = self._values[name]
        if text is None or any(isinstance(one, str) for one in constants):
            return text
        return _number_of(text)

    def _column(self, name: str) -> Any:
        kind = self._kinds.get(name)
        if kind is not None and pa.types.is_string_view(kind):
            return pc.field(name).cast(pa.large_string())
        return pc.field(name)

    def _typed(self, constant: Any, name: str) -> Any:
        """Return a constant as what a column holds."""
        kind = self._kinds.get(name)
        if kind is None:
            return constant
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if isinstance(constant, str) and pa.types.is_temporal(kind):
            try:
                return pa.scalar(constant).cast(kind)
            except pa.ArrowException as error:
                raise ValueError(
                    f"filter: column {name!r} holds {kind}, which {constant!r} is not, in "
                    f"{self._text!r}: {error}"
                ) from error
        is_number = isinstance(constant, int | float) and not isinstance(constant, bool)
        if is_number and pa.types.is_decimal(kind):
            return pa.scalar(Decimal(str(constant)))
        return constant


def _joined(parts: Sequence[Any], is_and: bool) -> Any:
    """Join conditions by ``and`` or ``or``, of three values."""
    deciding = not is_and
    known = [part for part in parts if part is None or isinstance(part, bool)]
    if deciding in known:
        return deciding
    found = [part for part in parts if not (part is None or isinstance(part, bool))]
    if None in known:
        if not found:
            return None
        found.append(pc.scalar(pa.scalar(None, pa.bool_())))
    if not found:
        return is_and
    joined = found[0]
    for part in found[1:]:
        joined = joined & part if is_and else joined | part
    return joined


def _number_of(text: str) -> int | float | str:
    """Return the number that a text is, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


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
