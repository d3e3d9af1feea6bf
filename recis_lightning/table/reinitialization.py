"""New initial weights for all rows of a table."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from recis_lightning.ops import row_init
from recis_lightning.ops.layout import NUM_UPDATES
from recis_lightning.table.pending_gradient import PendingGradient
from recis_lightning.table.storage import Storage


class SeededTable(Protocol):
    """A table whose rows can start anew; ``HashTable`` is the only one.

    Attributes:
        storage: Its rows.
        pending: Gradients that no optimizer step has used.
        seed: Of new rows.
    """

    storage: Storage
    pending: list[PendingGradient]
    seed: int


def reinitialize_rows(table: SeededTable, ids: Tensor, rows: Tensor, seed: int) -> None:
    """Let rows start from a seed, with an empty optimizer state; done again, it does the same.

    Args:
        table: The table.
        ids: int64 [n], all of its ids.
        rows: int64 [n], their rows.
        seed: Of the new weights.
    """
    storage = table.storage
    table.seed = seed
    table.pending.clear()
    storage.generation += 1  # gradients of lookups before this are for other weights
    storage.num_overwrites += 1 + int(storage.header.fields[NUM_UPDATES])
    storage.header.fields[NUM_UPDATES] = 0
    storage.header.publish()
    storage.note_written(rows)
    if ids.numel():
        every = torch.arange(ids.numel(), device=ids.device)
        segments = storage.segments(ids.contiguous())
        is_bfloat16 = storage.dtype is torch.bfloat16
        row_init.init_rows_(rows, every, segments, storage.embedding_dim, is_bfloat16)


__all__ = ["SeededTable", "reinitialize_rows"]
