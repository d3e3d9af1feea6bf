"""Insertion of ids and their rows into one table, whatever its admission policy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from recis_lightning.ops import embedding_bag, hash_index
from recis_lightning.table.statistics import ReadmissionTracker
from recis_lightning.table.storage import Storage


def insert_rows(
    storage: Storage, tracker: ReadmissionTracker | None, ids: Tensor, weights: Tensor
) -> None:
    """Set the weights of ids, giving unknown ones a row; of a repeated id the last row counts.

    Args:
        storage: The table's.
        tracker: Counts evicted ids that come back, or None.
        ids: int64 [n], on the storage's device, contiguous.
        weights: [n, embedding_dim] in the storage's dtype, there too.
    """
    try:
        _insert(storage, tracker, ids, weights)
    except BaseException:
        # Either no id of the call came in, or all did: then their rows are written to the end.
        rows = storage.find(ids)
        if bool((rows >= 0).all()):
            _write_last(storage, rows, weights)
        raise


def _insert(
    storage: Storage, tracker: ReadmissionTracker | None, ids: Tensor, weights: Tensor
) -> None:
    def write_new(rows: Tensor, new: Tensor) -> None:
        if new.numel() and int(new[-1]) < 0:  # a backend that does not wait fills up with -1
            new = new[new >= 0]
        if new.numel() == rows.numel():
            storage.rows.write(rows, weights, {})
        else:
            storage.rows.write(rows[new], weights[new], {})

    rows, new = hash_index.find_or_insert(
        storage.segments(ids, insert=True),
        *(ids.numel(), [storage], [0], storage.device),
        write_new=write_new,
    )
    num_new = 0
    if new is not None:
        new = new[new >= 0] if new.numel() and int(new[-1]) < 0 else new
        num_new = new.numel()
    if num_new < rows.numel():
        _write_last(storage, rows, weights)
    if storage.admission_counter is not None:
        storage.admission_counter.forget(ids)
    if new is not None and tracker is not None:
        tracker.note_new(ids[new].cpu())


def _write_last(storage: Storage, rows: Tensor, weights: Tensor) -> None:
    """Write weights to rows; where a row occurs twice, the last of its weights."""
    chosen = _last_occurrences(rows, storage.rows.num_rows)
    storage.num_overwrites += 1
    storage.note_written(rows[chosen])
    embedding_bag.write_rows_(storage.header, rows[chosen], weights[chosen].contiguous())


def _last_occurrences(rows: Tensor, num_rows: int) -> Tensor:
    """Return the last position of each row that occurs in ``rows``, int64 [m]."""
    count, known = rows.numel(), rows.cpu().numpy()
    if 8 * count < num_rows:
        last = np.unique(known[::-1], return_index=True)[1]
        return torch.from_numpy(count - 1 - last).to(rows.device)
    last, positions = np.empty(num_rows, np.int64), np.arange(count)
    last[known] = positions  # of equal indices NumPy keeps the last
    return torch.from_numpy(np.flatnonzero(last[known] == positions)).to(rows.device)


__all__ = ["insert_rows"]
