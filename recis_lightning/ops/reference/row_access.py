"""Access metadata of rows in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from recis_lightning.ops import layout as fields
from recis_lightning.ops.hash_index import Segments
from recis_lightning.ops.reference.index import (
    segments_of,
)
from recis_lightning.ops.reference.storage import memory


def stamp_(segments: Segments, rows: Tensor, sightings: Tensor | None) -> None:
    """See ``row_stamps.stamp_``."""
    given = torch.ones_like(rows) if sightings is None else sightings
    for segment in segments_of(segments, rows.numel()):
        part = slice(segment.start, segment.start + segment.ids.numel())
        known = rows[part] >= 0
        seen, header = rows[part][known], segment.header
        reach = int(seen.max()) + 1 if segment.stamps and seen.numel() else 0
        if reach and header[fields.COUNTS]:
            counts = memory(int(header[fields.COUNTS]), reach, torch.int64)
            counts.index_add_(0, seen, given[part][known])
        if reach and header[fields.LAST_TIME]:
            memory(int(header[fields.LAST_TIME]), reach, torch.int64)[seen] = header[fields.TIME]
