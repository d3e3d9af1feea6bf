"""Process-wide version numbers of what tables keep, for callers that cache addresses."""

from __future__ import annotations


class Version:
    """Number that grows when something changes that callers may have cached."""

    def __init__(self) -> None:
        self._number = 0

    def __call__(self) -> int:
        """Return the number; what was cached under another one is out of date."""
        return self._number

    def advance(self) -> None:
        """Declare everything cached so far out of date."""
        self._number += 1


layout_version = Version()  # some table has a new storage, dtype or optimizer
block_version = Version()  # some row store has other blocks


__all__ = ["Version", "block_version", "layout_version"]
