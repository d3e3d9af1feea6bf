"""Room for the new ids of a training lookup, in tables whose number of rows is limited."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from recis_lightning.distributed import collectives
from recis_lightning.lookup.features import FeatureLayout
from recis_lightning.ops.hash_index import Segments
from recis_lightning.ops.layout import MISSING, SEGMENT_START


class RoomMaker:
    """Evicts rows of limited tables before a lookup inserts ids that there is no room for.

    All ranks that share the tables call it in the same lookup. Rows stay whose ids the lookup has,
    and those that another lookup may still read or bring gradients for.

    Args:
        layout: The group's features.
        segments: Which say where the ids lie.
        ids: int64 [n_i] for each segment.
        segment_tables: For each segment, its table's position in ``layout.tables``.
        undo: Gets what puts evicted rows back if the lookup fails later.
    """

    def __init__(
        self,
        layout: FeatureLayout,
        segments: Segments,
        ids: Sequence[Tensor],
        segment_tables: Sequence[int],
        undo: ExitStack,
    ) -> None:
        self._layout, self._ids, self._undo = layout, ids, undo
        self._starts: list[int] = segments[:, SEGMENT_START].tolist()
        self._segment_tables = segment_tables

    def __call__(self, rows: Tensor) -> None:
        """Make room.

        Args:
            rows: int64 [n]; MISSING where an id is about to be inserted.

        Raises:
            RuntimeError: A table has too few rows that may go (names it).
        """
        tables = self._layout.tables
        limited = [i for i, table in enumerate(tables) if table.evictor.limit is not None]
        group, device = self._layout.process_group, self._layout.device
        sizes = [(len(tables[i].storage), self._count_new(i, rows)) for i in limited]
        if collectives.world_size(group) > 1:
            own = torch.tensor(sizes, dtype=torch.int64, device=device)
            sizes = collectives.sum_over_ranks(own, group).tolist()
        for i, (num_rows, num_new) in zip(limited, sizes, strict=True):
            evictor = tables[i].evictor
            assert evictor.limit is not None
            if num_new and num_rows + num_new > evictor.limit.max_rows:
                undo = self._undo.enter_context(evictor.undo())
                evictor.make_room(num_new, self._in_use(i, rows), undo, group)

    def _parts(self, table: int, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ids and rows of each segment of a table, int64 [n_i]."""
        for ids, start, owner in zip(self._ids, self._starts, self._segment_tables, strict=True):
            if owner == table:
                yield ids, rows[start : start + ids.numel()]

    def _count_new(self, table: int, rows: Tensor) -> int:
        """Return how many distinct ids are about to be inserted into a table."""
        missing = [ids[found == MISSING] for ids, found in self._parts(table, rows)]
        return torch.cat(missing).unique().numel() if missing else 0

    def _in_use(self, number: int, rows: Tensor) -> Iterator[Tensor]:
        """Yield rows of a table that must stay, int64 [n] each, some of them negative."""
        for _, found in self._parts(number, rows):
            yield found
        table = self._layout.tables[number]
        for lookup in list(table.evictor.lookups):
            yield from lookup.rows_in_use(table)


def note_lookup(layout: FeatureLayout, record: object) -> None:
    """Let limited tables keep the rows of a lookup as long as they are in use.

    Args:
        layout: Of the lookup.
        record: Has ``rows_in_use(table)``, which yields them; tables do not keep it alive.
    """
    for table in layout.limited:
        table.evictor.lookups.add(record)


__all__ = ["RoomMaker", "note_lookup"]
