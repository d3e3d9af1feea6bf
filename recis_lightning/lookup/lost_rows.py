"""Rows that a rank's tables lost after a lookup, though gradients have come for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from recis_lightning.distributed import collectives
from recis_lightning.distributed.process_group import ProcessGroup
from recis_lightning.lookup.gradient_ledger import LedgerEntry
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.pending_gradient import PendingGradient


def check_rows(
    entries: Sequence[LedgerEntry],
    records: Sequence[dict[PendingGradient, set[HashTable]]],
    sends: npt.NDArray[Any],
    stale: npt.NDArray[Any],
    process_group: ProcessGroup | None,
) -> None:
    """Raise if a table that any rank has gradients for lost rows since the lookup.

    All ranks call it with the same ``sends`` and ``stale``. Only where a lookup has both they ask
    one another for which of its tables. The gradients of such a lookup are dropped, so that later
    steps are as if it had not been.

    Args:
        entries: The lookups.
        records: For each, this rank's gradients and the tables that they are for.
        sends: bool [num_ranks, num_entries], whether the rank has gradients for it.
        stale: bool [num_ranks, num_entries], whether one of its tables lost rows on the rank.
        process_group: The ranks; None means all.

    Raises:
        RuntimeError: Names table and rank; on every rank.
    """
    doubtful: list[int] = np.flatnonzero(sends.any(0) & stale.any(0)).tolist()
    if not doubtful:
        return
    told = [
        (_positions_of(entries[number], records[number]), entries[number].stale_tables())
        for number in doubtful
    ]
    of_ranks = collectives.gather(told, process_group)
    message = ""
    for place, number in enumerate(doubtful):
        tables = entries[number].route.layout.tables
        used = {position for its in of_ranks for position in its[place][0]}
        for rank, its in zip(collectives.global_ranks(process_group), of_ranks, strict=True):
            lost = sorted(used.intersection(its[place][1]))
            if lost:
                message = message or (
                    f"table {tables[lost[0]].name!r} lost rows on rank {rank} between a lookup and "
                    "the step that uses its gradients (evict, delete, clear or load), which are "
                    "dropped; run backward and step first, or look up again"
                )
                _drop(records[number])
    if message:
        raise RuntimeError(message)


def _positions_of(entry: LedgerEntry, records: dict[PendingGradient, set[HashTable]]) -> list[int]:
    """Return the tables of a lookup, by position, that this rank has gradients for."""
    used = {table for tables in records.values() for table in tables}
    return [i for i, table in enumerate(entry.route.layout.tables) if table in used]


def _drop(records: dict[PendingGradient, set[HashTable]]) -> None:
    for record, tables in records.items():
        for table in tables:
            if record in table.pending:
                table.pending.remove(record)


__all__ = ["check_rows"]
