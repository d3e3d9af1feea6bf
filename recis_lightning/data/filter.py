"""Row filters, written as Python comparisons of columns."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_FLOOR, Context, Decimal, localcontext
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recis_lightning.data.filter_syntax import constant_of, parsed, refusal, written

__all__ = ["columns_of", "normal_filter", "parse_filter", "trusts_statistics"]

_DECIMAL_DIGITS = 200  # more than columns of decimals have

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_MIRRORED = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}


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
            with strings such as ``'2026-11-30'``; a column of floats with constants of its own
            width. ``None`` among the constants of ``in`` stands for nulls. A column whose name is
            no Python identifier stands in backticks.
        kinds: Column -> its type in the file, where it is known.
        values: Column -> its text, or None, for columns of a path: they are compared with strings
            as text, and with numbers as numbers.

    Returns:
        The expression; or True or False, if all rows or none of such a path pass.

    Raises:
        ValueError: It is something else, or compares a column with what its type cannot be
            compared with; names the part.

    Example:
        >>> print(parse_filter("country == 'DE' and not 1 < price"))
        ((country == "DE") and invert((1 < price)))
    """
    found = _Translation(text, kinds or {}, values or {}).condition(parsed(text))
    return False if found is None else found


def columns_of(text: str) -> list[str]:
    """Return the columns that a filter reads, each once.

    Example:
        >>> columns_of("`user id` > 1")
        ['user id']
        >>> columns_of("b > 1 and a == 2 or b < 0")
        ['a', 'b']
    """
    return _names_in(parsed(text))


def normal_filter(text: str) -> str:
    """Return a filter without what means nothing in it: spaces, needless brackets, kinds of quotes.

    Example:
        >>> normal_filter('(city=="Rome")')
        "city == 'Rome'"
    """
    return written(parsed(text))


def trusts_statistics(text: str, kinds: Mapping[str, pa.DataType]) -> bool:
    """Return whether rows that the least and greatest values of columns rule out do not pass.

    A NaN lies outside them: so not, where a comparison of floats is negated.

    Example:
        >>> trusts_statistics("price > 1", {"price": pa.float32()})
        True
        >>> trusts_statistics("not price > 1", {"price": pa.float32()})
        False
    """
    floats = {name for name, kind in kinds.items() if _holds_floats(kind)}
    return not any(
        isinstance(node, ast.UnaryOp) or _is_negative(node)
        for node in ast.walk(parsed(text))
        if floats.intersection(_names_in(node))
    )


def _names_in(node: ast.AST) -> list[str]:
    return sorted({part.id for part in ast.walk(node) if isinstance(part, ast.Name)})


def _is_negative(node: ast.AST) -> bool:
    return isinstance(node, ast.Compare) and any(
        isinstance(kind, ast.NotEq | ast.NotIn) for kind in node.ops
    )


def _holds_floats(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(_values_kind(kind)))


def _values_kind(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


class _Translation:
    """One filter, for the columns of one file.

    A condition is an expression or, where the path's columns decide it, True, False or None: Arrow
    counts rows wrongly by expressions without columns.
    """

    def __init__(
        self, text: str, kinds: Mapping[str, pa.DataType], values: Mapping[str, str | None]
    ) -> None:
        self._text, self._kinds, self._values = text, kinds, values

    def condition(self, node: ast.expr, negated: bool = False) -> Any:
        """Translate a condition, or its negation, to one that is true where it is.

        Negations go to the comparisons, so that nobody asks whether it is null or false elsewhere.
        """
        if isinstance(node, ast.BoolOp):
            is_and = isinstance(node.op, ast.And) != negated
            return _joined([self.condition(part, negated) for part in node.values], is_and)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return self.condition(node.operand, not negated)
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            pairs = zip(operands, node.ops, operands[1:], strict=False)
            return _joined([self._either(*pair, negated) for pair in pairs], not negated)
        raise refusal(node, self._text)

    def _either(self, left: ast.expr, kind: ast.cmpop, right: ast.expr, negated: bool) -> Any:
        """Translate a comparison, or its negation."""
        if isinstance(kind, ast.In | ast.NotIn):
            return self._membership(left, right, isinstance(kind, ast.In) != negated)
        found = self._comparison(left, kind, right)
        if not negated or found is None:
            return found
        return not found if isinstance(found, bool) else ~found

    def _membership(self, left: ast.expr, right: ast.expr, is_in: bool) -> Any:
        constants = constant_of(right, self._text)
        if not isinstance(constants, tuple) or not isinstance(left, ast.Name):
            raise refusal(right, self._text)
        if left.id in self._values:
            value = self._value_of(left.id, constants)
            if value is None and (None not in constants or not is_in):
                return None
            return (value in constants) == is_in
        if not constants:
            return not is_in
        column, given = self._column(left.id), [one for one in constants if one is not None]
        same = self._any_of(left.id, given) if given else False
        if not is_in:
            is_there = column.is_valid()
            return is_there if same is False else ~same & is_there
        return same if len(given) == len(constants) else _joined([same, column.is_null()], False)

    def _any_of(self, name: str, constants: Sequence[Any]) -> Any:
        """Return whether a column has one of some constants; false, where no value can be one."""
        kind = _values_kind(self._kinds.get(name, pa.null()))
        for one in constants:
            self._check_kind(name, one)
        if name in self._kinds:
            constants = [int(one) if isinstance(one, bool) else one for one in constants]
        numbers = all(_is_number(one) for one in constants)
        if numbers and not _is_whole(kind):
            # Not isin: it rounds the constants, and takes NaN for a number that statistics bound.
            found = [self._column(name) == self._typed(one, name) for one in constants]
            while len(found) > 1:  # in pairs, or many would be nested too deep
                found = [_joined(found[at : at + 2], False) for at in range(0, len(found), 2)]
            return found[0]
        try:
            if numbers and pa.types.is_boolean(kind):
                kept = [bool(one) for one in constants if one in (0, 1)]
                return self._column(name).isin(kept) if kept else False
            if numbers and pa.types.is_integer(kind):
                whole = [int(one) for one in constants if math.isfinite(one) and one == int(one)]
                whole = [one for one in whole if _fits(one, kind)]
                return self._column(name).isin(pa.array(whole, kind)) if whole else False
            return self._column(name).isin([self._typed(one, name) for one in constants])
        except (pa.ArrowException, OverflowError, TypeError) as error:
            raise ValueError(f"filter: column {name!r}: {error}, in {self._text!r}") from error

    def _comparison(self, left: ast.expr, kind: ast.cmpop, right: ast.expr) -> Any:
        names = [side.id for side in (left, right) if isinstance(side, ast.Name)]
        if not names:
            raise refusal(left, self._text)
        if isinstance(kind, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None) or len(names) > 1:
                raise refusal(right, self._text)
            if names[0] in self._values:
                return (self._values[names[0]] is None) == isinstance(kind, ast.Is)
            column = self._column(names[0])
            return column.is_null() if isinstance(kind, ast.Is) else column.is_valid()
        if len(names) == 1 and names[0] not in self._values:
            is_left = isinstance(left, ast.Name)
            constant = self._constant_beside(right if is_left else left)
            column_kind = _values_kind(self._kinds.get(names[0], pa.null()))
            self._check_kind(names[0], constant)
            if isinstance(constant, bool) and not pa.types.is_boolean(column_kind):
                constant = int(constant)
            if _is_number(constant) and _is_whole(column_kind):
                operation = type(kind) if is_left else _MIRRORED.get(type(kind), type(kind))
                return self._of_integers(names[0], operation, constant, column_kind)
        if len(names) > 1 and not self._values.keys() & set(names):
            sides = self._two_columns(*names)
        else:
            sides = [self._operand(left, right), self._operand(right, left)]
        if None in [side if side is None else 0 for side in sides]:
            return None
        try:
            return _COMPARISONS[type(kind)](*sides)
        except TypeError as error:
            raise ValueError(f"filter: {error}, in {self._text!r}") from error

    def _two_columns(self, *names: str) -> list[Any]:
        """Return two columns as what can be compared."""
        kinds = [_values_kind(self._kinds.get(name, pa.null())) for name in names]
        columns = [self._column(name) for name in names]
        if any(pa.types.is_null(kind) for kind in kinds):
            return columns
        families = [_constants_of(kind) for kind in kinds]
        if None in families or families[0] != families[1]:
            raise ValueError(
                f"filter: columns {names[0]!r}, which holds {kinds[0]}, and {names[1]!r}, which "
                f"holds {kinds[1]}, are not compared, in {self._text!r}"
            )
        if kinds[0] != kinds[1] and all(map(_is_whole, kinds)):
            # In a type that has all of int64 and of uint64; Arrow takes none for booleans.
            return [
                (one.cast(pa.int8()) if pa.types.is_boolean(kind) else one).cast(pa.decimal128(20))
                for one, kind in zip(columns, kinds, strict=True)
            ]
        return columns

    def _of_integers(
        self, name: str, operation: type[ast.cmpop], constant: float, kind: pa.DataType
    ) -> Any:
        """Compare integers with a number of their own type: Arrow would cast them, and fail."""
        column = self._column(name)
        if pa.types.is_boolean(kind):
            kind = pa.int8()
            column = column.cast(kind)
        whole: float = constant
        if math.isfinite(constant):
            up = operation in (ast.Lt, ast.GtE)  # v < 1.5 where v < 2, and v > 1.5 where v > 1
            whole = math.ceil(constant) if up else math.floor(constant)
        is_possible = whole == constant or operation not in (ast.Eq, ast.NotEq)
        if is_possible and math.isfinite(whole) and _fits(int(whole), kind):
            return _COMPARISONS[operation](column, pc.scalar(pa.scalar(int(whole), kind)))
        always = _COMPARISONS[operation](0, constant) if is_possible else operation is ast.NotEq
        return column == column if always else column != column  # null where it is

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
            return self._value_of(node.id, [constant_of(other, self._text)])
        constant = self._constant_beside(node)
        if other_is_path or not isinstance(other, ast.Name):
            return constant
        return pc.scalar(self._typed(constant, other.id))

    def _constant_beside(self, node: ast.expr) -> Any:
        """Return the constant that a column is compared with."""
        constant = constant_of(node, self._text)
        if constant is None or isinstance(constant, tuple):
            raise refusal(node, self._text)
        return constant

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
        if kind is not None and pa.types.is_float16(_values_kind(kind)):
            return pc.field(name).cast(pa.float64())  # Arrow compares no halves
        return pc.field(name)

    def _check_kind(self, name: str, constant: Any) -> None:
        """Raise if a column's type has no order with, and is never equal to, a constant."""
        kind = _values_kind(self._kinds.get(name, pa.null()))
        if pa.types.is_null(kind):
            return
        takes = _constants_of(kind)
        if takes is None:
            raise ValueError(
                f"filter: column {name!r} holds {kind}, which is compared with None alone, in "
                f"{self._text!r}"
            )
        if not isinstance(constant, takes[0]):
            raise ValueError(
                f"filter: column {name!r} holds {kind}, and is compared with {takes[1]}, got "
                f"{constant!r} in {self._text!r}"
            )

    def _typed(self, constant: Any, name: str) -> Any:
        """Return a constant as what a column holds."""
        kind = self._kinds.get(name)
        self._check_kind(name, constant)
        if kind is None:
            is_long = _is_number(constant) and abs(constant) >= 2**63
            return float(constant) if is_long else constant
        kind = _values_kind(kind)
        if isinstance(constant, bool) and not pa.types.is_boolean(kind):
            constant = int(constant)
        if isinstance(constant, str) and pa.types.is_temporal(kind):
            try:
                return pa.scalar(constant).cast(kind)
            except pa.ArrowException as error:
                raise ValueError(
                    f"filter: column {name!r} holds {kind}, which {constant!r} is not, in "
                    f"{self._text!r}: {error}"
                ) from error
        if _is_number(constant) and pa.types.is_decimal(kind) and math.isfinite(constant):
            return pa.scalar(_beside_decimals(Decimal(str(constant)), kind))
        if _is_number(constant) and pa.types.is_float16(kind):
            with np.errstate(over="ignore"):
                narrow = np.float16(constant)
            return pa.scalar(float(narrow if np.isfinite(narrow) else constant), pa.float64())
        if _is_number(constant) and pa.types.is_floating(kind):
            narrow = pa.scalar(float(constant), kind)
            if math.isfinite(narrow.as_py()) or not math.isfinite(constant):
                return narrow
        return constant


def _beside_decimals(constant: Decimal, kind: Any) -> Decimal:
    """Return a constant of few digits that is below, at or above the same values of a column."""
    most = Decimal(1).scaleb(kind.precision - kind.scale)  # more than any value
    if abs(constant) > most:
        return most.copy_sign(constant)
    step = Decimal(1).scaleb(-kind.scale)
    with localcontext(Context(prec=_DECIMAL_DIGITS)):
        below = constant.quantize(step, ROUND_FLOOR)
        return constant if below == constant else below + step / 2


def _constants_of(kind: pa.DataType) -> tuple[tuple[type, ...], str] | None:
    """Return the types of constants that a column's values are compared with, and their name."""
    numbers = (int, float)  # and so bool
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return numbers, "numbers"
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return numbers, "numbers"
    text = str(kind)
    if "string" in text and not pa.types.is_nested(kind):
        return (str,), "strings"
    if "binary" in text and not pa.types.is_nested(kind):
        return (str, bytes), "strings or bytes"
    if pa.types.is_duration(kind) or pa.types.is_interval(kind):
        return (*numbers, str), "numbers or strings"
    if pa.types.is_temporal(kind):
        return (str,), "strings such as '2026-11-30'"
    return None


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


def _is_number(constant: Any) -> bool:
    return isinstance(constant, int | float) and not isinstance(constant, bool)


def _is_whole(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _fits(number: int, kind: pa.DataType) -> bool:
    """Return whether a type of integers has a number."""
    if pa.types.is_signed_integer(kind):
        return bool(-(2 ** (kind.bit_width - 1)) <= number < 2 ** (kind.bit_width - 1))
    return bool(0 <= number < 2**kind.bit_width)


def _number_of(text: str) -> int | float | str:
    """Return the number that a text is, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
