"""Rows that this rank owns, wherever they are in a table's shard files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from recis_lightning.checkpoint.chunks import ProgressCallback, parallel_for, prefetch
from recis_lightning.checkpoint.commit import SLOT_PREFIX
from recis_lightning.checkpoint.shard_file import ShardFile
from recis_lightning.distributed.ownership import owner_of
from recis_lightning.table import state as table_state
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.state_schema import is_field


class OwnedRows:
    """Rows of open shard files, all of them or those that one of several ranks owns.

    Args:
        files: Files of one table.
        slots: Optimizer state in them.
        rank: This rank.
        world_size: Number of ranks to divide the rows among; 1 takes all rows.
    """

    def __init__(
        self, files: Sequence[ShardFile], slots: Sequence[str], rank: int, world_size: int
    ) -> None:
        self._files, self._slots = files, list(slots)
        self._tensors = _row_tensors(slots)
        self._rank, self._world_size = rank, world_size
        self._positions = [self._owned(file, "ids") for file in files]

    def state(self) -> dict[str, Any]:
        """Return the state of the table with these rows, without weights and slots."""
        state: dict[str, Any] = {}
        for file, positions in zip(self._files, self._positions, strict=True):
            for key, value in file.metadata.items():
                if not is_field(key):
                    continue
                known = state.setdefault(key, value)
                # Ranks whose steps differ continue from the largest.
                if isinstance(value, int) and not isinstance(value, bool):
                    state[key] = max(known, value)
            self._add_tensors(state, file, positions)
        return {
            key: (value[0] if len(value) == 1 else torch.cat(value))
            if isinstance(value, list)
            else value
            for key, value in state.items()
        }

    def _add_tensors(
        self, state: dict[str, Any], file: ShardFile, positions: Tensor | None
    ) -> None:
        """Add a file's tensors to those of the files before; lists of them are to be joined."""
        chosen = {"ids": positions}
        for key in file.specs:
            if key == "weights" or key.startswith(SLOT_PREFIX):
                continue
            ids = table_state.KEYED_BY.get(key)
            # Columns of rows are copied into the table; it may keep the other tensors.
            value = file.view(key) if ids == "ids" else file.read(key)
            if ids is None:  # not of single ids: each rank keeps the maximum over all ranks
                state[key] = torch.maximum(state.setdefault(key, value), value)
                continue
            if ids not in chosen:
                chosen[ids] = self._owned(file, ids)
            rows = chosen[ids]
            state.setdefault(key, []).append(value if rows is None else value[rows])

    def _owned(self, file: ShardFile, ids: str) -> Tensor | None:
        """Return int64 [n], ascending positions of ids that the rank owns; None for all."""
        if self._world_size == 1:
            return None
        owners = owner_of(file.view(ids), self._world_size)
        return (owners == self._rank).nonzero().squeeze(1)

    def write(self, table: HashTable, rows: Tensor, on_progress: ProgressCallback) -> None:
        """Write weights and slots to a table.

        Args:
            table: The table.
            rows: int64 [n], its rows for the ids of ``state``, in their order.
            on_progress: Called with bytes read.
        """
        chunks, first = [], 0
        for file, positions in zip(self._files, self._positions, strict=True):
            length, step = file.specs["ids"].shape[0], file.chunk_rows["ids"]
            for index, start in enumerate(range(0, length, step)):
                stop, chosen = min(start + step, length), None
                if positions is not None:
                    low, high = torch.searchsorted(
                        positions, torch.tensor([start, stop], device="cpu")
                    ).tolist()
                    chosen = positions[low:high] - start
                count = stop - start if chosen is None else len(chosen)
                if count:
                    chunks.append((file, index, chosen, rows[first : first + count]))
                first += count

        def write_chunk(number: int) -> int:
            file, index, chosen, targets = chunks[number]
            parts = [file.chunk(name, index) for name in self._tensors]
            num_bytes = sum(part.nbytes for part in parts)
            if chosen is not None:
                parts = [part[chosen] for part in parts]
            weights, *slots = parts
            table.storage.rows.write(
                targets, weights.to(table.dtype), dict(zip(self._slots, slots, strict=True))
            )
            return num_bytes

        parallel_for(len(chunks), write_chunk, on_progress)


def prefetch_rows(files: Sequence[ShardFile], slots: Sequence[str]) -> AbstractContextManager[None]:
    """Read rows of open files from the disk in the background, until the context ends."""
    names = _row_tensors(slots)
    mapped = [file for file in files if file.is_mapped]
    chunks = [(file, index) for file in mapped for index in range(file.num_chunks("weights"))]
    if len(chunks) < 2:  # there is nothing to be ahead of, and a thread takes time to start
        return nullcontext()

    def prepare(number: int) -> None:
        file, index = chunks[number]
        for name in names:
            file.prefetch(name, index)

    return prefetch(len(chunks), prepare)


def _row_tensors(slots: Sequence[str]) -> list[str]:
    """List the tensors of a file that a row is made of, in its order."""
    return ["weights", *(SLOT_PREFIX + slot for slot in slots)]


__all__ = ["OwnedRows", "prefetch_rows"]
