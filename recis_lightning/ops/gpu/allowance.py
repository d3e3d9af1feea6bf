"""Allowance of a kind of lookup: insertions that the host notes ahead, many lookups at once."""

from recis_lightning.ops.header import Header

_MOST = 15


class Allowance:
    """Lookups of one kind that are noted ahead, as if all their ids were new, and so surely fit.

    It spares a lookup to ask and to tell each table. What is noted is a bound, as ever; whatever
    takes the notes back, or the room, makes it void (``Header.version``). It starts with none, for
    a kind that does not come again.
    """

    __slots__ = ("_left", "_next", "_version")

    def __init__(self):
        self._left = self._next = 0
        self._version = Header.version

    def take(self):
        """Use one of the lookups; return False if none is left."""
        if self._version != Header.version:
            self._left, self._next, self._version = 0, 0, Header.version
        if not self._left:
            return False
        self._left -= 1
        return True

    def most_ahead(self):
        """Return how many lookups to note ahead at most, now that none is left."""
        return self._next

    def grant(self, num_lookups):
        """Allow lookups that the headers of their tables have noted; none if that is negative."""
        self._left = max(num_lookups, 0)
        self._next = min(2 * self._next + 1, _MOST)


__all__ = ["Allowance"]
