"""Which unknown ids of a lookup are let in: the contract, and the memory of sightings.

A table whose policy *screens* remembers something of ids without a row, behind a header of its own
(the *memory*), which the table's header points to. ``find_or_insert`` screens what it did not find,
between finding and inserting: positions whose id may come in stay MISSING, others become UNKNOWN.
So known ids cost nothing, and the index of rows holds none but admitted ids.

The clock of a memory is the number of its table's training lookups. Three kinds of memory:

- ``COUNT``: open addressing as in ``hash_index``, entries ``(id, lookup << 32 | count)``: how often
  the id was sighted, and in which lookup last. An entry says nothing (it is as good as absent) if
  its id was let in before, or was not sighted in the last FORGET_AFTER lookups. Such entries go
  when the memory would otherwise grow.
- ``SKETCH``: a count-min sketch of bytes, one row of it a hash function.
- ``DRAW``: none; whether an id comes in is a hash of the table's key, the id and the lookup.

Counts stop at THRESHOLD, so a sum does not depend on the order in which threads add to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import backend
from recis_lightning.ops import layout as fields
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import MISSING, SCREEN, SEGMENT_FLAGS, SEGMENT_START, UNKNOWN
from recis_lightning.ops.table_memory import TableMemory

# Aliases until all rooms name the fields of ops.layout.
NUM_COUNTED = fields.ADMISSION_NUM_COUNTED
KIND = fields.ADMISSION_KIND
THRESHOLD = fields.ADMISSION_THRESHOLD
NUM_LOOKUPS = fields.ADMISSION_NUM_LOOKUPS
FORGET_AFTER = fields.ADMISSION_FORGET_AFTER
PER_BATCH = fields.ADMISSION_PER_BATCH
COUNTERS = fields.ADMISSION_COUNTERS
WIDTH = fields.ADMISSION_WIDTH
NUM_HASHES = fields.ADMISSION_NUM_HASHES
COUNT = fields.COUNT
SKETCH = fields.SKETCH
DRAW = fields.DRAW
COUNT_MASK = fields.COUNT_MASK
MAX_LOOKUPS = fields.MAX_LOOKUPS
MAX_COUNTER = fields.MAX_COUNTER

Screen = Callable[[Tensor | None, Tensor], Tensor | None]


def screening(
    segments: npt.NDArray[np.int64],
    num_ids: int,
    tables: Sequence[TableMemory],
    segment_tables: Sequence[int],
    device: torch.device,
    sightings: Tensor | None,
) -> Screen | None:
    """Begin a training lookup; return what it asks about the ids that it does not find.

    Args:
        segments: As for ``find_or_insert``, like all that follow.
        num_ids: n.
        tables: The group's tables.
        segment_tables: For each segment, its table's position in ``tables``.
        device: Where the ids are.
        sightings: int64 [n], occurrences that each position stands for; None means 1.

    Returns:
        None if no table screens. Else a function of misses (int64 [m], ascending positions) and
        rows (int64 [n]) that marks in ``rows`` whose id may not come in, and returns the others.
        Where the host does not wait for the device, misses are None: those that ``rows`` has as
        MISSING; and so is what is returned.
    """
    screened = np.flatnonzero(segments[:, SEGMENT_FLAGS] & SCREEN).tolist()
    if not screened:
        return None
    numbers = dict.fromkeys(segment_tables[segment] for segment in screened)
    for number in numbers:
        tables[number].count_lookup()
    weights = None if sightings is None else sightings.contiguous()

    starts = segments[:, SEGMENT_START]

    def screen(misses: Tensor | None, rows: Tensor) -> Tensor | None:
        with backend.region("recis::screen"):
            module = backend.module("admission", device)
            if misses is None:
                cuts = np.append(starts, num_ids)
            else:
                cuts = np.append(np.searchsorted(misses.cpu().numpy(), starts), len(misses))
            at_most = dict.fromkeys(numbers, 0)
            parts: dict[int, list[tuple[int, int]]] = {number: [] for number in numbers}
            for segment in screened:
                number = segment_tables[segment]
                low, high = int(cuts[segment]), int(cuts[segment + 1])
                at_most[number] += high - low
                parts[number].append((low, high))
            for number, num_sighted in at_most.items():
                if num_sighted:
                    count = None if misses is not None else partial(_count, rows, parts[number])
                    tables[number].reserve_counts(num_sighted, count)
            module.screen(segments, num_ids, misses, rows, weights)
            return None if misses is None else misses[rows[misses] != UNKNOWN]

    return screen


def _count(rows: Tensor, parts: list[tuple[int, int]]) -> int:
    """Return how many positions of some stretches of ``rows`` are MISSING; waits for them."""
    return int(torch.stack([(rows[low:high] == MISSING).sum() for low, high in parts]).sum())


def fade_(memory: Header, counters: Tensor, window: int) -> None:
    """Halve a sketch, rounding down, if ``window`` occurrences were added since the last time.

    Args:
        memory: Its header; NUM_COUNTED starts again from 0 then.
        counters: uint8 [num_hashes * width], padded to whole words of 4 bytes.
        window: Occurrences.
    """
    if memory.is_mirrored:  # only the device knows whether it is due
        backend.module("admission", memory.device).fade_(memory, counters, window)
        return
    values = memory.fields
    if values[NUM_COUNTED] >= window:
        counters >>= 1
        values[NUM_COUNTED] = 0


def forget_(memory: Header, ids: Tensor) -> None:
    """Make a COUNT memory say nothing of some ids.

    Args:
        memory: Its header.
        ids: int64 [n].
    """
    backend.module("admission", ids.device).forget_(memory, ids)


__all__ = ["Screen", "fade_", "forget_", "screening"]
