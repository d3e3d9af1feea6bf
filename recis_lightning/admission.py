"""Which unknown ids get a row."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Admission(ABC):
    """Decides in a training lookup whether unknown ids are admitted; None as a policy admits all.

    An id that is not admitted reads as zeros, gets no row, no gradient and no stamp.
    """

    @property
    @abstractmethod
    def admits(self) -> bool:
        """Whether unknown ids get a row at all."""


class ReadOnly(Admission):
    """Admit nothing: known ids are read and trained as usual, unknown ids read as zeros."""

    @property
    def admits(self) -> bool:
        """See ``Admission``."""
        return False

    def __repr__(self) -> str:
        return "ReadOnly()"


__all__ = ["Admission", "ReadOnly"]
