"""Moves of a table to another device or dtype, as ``module.to(...)`` asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from recis_lightning.arguments import is_row_dtype
from recis_lightning.ops import backend
from recis_lightning.ops.layout import NUM_REJECTED
from recis_lightning.table import state as table_state
from recis_lightning.table.pending_gradient import PendingGradient
from recis_lightning.table.storage import Storage


class MovableTable(table_state.StatefulTable, Protocol):
    """A table as its moves know it; ``HashTable`` is the only one.

    Attributes:
        pending: Gradients that no optimizer step has used.
    """

    pending: list[PendingGradient]


def destination(
    table: MovableTable, fn: Callable[[Tensor], Tensor], stays: bool
) -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype to which a module's ``_apply`` would take the rows.

    Args:
        table: The table.
        fn: What ``_apply`` does with each tensor.
        stays: Whether the rows stay on their device.

    Raises:
        ValueError: Rows cannot have the dtype.
        RuntimeError: They would be shared with other processes.
    """
    storage = table.storage
    probe = fn(torch.empty(0, dtype=storage.dtype, device=storage.device))
    device = storage.device if stays else backend.check_device(probe.device)
    if not is_row_dtype(probe.dtype):
        raise ValueError(
            f"table {table.name!r}: expected torch.float32 or torch.bfloat16 for its rows, got "
            f"{probe.dtype}, from module.to(...) or Trainer(precision=...); use precision "
            "'32-true', 'bf16-true' or 'bf16-mixed'"
        )
    if probe.is_shared() and probe.is_cpu:
        raise RuntimeError(
            f"table {table.name!r}: share_memory() cannot share a table, whose memory grows; "
            "let processes load a checkpoint, or use the ranks of a process group"
        )
    return device, probe.dtype


def move(table: MovableTable, new: Storage) -> None:
    """Move everything to another storage, empty so far; pending gradients are forgotten.

    Raises:
        MemoryError: No room there; the table is as it was.
    """
    old, state = table.storage, table_state.export(table)
    new.num_removed, new.num_loaded = old.num_removed + len(old), old.num_loaded
    table_state.fill(new, state)
    new.header.read_counts()[NUM_REJECTED] = old.header.read_counts()[NUM_REJECTED]
    new.header.publish_counts()
    with table.undo():
        # Row numbers that a lookup noted are void, whichever storage it asks about them.
        old.generation = new.generation = old.generation + 1
        table.storage = table.evictor.storage = new
        table.pending.clear()
        table.needs_reshard = True


def convert(table: MovableTable, dtype: torch.dtype) -> None:
    """Convert the weights to another dtype of rows; if that fails, the table is as it was."""
    state = table_state.export(table)
    with table.undo():
        table.storage.set_dtype(dtype)
        table_state.load(table, state)


__all__ = ["MovableTable", "convert", "destination", "move"]
