"""Changes of a table's rows since marks that were set: which rows, and which ids have gone.

Each row has a byte, of which each of up to eight marks owns a bit: it is set where the row is as it
was at the mark. The update kernel writes 0 to the bytes of its rows, one store a row; a row that no
id has is always 0, so that whatever id gets it counts as changed. So lookups and growth do nothing
for it, and what removes ids notes them here.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_MARKS = 8


class RowChanges:
    """Marks of one storage, and what each must know beside the rows' bytes.

    Noting too much is harmless: a change that is undone may stay noted.
    """

    def __init__(self) -> None:
        self._removed: dict[int, list[Tensor]] = {}
        self._whole: set[int] = set()

    def add(self) -> int:
        """Set a mark before all rows; return its bit, 1 to 128.

        Raises:
            RuntimeError: There are eight already.
        """
        for bit in (1 << number for number in range(_MAX_MARKS)):
            if bit not in self._removed:
                self._removed[bit] = []
                self._whole.add(bit)
                return bit
        raise RuntimeError(f"a table's changes have {_MAX_MARKS} consumers at most; close one")

    def drop(self, bit: int) -> bool:
        """Forget a mark; return whether none is left."""
        self._removed.pop(bit, None)
        self._whole.discard(bit)
        return not self._removed

    def note_all(self) -> None:
        """Note that no row is as it was."""
        self._whole.update(self._removed)
        for removed in self._removed.values():
            removed.clear()

    def note_removed(self, ids: Tensor) -> None:
        """Note that ids have gone, int64 [n] on the CPU."""
        if ids.numel():
            for removed in self._removed.values():
                removed.append(ids)

    def is_whole(self, bit: int) -> bool:
        """Return whether all rows count as changed since a mark."""
        return bit in self._whole

    def take_removed(self, bit: int) -> Tensor:
        """Return the ids that have gone since a mark, int64 [n] distinct, and forget them."""
        removed = self._removed[bit]
        self._removed[bit] = []
        self._whole.discard(bit)
        return (
            torch.cat(removed).unique()
            if removed
            else torch.empty(0, dtype=torch.int64, device="cpu")
        )

    def put_back(self, bit: int, removed: Tensor, whole: bool) -> None:
        """Note again what was taken."""
        if removed.numel():
            self._removed[bit].append(removed)
        if whole:
            self._whole.add(bit)


__all__ = ["RowChanges"]
