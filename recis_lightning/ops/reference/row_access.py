"""Access metadata of rows in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from recis_lightning.ops import layout as fields
from recis_lightning.ops.hash_index import Segments
from recis_lightning.ops.reference.index import segments_of
from recis_lightning.ops.reference.storage import memory


def touch_(segments: Segments, rows: Tensor, occurrences: Tensor | None) -> None:
    given = torch.ones_like(rows) if occurrences is None else occurrences
    for segment in segments_of(segments, rows.numel()):
        part = slice(segment.start, segment.start + segment.ids.numel())
        known = rows[part] >= 0
        seen, header = rows[part][known], segment.header
        num_rows = int(seen.max()) + 1 if segment.touches and seen.numel() else 0
        if num_rows and header[fields.COUNTS]:
            counts = memory(int(header[fields.COUNTS]), num_rows, torch.int64)
            counts.index_add_(0, seen, given[part][known])
        if num_rows and header[fields.LAST_TIME]:
            times = memory(int(header[fields.LAST_TIME]), num_rows, torch.int64)
            times[seen] = header[fields.TIME]
