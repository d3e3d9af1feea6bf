"""Names of a stream's files, which stay where the folder is moved or patterns are added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recis_lightning.data.files import Pattern

__all__ = ["Origins"]


class Origins:
    """Lasting names of files: their whole path, as it was when the first run of the stream read.

    A pattern is where it was, if there was the same one; a pattern of another folder with the same
    rest is taken for one that was moved, with its files.

    Args:
        patterns: Patterns of the stream.

    Example:
        >>> old = Origins([Pattern.of("/logs/*.parquet")])
        >>> new = Origins([Pattern.of("/mnt/logs/*.parquet")])
        >>> new.load(old.state())
        >>> new.name_of(new.place_of("/logs/a.parquet"))
        '/logs/a.parquet'
        >>> new.place_of("/logs/a.parquet")
        '/mnt/logs/a.parquet'
    """

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self._patterns = [_folder_and_rest(pattern) for pattern in patterns]
        self._moved: list[list[str]] = []  # folder now, folder in names; the last one counts

    def name_of(self, place: str) -> str:
        """Return the lasting name of the file at a place, as ``Pattern.place_of`` gives it."""
        for now, first in reversed(self._moved):
            if place.startswith(now):
                return first + place.removeprefix(now)
        return place

    def place_of(self, name: str) -> str:
        """Return where the file of a name is now."""
        for now, first in reversed(self._moved):
            if name.startswith(first):
                return now + name.removeprefix(first)
        return name

    def state(self) -> dict[str, Any]:
        """Return the patterns, and which folders were moved."""
        return {"patterns": [list(one) for one in self._patterns], "moved": self._moved}

    def load(self, state: dict[str, Any]) -> None:
        """Take the names of an earlier run.

        Raises:
            ValueError: Its files may have been moved, or the patterns be others: that is open.
        """
        before = [tuple(one) for one in state["patterns"]]
        gone = [one for one in before if one not in self._patterns]
        new = [one for one in self._patterns if one not in before]
        moved = [list(one) for one in state["moved"]]
        if [rest for _, rest in gone] == [rest for _, rest in new]:
            self._moved = moved
            pairs = [(now, self.name_of(was)) for (was, _), (now, _) in zip(gone, new, strict=True)]
            self._moved = moved + [[now, first] for now, first in pairs]
            return
        for folder, rest in gone if new else []:
            if not any(_are_nested(folder, other) for other, _ in self._patterns):
                raise ValueError(
                    f"state: paths may be other ones, or may have been moved, but not both: "
                    f"nothing of {[a + b for a, b in self._patterns]} is where {folder + rest!r} "
                    f"was"
                )
        self._moved = moved


def _folder_and_rest(pattern: Pattern) -> tuple[str, str]:
    return pattern.place_of(pattern.folder), pattern.path.removeprefix(pattern.folder)


def _are_nested(folder: str, other: str) -> bool:
    return folder.startswith(other) or other.startswith(folder)
