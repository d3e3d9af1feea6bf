"""Windows of time: which one a file or a row belongs to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recis_lightning.arguments import check_str
from recis_lightning.data.conversion import int64_of, ticks_per_second
from recis_lightning.data.hashing import with_nulls

__all__ = ["Window", "check_window"]

_LENGTH = re.compile(r"([1-9]\d*)([mhd])")
_SECONDS = {"m": 60, "h": 3600, "d": 86400}
_TIME = r"(\d{4})-?(\d\d)-?(\d\d)(?:[T _-]?(\d\d)(?:[:-]?(\d\d))?)?"
_VALUE = re.compile(_TIME)
_ANYWHERE = re.compile(rf"(?<!\d){_TIME}(?!\d)")
_PARTS = ("year", "month", "day", "hour", "minute")
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True)
class Window:
    """Length of the windows of time in which data are read, and where their time is found.

    Windows begin at multiples of their length since 1970, in UTC. A window is named by its
    beginning: ``"2026-11-30"``, ``"2026-11-30T05"`` or ``"2026-11-30T05:30"``.

    Args:
        length: A number of minutes, hours or days: ``"30m"``, ``"1h"``, ``"7d"``.
        column: Column of times, dates, or seconds since 1970 as integers, by which rows fall into
            windows. None takes a file's time from its path: from folders such as
            ``day=2026-11-30/hour=05`` or ``year=2026/month=11/day=30``, else from a date in it such
            as ``2026-11-30`` or ``20261130T0500``.

    Raises:
        TypeError, ValueError: An argument is invalid.

    Example:
        >>> window = Window("1h")
        >>> window.name(window.of_path("logs/day=2026-11-30/hour=05/part-0.parquet"))
        '2026-11-30T05'
    """

    length: str
    column: str | None = None

    def __post_init__(self) -> None:
        check_str("length", self.length)
        if _LENGTH.fullmatch(self.length) is None:
            raise ValueError(
                f"length: expected minutes, hours or days as '30m', '1h', '7d', got {self.length!r}"
            )
        if self.column is not None:
            check_str("column", self.column)

    @property
    def seconds(self) -> int:
        """Length of a window."""
        return int(self.length[:-1]) * _SECONDS[self.length[-1]]

    def of_path(self, path: str) -> int:
        """Return the number of the window that a file belongs to.

        Raises:
            ValueError: The path has no time, or only the day where windows are shorter.
        """
        parts = _time_in(unquote(path))
        needed = 3 if not self.seconds % 86400 else 4 if not self.seconds % 3600 else 5
        if len(parts) < needed:
            raise ValueError(
                f"windows of {self.length} need a time in the path, such as "
                f"day=2026-11-30{'' if needed == 3 else '/hour=05'}, and it has none"
            )
        return _seconds_of(datetime(*parts, tzinfo=timezone.utc)) // self.seconds  # type: ignore[arg-type,misc]

    def of_times(self, times: pa.Array) -> npt.NDArray[np.int64]:
        """Return the number of the window of each of a column's values, int64 [n].

        Raises:
            TypeError: They are no times, dates or integers.
            ValueError: One is null.
        """
        times = with_nulls(times)
        if times.null_count:
            raise ValueError(
                f"{times.null_count} of {len(times)} values are null, and have no window"
            )
        if pa.types.is_floating(times.type):
            raise TypeError(f"expected times, dates or seconds as integers, got {times.type}")
        if pa.types.is_date32(times.type):
            return int64_of(times, None, 0).numpy() * 86400 // self.seconds
        return int64_of(times, None, 0).numpy() // (ticks_per_second(times.type) * self.seconds)

    def name(self, number: int) -> str:
        """Return the name of a window."""
        try:
            begin = _EPOCH + timedelta(seconds=number * self.seconds)
        except OverflowError:
            return str(number)
        if not self.seconds % 86400:
            return begin.strftime("%Y-%m-%d")
        return begin.strftime("%Y-%m-%dT%H" if not self.seconds % 3600 else "%Y-%m-%dT%H:%M")


def check_window(window: str | Window | None) -> Window | None:
    """Return a window that is given as one, by its length, or not at all.

    Raises:
        TypeError, ValueError: It is something else.
    """
    if window is None or isinstance(window, Window):
        return window
    if not isinstance(window, str):
        raise TypeError(
            f"window: expected a length such as '1h', Window or None, got {type(window).__name__}"
        )
    try:
        return Window(window)
    except ValueError as error:
        raise ValueError(f"window: {error}") from error


def _time_in(path: str) -> list[int]:
    """Return the year, month and day, and the hour and minute if there are any, or nothing."""
    found: dict[str, int] = {}
    for folder in path.split("/"):
        key, _, value = folder.partition("=")
        whole = _VALUE.fullmatch(value)
        if whole is not None:
            found |= _numbers(whole)
        elif key.lower() in _PARTS and value.isdecimal():
            found[key.lower()] = int(value)
    if not {"year", "month", "day"} <= found.keys():
        anywhere = [_numbers(match) for match in _ANYWHERE.finditer(path)]
        dates = [date for date in anywhere if 1 <= date["month"] <= 12 and 1 <= date["day"] <= 31]
        found = dates[-1] | found if dates else {}
    parts: list[int] = []
    for part in _PARTS:
        if part not in found:
            break
        parts.append(found[part])
    return parts


def _numbers(match: re.Match[str]) -> dict[str, int]:
    found = {
        part: int(text)
        for part, text in zip(_PARTS, match.groups(), strict=True)
        if text is not None
    }
    if found.get("hour", 0) > 23 or found.get("minute", 0) > 59:  # the number of a part
        found = {part: found[part] for part in _PARTS[:3]}
    return found


def _seconds_of(time: datetime) -> int:
    return (time - _EPOCH) // timedelta(seconds=1)
