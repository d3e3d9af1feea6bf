"""Hash index in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import layout as fields
from recis_lightning.ops.admission import CheckFunction
from recis_lightning.ops.hash_index import Claim, Segments, TableMemory
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import CLAIMED, EMPTY, MISSING, NO_ROW, PADDING, UNKNOWN
from recis_lightning.ops.reference.index import Index, segment_of, segments_of
from recis_lightning.ops.reference.storage import memory


def allocate_entries(capacity: int, device: torch.device) -> Tensor:
    return torch.tensor([[EMPTY, NO_ROW]], device=device).repeat(capacity + 1, 1)


def _look_up(segments: Segments, num_ids: int, missing: int) -> Tensor:
    rows = torch.empty(num_ids, dtype=torch.int64, device="cpu")
    for segment in segments_of(segments, num_ids):
        found = Index.of(segment.header).rows(segment.ids)
        found[found == NO_ROW] = missing if segment.inserts else UNKNOWN
        if segment.padding is not None:
            found[segment.ids == segment.padding] = PADDING
        rows[segment.start : segment.start + segment.ids.numel()] = found
    return rows


def find(segments: Segments, num_ids: int, device: torch.device) -> Tensor:
    return _look_up(segments, num_ids, UNKNOWN)


def find_or_insert(
    segments: Segments,
    num_ids: int,
    tables: Sequence[TableMemory],
    segment_tables: Sequence[int],
    check: CheckFunction | None,
    device: torch.device,
    claims: list[Claim],
    plan: npt.NDArray[np.int64] | None,
    embedding_dim: int,
    kept: dict[str, Any] | None,
) -> tuple[Tensor, Tensor | None]:
    rows = _look_up(segments, num_ids, MISSING)
    for segment in segments_of(segments, num_ids):
        rejected = rows[segment.start : segment.start + segment.ids.numel()] == UNKNOWN
        segment.header[fields.NUM_REJECTED] += rejected.sum()
    if check is not None:
        check((rows == MISSING).nonzero().squeeze(1), rows)
    owner = torch.tensor(segment_tables, device="cpu")[
        segment_of(torch.arange(num_ids, device="cpu"), segments)
    ]
    ids = torch.cat([segment.ids for segment in segments_of(segments, num_ids)])
    new = {}
    for i in range(len(tables)):
        misses = ((rows == MISSING) & (owner == i)).nonzero().squeeze(1)
        _, first = np.unique(ids[misses].numpy(), return_index=True)
        if len(first):
            new[i] = misses[np.sort(first)]
    # All tables get room before the first id is added: a failure changes nothing.
    claims.append(Claim(tables, [_counts(table.header) for table in tables]))
    for i, positions in new.items():
        tables[i].reserve_ids(positions.numel())
        tables[i].reserve_rows(positions.numel())
    for i, positions in new.items():
        header = tables[i].header.tensor
        Index.of(header).add(ids[positions], _take_rows(header, positions.numel()))
    rows = torch.where(rows == MISSING, _look_up(segments, num_ids, UNKNOWN), rows)
    for segment in segments_of(segments, num_ids):
        if int(segment.header[fields.LAST_SEEN]):
            seen = rows[segment.start : segment.start + segment.ids.numel()]
            seen = seen[seen >= 0]
            count = int(seen.max()) + 1 if seen.numel() else 0
            last_seen = memory(int(segment.header[fields.LAST_SEEN]), count, torch.int64)
            last_seen[seen] = segment.header[fields.STEP]
    return rows, torch.cat(list(new.values())).sort().values if new else None


def _counts(header: Header) -> list[int]:
    counts: list[int] = header.fields[fields.NUM_IDS : fields.NUM_FREE + 1].tolist()
    return counts


def _take_rows(header: Tensor, count: int) -> Tensor:
    """Return rows for new ids: freed ones from the top of the stack, then those never used."""
    num_free, next_row = int(header[fields.NUM_FREE]), int(header[fields.NEXT_ROW])
    reused = min(num_free, count)
    stack = memory(int(header[fields.FREE_ROWS]), num_free, torch.int64)
    unused = torch.arange(next_row, next_row + count - reused, device="cpu")
    header[fields.NUM_FREE] -= reused
    header[fields.NEXT_ROW] += count - reused
    header[fields.NUM_IDS] += count
    return torch.cat([stack[num_free - reused :].flip(0), unused])


def rebuild(
    old: tuple[int, int],
    header: Header,
    new: tuple[int, int, int],
    evicted: Tensor | None,
) -> int:
    entries = Index(*old).entries
    entries = entries[entries[:, 1] < CLAIMED]
    removed = torch.zeros(len(entries), dtype=torch.bool, device="cpu")
    if evicted is not None:
        removed = evicted[entries[:, 1]]
        evicted.zero_()
        evicted[entries[removed, 1]] = True
    Index(new[0], new[2]).add(entries[~removed, 0], entries[~removed, 1])
    return int(removed.sum())


def drop_rowless(header: Header) -> int:
    entries, values = Index.of(header.tensor).entries, header.fields
    free = memory(int(values[fields.FREE_ROWS]), int(values[fields.NUM_FREE]), torch.int64)
    rowless = (entries[:, 1] >= int(values[fields.NEXT_ROW])) | torch.isin(entries[:, 1], free)
    entries[rowless, 1] = NO_ROW
    return int((rowless & (entries[:, 0] != EMPTY)).sum())


def id_of_row(header: Header, num_rows: int) -> tuple[Tensor, Tensor]:
    entries = Index.of(header.tensor).entries
    entries = entries[entries[:, 1] != NO_ROW]
    ids = torch.zeros(num_rows, dtype=torch.int64, device="cpu")
    occupied = torch.zeros(num_rows, dtype=torch.bool, device="cpu")
    ids[entries[:, 1]], occupied[entries[:, 1]] = entries[:, 0], True
    return ids, occupied
