"""Rows of a saved table that an eviction policy names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recis_lightning.checkpoint.reader import CheckpointReader
from recis_lightning.eviction_policy import KEPT_COLUMNS, Eviction, RowColumns

_SAVED_AS = {"last_time": "ages_us"}  # a saved table has ages, not times


def dropped_rows(
    reader: CheckpointReader, name: str, policy: Eviction, chunk_rows: int
) -> list[Tensor]:
    """Return which rows ``HashTable.evict(policy)`` would remove, bool [rows] for each chunk.

    Holds what the policy decides by, for all rows.

    Args:
        reader: Of the checkpoint.
        name: The table.
        policy: The policy.
        chunk_rows: As for ``CheckpointReader.chunks``.

    Raises:
        ValueError: The policy asks for what the checkpoint does not have of the rows.
    """
    kept = {column: _SAVED_AS.get(column, column) for column in KEPT_COLUMNS}
    parts: dict[str, list[Tensor]] = {column: [] for column in policy.columns}
    evictable, sizes, pinned = [], [], reader.pinned(name)
    for chunk in reader.chunks(name, chunk_rows):
        missing = sorted(c for c in policy.columns if c in kept and kept[c] not in chunk)
        if missing:
            raise ValueError(
                f"drop: {policy!r} asks for {missing}, which table {name!r} of {reader.path} was "
                "saved without; its own eviction policy did not need it"
            )
        sizes.append(len(chunk["ids"]))
        evictable.append(~torch.isin(chunk["ids"], pinned))
        for column, found in parts.items():
            if column == "norms":
                found.append(torch.linalg.vector_norm(chunk["weights"].float(), dim=1))
            else:
                found.append(chunk[kept.get(column, column)])
    may_go = torch.cat(evictable)
    columns: dict[str, Any] = {column: torch.cat(found) for column, found in parts.items()}
    if "last_time" in columns:
        columns["last_time"] = -columns["last_time"].double() / 1e6  # now is 0.0
    rows = RowColumns(
        reader.contents(name).step,
        occupied=torch.ones_like(may_go),
        evictable=may_go,
        **columns,
    )
    return list(policy.name_rows(rows, {}).split(sizes))


__all__ = ["dropped_rows"]
