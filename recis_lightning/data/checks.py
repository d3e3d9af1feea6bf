"""Checks of what columns and transforms are given, by users and by files of anyone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from recis_lightning.arguments import check_str

__all__ = ["check_id", "check_names", "check_number", "check_numbers", "check_values"]


def check_names(name: str, *others: tuple[str, str | None]) -> None:
    """Raise unless a name is a str, and each of the other arguments one, or None.

    Args:
        name: The argument ``name``.
        others: Name and value of other arguments.

    Raises:
        TypeError: One is something else.

    Example:
        >>> check_names("age", ("source", 3))
        Traceback (most recent call last):
        TypeError: source: expected a str, got int (3)
    """
    check_str("name", name)
    for argument, value in others:
        if value is not None:
            check_str(argument, value)


def check_id(argument: str, value: Any) -> None:
    """Raise unless a value is an int of 64 bits, or None.

    Raises:
        TypeError, ValueError: It is something else (names the argument).
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{argument}: expected an int or None, got {value!r:.100}")
    if not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{argument}: expected an int of 64 bits, got {value!r:.100}")


def check_number(argument: str, value: Any) -> None:
    """Raise unless a value is a number, or None.

    Raises:
        TypeError: It is something else (names the argument).
    """
    if value is not None and not (isinstance(value, Real) and _fits(value)):
        raise TypeError(f"{argument}: expected a number or None, got {value!r:.100}")


def check_numbers(argument: str, values: Iterable[Any]) -> None:
    """Raise unless all values are numbers.

    Raises:
        TypeError: One is something else (names the argument).
    """
    for value in values:
        if value is None:
            raise TypeError(f"{argument}: expected numbers, got None")
        check_number(argument, value)


def check_values(argument: str, values: Any) -> None:
    """Raise unless values are a list of strings, or of numbers (ints of 64 bits).

    Raises:
        TypeError, ValueError: They are something else (names the argument).
    """
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Collection):
        raise TypeError(f"{argument}: expected a list, got {values!r:.100}")
    num_strings = sum(isinstance(value, str) for value in values)
    if num_strings == len(values):
        return
    if num_strings:
        raise TypeError(f"{argument}: expected strings or numbers, got both")
    check_numbers(argument, values)
    for value in values:
        if isinstance(value, Integral) and not isinstance(value, bool):
            check_id(argument, value)


def _fits(value: Any) -> bool:
    """Return whether a float can be a number: an int may be too large."""
    try:
        float(value)
    except OverflowError:
        return False
    return True
