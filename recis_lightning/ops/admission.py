"""Admission of unknown ids: the contract of the check, and of the counts that it keeps.

A table whose policy checks ids keeps an *admission counter* of ids without a row, with a header of
its own that the table's header points to. ``find_or_insert`` checks the ids that it did not find,
between finding and inserting: positions of admitted ids stay MISSING, the others become UNKNOWN. So
known ids cost nothing, and the index of rows holds admitted ids only.

The counter's clock is the number of its table's training lookups. There are three kinds:

- ``COUNT``: open addressing as in ``hash_index``, with entries ``(id, lookup << 32 | count)``: the
  id's occurrences, and the last lookup that had it. An entry is void (as good as absent) if its id
  was admitted before, or did not occur in the last ADMISSION_FORGET_AFTER lookups. Void entries are
  dropped when the counter would otherwise grow.
- ``SKETCH``: a count-min sketch of bytes in blocks, each with one row for each hash function. An
  id's block is its ``shard_hash`` modulo their number: if the number of ranks divides that, all ids
  of a block are on one rank.
- ``DRAW``: no counts; a hash of the table's key, the id and the lookup decides.

Counts stop at ADMISSION_THRESHOLD, so a sum does not depend on the order in which threads add.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import backend, traffic
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import (
    CHECK_ADMISSION,
    MISSING,
    SEGMENT_FLAGS,
    SEGMENT_START,
    UNKNOWN,
)
from recis_lightning.ops.table_memory import TableMemory

CheckFunction = Callable[[Tensor | None, Tensor], Tensor | None]
"""Function of misses and rows, as ``begin_check`` returns it."""


def begin_check(
    segments: npt.NDArray[np.int64],
    num_ids: int,
    tables: Sequence[TableMemory],
    segment_tables: Sequence[int],
    device: torch.device,
    occurrences: Tensor | None,
) -> CheckFunction | None:
    """Begin a training lookup; return the admission check of the ids that it does not find.

    Args:
        segments: As for ``find_or_insert``, like all that follow.
        num_ids: n.
        tables: The group's tables.
        segment_tables: For each segment, the index of its table in ``tables``.
        device: Device of the ids.
        occurrences: int64 [n], how many occurrences each position stands for; None means 1.

    Returns:
        None if no table's policy checks ids. Else a function of misses (int64 [m], ascending
        positions) and rows (int64 [n]): it marks rejected positions in ``rows`` as UNKNOWN and
        returns the other misses. Where the host does not wait for the device, misses are None,
        which stands for the positions that are MISSING in ``rows``, and so is the result.
    """
    checked = np.flatnonzero(segments[:, SEGMENT_FLAGS] & CHECK_ADMISSION).tolist()
    if not checked:
        return None
    numbers = dict.fromkeys(segment_tables[segment] for segment in checked)
    for number in numbers:
        tables[number].count_lookup()
    counted = None if occurrences is None else occurrences.contiguous()

    starts = segments[:, SEGMENT_START]

    def num_checked(misses: Tensor | None) -> int:
        return num_ids if misses is None else len(misses)

    def check(misses: Tensor | None, rows: Tensor) -> Tensor | None:
        with backend.region("recis::screen", lambda: traffic.of_find(num_checked(misses))):
            module = backend.module("admission", device)
            if misses is None:
                bounds = np.append(starts, num_ids)
            else:
                bounds = np.append(np.searchsorted(misses.cpu().numpy(), starts), len(misses))
            at_most = dict.fromkeys(numbers, 0)
            spans: dict[int, list[tuple[int, int]]] = {number: [] for number in numbers}
            for segment in checked:
                number = segment_tables[segment]
                low, high = int(bounds[segment]), int(bounds[segment + 1])
                at_most[number] += high - low
                spans[number].append((low, high))
            for number, num_counted in at_most.items():
                if num_counted:
                    count = None if misses is not None else partial(_count, rows, spans[number])
                    tables[number].reserve_counts(num_counted, count)
            module.check_(segments, num_ids, misses, rows, counted)
            return None if misses is None else misses[rows[misses] != UNKNOWN]

    return check


def _count(rows: Tensor, spans: list[tuple[int, int]]) -> int:
    """Return how many positions in some spans of ``rows`` are MISSING; waits for the device."""
    return int(torch.stack([(rows[low:high] == MISSING).sum() for low, high in spans]).sum())


def decay_(counter: Header, sketch: Tensor, added: Tensor, window: int) -> None:
    """Halve the blocks of a sketch, rounding down, to which ``window`` occurrences were added.

    Args:
        counter: Header of the admission counter.
        sketch: uint8 [num_blocks, num_hashes, width].
        added: int64 [num_blocks], occurrences since a block was last halved; those of the blocks
            that are halved restart from 0.
        window: Number of occurrences.
    """
    if counter.is_mirrored:  # only the device knows whether it is due
        backend.module("admission", counter.device).decay_(sketch, added, window)
        return
    due = (added >= window).nonzero().squeeze(1)
    if due.numel():
        sketch[due] >>= 1
        added[due] = 0


def forget_(counter: Header, ids: Tensor) -> None:
    """Void the counts of some ids in a COUNT counter.

    Args:
        counter: Header of the admission counter.
        ids: int64 [n].
    """
    backend.module("admission", ids.device).forget_(counter, ids)


__all__ = ["CheckFunction", "begin_check", "decay_", "forget_"]
