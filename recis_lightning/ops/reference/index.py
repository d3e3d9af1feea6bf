"""Readers of the hash index and of a lookup's segments, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from recis_lightning.ops import layout as fields
from recis_lightning.ops.hash_index import Segments
from recis_lightning.ops.layout import EMPTY, LINE_ENTRIES, NO_ROW
from recis_lightning.ops.reference.storage import header_at, memory


def shift_right(values: Tensor, bits: int) -> Tensor:
    """Shift int64 as if it were unsigned."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def signed(value: int) -> int:
    """Return the int64 with the bits of an unsigned constant."""
    return value - 2**64 if value >= 2**63 else value


_SLOT_MIX_1, _SLOT_MIX_2 = signed(0x9E3779B97F4A7C15), signed(0xD6E8FEB86659FD93)
_ID_MIX_1, _ID_MIX_2 = signed(0xBF58476D1CE4E5B9), signed(0x94D049BB133111EB)


def mix(values: Tensor) -> Tensor:
    """Hash int64 (the finaliser of SplitMix64)."""
    values = (values ^ shift_right(values, 30)) * _ID_MIX_1
    values = (values ^ shift_right(values, 27)) * _ID_MIX_2
    return values ^ shift_right(values, 31)


class Index:
    """Entries of a hash index, int64 [capacity + 1, 2], with linear probing."""

    def __init__(self, address: int, capacity: int) -> None:
        self.entries = memory(address, 2 * (capacity + 1), torch.int64).view(-1, 2)
        self.capacity = capacity

    @classmethod
    def of(cls, header: Tensor) -> Index:
        """Return the index that a header points to."""
        return cls(int(header[fields.ENTRIES]), int(header[fields.CAPACITY]))

    def _first_slots(self, ids: Tensor) -> Tensor:
        mixed = ids * _SLOT_MIX_1
        mixed = (mixed ^ shift_right(mixed, 32)) * _SLOT_MIX_2
        # The upper half of the product of hash and capacity, by halves of the hash.
        low = (mixed & (1 << 32) - 1) * self.capacity
        high = shift_right(mixed, 32) * self.capacity + shift_right(low, 32)
        slots = shift_right(high, 32) & -LINE_ENTRIES
        return torch.where(ids == EMPTY, self.capacity, slots)

    def _next_slots(self, slots: Tensor) -> Tensor:
        return torch.where(slots + 1 == self.capacity, 0, slots + 1)

    def slots(self, ids: Tensor) -> Tensor:
        """Return each id's entry, an empty one where it has none."""
        slots = self._first_slots(ids)
        searching = torch.arange(ids.numel(), device="cpu")
        while searching.numel():
            keys = self.entries[slots[searching], 0]
            searching = searching[(keys != ids[searching]) & (keys != EMPTY)]
            slots[searching] = self._next_slots(slots[searching])
        return slots

    def rows(self, ids: Tensor) -> Tensor:
        """Return each id's row, ``NO_ROW`` where it has none."""
        slots = self.slots(ids)
        known = self.entries[slots, 0] == ids
        return torch.where(known, self.entries[slots, 1], NO_ROW)

    def add(self, ids: Tensor, rows: Tensor) -> None:
        """Add distinct ids that the index does not have yet."""
        slots = self._first_slots(ids)
        remaining = torch.arange(ids.numel(), device="cpu")
        while remaining.numel():
            tried = slots[remaining]
            free = self.entries[tried, 0] == EMPTY
            # Several ids may try one empty entry: whichever is written last gets it.
            self.entries[tried[free], 0] = ids[remaining[free]]
            placed = self.entries[tried, 0] == ids[remaining]
            self.entries[tried[placed], 1] = rows[remaining[placed]]
            remaining = remaining[~placed]
            slots[remaining] = self._next_slots(slots[remaining])


class Segment(NamedTuple):
    """Segment of a lookup, with its ids and its table's header as tensors."""

    start: int
    ids: Tensor
    header: Tensor
    inserts: bool
    has_check: bool
    touches: bool
    padding: int | None


def segments_of(segments: Segments, num_ids: int) -> Iterator[Segment]:
    """Yield the segments of a lookup."""
    starts = segments[:, fields.SEGMENT_START].tolist()
    for line, start, end in zip(segments.tolist(), starts, [*starts[1:], num_ids], strict=True):
        flags = line[fields.SEGMENT_FLAGS]
        yield Segment(
            start,
            memory(line[fields.SEGMENT_IDS] + 8 * start, end - start, torch.int64),
            header_at(line[fields.SEGMENT_HEADER]),
            bool(flags & fields.INSERT),
            bool(flags & fields.CHECK_ADMISSION),
            bool(flags & fields.TOUCH),
            line[fields.SEGMENT_PADDING] if flags & fields.HAS_PADDING else None,
        )


def segment_of(positions: Tensor, segments: Segments) -> Tensor:
    """Return the segment of each position; an empty segment has none."""
    starts = torch.from_numpy(segments[:, fields.SEGMENT_START].copy())
    return torch.searchsorted(starts, positions, right=True) - 1
