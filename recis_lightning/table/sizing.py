"""Room that small tables keep beyond their rows, on the CPU.

A model may have thousands of small tables, so one of up to ``SMALL_IDS`` ids takes at most 4 kB and
1.5 times its payload: ids, weights, optimizer state and columns of policies. What is left of that
beside the rows goes to the index first, up to twice as many entries as ids, and then to rows for
ids to come. So the index of wide rows is half full at most, as that of large tables is, and only
rows of fewer than 12 words have a fuller one. With fewer than 4 words a row the bound is out of
reach: an index entry alone takes more.
"""

from __future__ import annotations

from functools import lru_cache

from recis_lightning.ops.hash_index import MIN_CAPACITY, capacity_for

SMALL_IDS = 1 << 14
_ENTRY_BYTES = 16
# Growth by a sixteenth; for the smallest by 1 kB of entries and 2 kB of rows, which are never more.
_INDEX_STEPS, _ROW_STEP_BYTES = 16, 1 << 11
_MAX_LOAD, _MAX_NARROW_LOAD = 0.5, 0.87
_MIN_GROWTH, _MAX_GROWTH = 1 / 64, 1 / 4


@lru_cache
def _index_bytes_per_id(row_bytes: int) -> float:
    """Return how many bytes the index takes at most for an id, right after it has grown."""
    growth = 1 + 1 / _INDEX_STEPS
    spare = _spare_bytes(row_bytes) - _MIN_GROWTH * row_bytes
    least, most = (growth * _ENTRY_BYTES / load for load in (_MAX_NARROW_LOAD, _MAX_LOAD))
    return min(max(spare, least), most)


def _spare_bytes(row_bytes: int) -> float:
    """Return what 1.5 times the payload of a row is beyond the row itself."""
    return 1.5 * (8 + row_bytes) - row_bytes


def index_capacity(num_ids: int, row_bytes: int) -> int:
    """Return how many entries an index on the CPU has that is made for so many ids.

    Args:
        num_ids: Ids it must hold.
        row_bytes: Bytes of a row, with optimizer state and columns.

    Example:
        >>> index_capacity(1000, row_bytes=64), index_capacity(1000, row_bytes=16)
        (2048, 1216)
    """
    if num_ids > SMALL_IDS:
        return capacity_for(num_ids)
    load = (1 + 1 / _INDEX_STEPS) * _ENTRY_BYTES / _index_bytes_per_id(row_bytes)
    wanted = max(int(-(-num_ids // load)), MIN_CAPACITY)
    step = max((1 << wanted.bit_length() - 1) // _INDEX_STEPS, MIN_CAPACITY)
    return -(-wanted // step) * step


def row_growth(num_rows: int, row_bytes: int) -> int:
    """Return by how many rows at least a store with room for ``num_rows`` grows.

    Args:
        num_rows: Rows there is memory for.
        row_bytes: Bytes of a row, with optimizer state and columns.
    """
    spare = _spare_bytes(row_bytes) - _index_bytes_per_id(row_bytes)
    share = min(max(spare / row_bytes, _MIN_GROWTH), _MAX_GROWTH)
    return max(int(share * num_rows), _ROW_STEP_BYTES // row_bytes)


__all__ = ["SMALL_IDS", "index_capacity", "row_growth"]
