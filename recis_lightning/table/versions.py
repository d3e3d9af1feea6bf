"""Process-wide version numbers of what tables keep, for callers that cache addresses."""

from __future__ import annotations

import itertools
import threading


class Version:
    """Number that grows when something changes that callers may have cached.

    Attributes:
        thread: Identifier of the thread that made the last change; 0 before the first.
    """

    def __init__(self) -> None:
        self.thread = 0
        self._number = 0
        self._numbers = itertools.count(1)

    def __call__(self) -> int:
        """Return the number; what was cached under another one is out of date."""
        return self._number

    def advance(self) -> None:
        """Declare everything cached so far out of date."""
        self.thread = threading.get_ident()
        self._number = next(self._numbers)  # one that no other thread sets


layout_version = Version()  # some table has a new storage, dtype, optimizer or lock
block_version = Version()  # some row store has other blocks
removal_version = Version()  # some storage has lost rows, or its row numbers are void
move_version = Version()  # some table was given its device, as each run of a Trainer begins


__all__ = ["Version", "block_version", "layout_version", "move_version", "removal_version"]
