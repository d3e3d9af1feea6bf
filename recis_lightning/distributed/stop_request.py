"""Signals that ask a run to stop: noted by one rank, and known to all with the next heads.

Ranks get a signal at different moments, or only one of them gets it. So a signal handler only notes
it; the note travels in every head, and after an exchange all ranks know the same.
"""

from __future__ import annotations

from recis_lightning.distributed.process_group import world_size


class StopRequest:
    """Number of what asks this process's run to stop; 0 for nothing. The greatest counts.

    Attributes:
        own: What this rank was told.
        known: The greatest number that any rank had told with the last heads; the same on all.
    """

    def __init__(self) -> None:
        self.own = 0
        self.known = 0

    def note(self, number: int) -> None:
        """Note a positive number; safe in a signal handler."""
        self.own = max(self.own, number)

    def agreed(self) -> int:
        """Return the number that all ranks know of, 0 for none; the same on all level ranks."""
        return self.own if world_size() == 1 else self.known

    def clear(self) -> None:
        """Forget what was noted: before a run."""
        self.own = self.known = 0


STOP_REQUEST = StopRequest()

__all__ = ["STOP_REQUEST", "StopRequest"]
