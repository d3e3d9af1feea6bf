"""Give ids rows in their tables: what a training lookup does, on one rank or at an owner."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from recis_lightning.ops import hash_index, row_init
from recis_lightning.ops.hash_index import Segments
from recis_lightning.ops.layout import SEGMENT_START
from recis_lightning.table.hash_table import HashTable

_storage = attrgetter("storage")  # for a map over hundreds of tables


def find_or_insert_rows(
    segments: Segments,
    ids: Sequence[Tensor],
    num_ids: int,
    tables: Sequence[HashTable],
    segment_tables: Sequence[int],
    sightings: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the rows of ids, giving those that are admitted and have none an initial one.

    Args:
        segments: int64 [num_segments, SEGMENT_SIZE], which say where the ids lie.
        ids: int64 [n_i] for each segment.
        num_ids: n, in all segments together.
        tables: Of one device, dtype and dim.
        segment_tables: For each segment, its table's position in ``tables``.
        sightings: int64 [n], occurrences that each position stands for; None means 1.

    Returns:
        As ``hash_index.find_or_insert``: rows, int64 [n], and which positions are new.
    """
    first = tables[0]
    rows, new = hash_index.find_or_insert(
        segments, num_ids, list(map(_storage, tables)), segment_tables, first.device, sightings
    )
    if new is not None:
        bfloat16 = first.dtype is torch.bfloat16
        row_init.init_rows_(rows, new, segments, first.embedding_dim, bfloat16)
        if any(table.evictor.readmissions is not None for table in tables):
            _note_new(segments, ids, new, [tables[table] for table in segment_tables])
    return rows, new


def _note_new(
    segments: Segments, ids: Sequence[Tensor], new: Tensor, tables: Sequence[HashTable]
) -> None:
    """Tell the tables that track readmissions which of their ids are new."""
    starts, new = segments[:, SEGMENT_START], new[new >= 0]
    cuts = [*np.searchsorted(new.cpu().numpy(), starts), new.numel()]
    for number, table in enumerate(tables):
        tracker = table.evictor.readmissions
        if tracker is not None:
            mine = new[cuts[number] : cuts[number + 1]] - int(starts[number])
            tracker.note_new(ids[number][mine].cpu())


__all__ = ["find_or_insert_rows"]
