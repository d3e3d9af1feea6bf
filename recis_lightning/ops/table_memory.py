"""Memory of a table, as index ops ask it for room while they insert."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

from recis_lightning.ops.header import Header


class TableMemory(ABC):
    """A table as index ops know it: its header, and room when they ask for it.

    What is not abstract does nothing: a table without a policy or a device need not know of it.

    Attributes:
        header: By which kernels find the table's memory.
    """

    header: Header

    @abstractmethod
    def reserve_ids(self, num_new: int) -> None:
        """Make room in the index for ``num_new`` more ids."""

    @abstractmethod
    def reserve_rows(self, num_new: int) -> None:
        """Make room in the row store for ``num_new`` more rows."""

    @abstractmethod
    def outgrows_index(self, num_new: int) -> bool:
        """Return whether ``num_new`` more ids might need a larger index."""

    def fit_index(self) -> None:
        """Give room in the index back that a small table did not need after all."""

    @property
    def keeps_last_seen(self) -> bool:
        """Whether rows have the step of their last training lookup; it never changes."""
        return False

    @property
    def num_lookups(self) -> int:
        """Number of training lookups that ``count_lookup`` counted."""
        return 0

    @abstractmethod
    def guaranteed_free(self) -> int:
        """Return for how many more ids there surely is room, without waiting for the device.

        Below 0 where more ids than the host has seen may have filled it already.
        """

    def reserve_headroom(self, num_new: int, num_ids: int) -> None:
        """Make room, if there is memory, so that later lookups need not ask again.

        Args:
            num_new: Ids about to be inserted, for which there is room already.
            num_ids: Ids of a lookup, known and unknown.
        """

    def larger_index(self, num_new: int) -> Tensor | None:
        """Allocate an index on the CPU, not cleared, if ``num_new`` more ids need a larger one."""
        return None

    def take_index(self, entries: Tensor) -> None:
        """Make an index from ``larger_index``, with all ids in it, the table's own."""

    def take_back(self, counts: Sequence[int] | None) -> None:
        """Undo an insertion that did not come to its end, as ``hash_index.take_back`` does.

        Args:
            counts: NUM_IDS, NEXT_ROW and NUM_FREE from before; None to leave them.
        """

    def read_clock(self) -> None:
        """Enter the time into the header, if the table keeps times."""

    def count_lookup(self) -> None:
        """Count one training lookup, if an admission policy does."""

    def reserve_counts(self, at_most: int, count: Callable[[], int] | None = None) -> None:
        """Make room for admission counts of ``at_most`` more ids.

        Args:
            at_most: How many there may be.
            count: Waits for the device and returns how many there are; None if ``at_most`` does.
        """


__all__ = ["TableMemory"]
