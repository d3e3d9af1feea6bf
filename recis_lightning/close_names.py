"""Names that were meant by those that do not exist."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["closest", "did_you_mean"]


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return what was meant by a name, whatever its case, or None.

    Args:
        name: A name that does not exist.
        known: Those that do; of equal ones in another case the first is returned.

    Example:
        >>> closest("User_id", ["user_id", "item_id"]), closest("price", ["user_id"])
        ('user_id', None)
    """
    folded = {one.casefold(): one for one in reversed([*known])}
    close = get_close_matches(name.casefold(), folded, 1, cutoff=0.8)
    return folded[close[0]] if close else None


def did_you_mean(names: Iterable[object], known: Iterable[object]) -> str:
    """Return the end of a message about names that do not exist; "" if none is like another.

    Args:
        names: Names that do not exist; what is no str is like none.
        known: Those that do.

    Example:
        >>> did_you_mean(["usr", "itm", "x"], ["user", "item"])
        "; did you mean 'user', 'item'?"
    """
    strings = [one for one in known if isinstance(one, str)]
    wrong = [name for name in names if isinstance(name, str)]
    found = dict.fromkeys(close for name in wrong if (close := closest(name, strings)))
    return f"; did you mean {', '.join(map(repr, found))}?" if found else ""
