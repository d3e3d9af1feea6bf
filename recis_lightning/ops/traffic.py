"""Memory traffic of ops: the bytes that each moves at least.

Ids, index entries, rows, gradients and outputs count once for each time that an op's algorithm asks
for them; what caches save, and what a cache line holds besides, is not known here. A sort counts as
one pass over its keys. Each id counts as one that has a row, which is so for most.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from recis_lightning.ops import layout as fields

__all__ = ["of_find", "of_gather", "of_new_rows", "of_sort", "of_update"]

_WORD = 8  # bytes of an id, of a row's number and of an address
_ENTRY = 16  # bytes of an entry of an index


def of_find(num_ids: int) -> int:
    """Return the bytes of looking ids up: id and entry read, row written.

    Example:
        >>> of_find(10)
        320
    """
    return num_ids * (_WORD + _ENTRY + _WORD)


def of_gather(plan: npt.NDArray[np.int64], embedding_dim: int, itemsize: int) -> int:
    """Return the bytes of gathering and pooling: rows and weights read, outputs written.

    Args:
        plan: int64 [num_features, PLAN_SIZE].
        embedding_dim: Weights in a row.
        itemsize: Bytes of a weight, and of an element of the outputs.
    """
    ids, bags = plan[:, fields.PLAN_NUM_IDS], plan[:, fields.PLAN_NUM_BAGS]
    row_bytes = embedding_dim * itemsize
    is_tile = plan[:, fields.PLAN_MODE] == fields.TILE
    outputs = np.where(is_tile, bags * plan[:, fields.PLAN_TILE_LEN], bags)
    is_ragged = plan[:, fields.PLAN_BAG_LENGTH] < 0
    words = ids + np.where(is_ragged, bags + 1, 0)
    weights = np.where(plan[:, fields.PLAN_WEIGHTS] != 0, 4 * ids, 0)
    return int((_WORD * words + weights + row_bytes * (ids + outputs)).sum())


def of_new_rows(num_rows: int, row_bytes: int) -> int:
    """Return the bytes of initialising rows: position and id read, the row written."""
    return num_rows * (2 * _WORD + row_bytes)


def of_sort(num_ids: int) -> int:
    """Return the bytes of sorting positions by row: row read, key and address written, one pass."""
    return num_ids * (_WORD + 2 * _WORD + 2 * _WORD)


def of_update(num_ids: int, num_rows: int, embedding_dim: int, row_bytes: int) -> int:
    """Return the bytes of an update: keys, addresses and gradients read, rows read and written.

    Args:
        num_ids: Positions that have a gradient.
        num_rows: Distinct rows among them.
        embedding_dim: Elements of a gradient, float32.
        row_bytes: Bytes of a row, its state included; 0 if it is only reduced.
    """
    return num_ids * (2 * _WORD + 4 * embedding_dim) + num_rows * 2 * row_bytes
