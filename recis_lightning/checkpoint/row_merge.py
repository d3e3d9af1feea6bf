"""Rows of a saved table on top of those that a table has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recis_lightning.checkpoint.reader import CheckpointReader
from recis_lightning.distributed import collectives
from recis_lightning.distributed.ownership import owner_of
from recis_lightning.table import state as table_state
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.state_schema import row_columns

_CHUNK_ROWS = 1 << 18


def merge_rows(reader: CheckpointReader, name: str, table: HashTable, with_state: bool) -> None:
    """Set the rows of a saved table's ids in a table; rows of other ids stay as they are.

    The rows count as seen at the table's step. Until it returns, memory holds what there was and
    what comes; after an exception the table is as it was.

    Args:
        reader: Of the saved table.
        name: Its name.
        table: The table that gets the rows that this rank owns.
        with_state: Whether optimizer state comes along; else it starts afresh for these rows.
    """
    with table.undo():
        own, new = table_state.export(table), _read(reader, name, table)
        ids = new["ids"]
        stays = torch.isin(own["ids"], ids, invert=True)
        state = {**own, "ids": torch.cat([own["ids"][stays], ids])}
        state["weights"] = torch.cat([own["weights"][stays], new["weights"]])
        if with_state:  # which bias correction takes for that of so many updates
            saved = reader.contents(name).num_updates
            state["num_updates"] = max(own["num_updates"], saved)
        fill = own["state_fill"]
        state["slots"] = {}
        for slot, values in own["slots"].items():
            if with_state and slot in new:
                given = new[slot]
            else:
                given = torch.full((len(ids), values.shape[1]), fill, device="cpu")
            state["slots"][slot] = torch.cat([values[stays], given])
        first = {"last_seen": table.step, "counts": 1, "ages_us": 0}
        for column in row_columns(own):
            if column != "ids":
                added = torch.full_like(ids, first[column])
                state[column] = torch.cat([own[column][stays], added])
        table_state.load(table, state)


def _read(reader: CheckpointReader, name: str, table: HashTable) -> dict[str, Any]:
    """Return the rows of a saved table that this rank owns, by column, on the CPU."""
    rank, world_size = collectives.rank(), collectives.world_size()
    chunks: list[dict[str, Tensor]] = []
    for read in reader.chunks(name, _CHUNK_ROWS):
        chunk = dict(read)
        if world_size > 1:
            own = owner_of(chunk["ids"], world_size) == rank
            chunk = {column: values[own] for column, values in chunk.items()}
        chunk["weights"] = chunk["weights"].to(table.dtype)
        chunks.append(chunk)
    return {column: torch.cat([chunk[column] for chunk in chunks]) for column in chunks[0]}


__all__ = ["merge_rows"]
