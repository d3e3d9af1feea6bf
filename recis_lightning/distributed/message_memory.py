"""Memory of what travels between ranks in each step: rows, sums of gradients, what is received.

Each is made and dropped in every step, and has many megabytes; on the CPU it is taken again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recis_lightning.ops.recycled_memory import RecycledMemory


class MessageMemory:
    """Memory of messages of one kind, apart by width and dtype: those of other tables differ."""

    def __init__(self) -> None:
        self._memory: dict[tuple[int, torch.dtype], RecycledMemory] = {}

    def empty(self, num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised tensor [num_rows, width]."""
        if device.type != "cpu":
            return torch.empty(num_rows, width, dtype=dtype, device=device)
        memory = self._memory.setdefault((width, dtype), RecycledMemory())
        return memory.empty(num_rows, width, dtype)


__all__ = ["MessageMemory"]
