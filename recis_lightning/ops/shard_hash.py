"""Hash of an id by which ids are sharded, and which no other part of a table uses."""

from __future__ import annotations

from torch import Tensor

# As signed 64-bit integers: 0xFF51AFD7ED558CCD and 0xC4CEB9FE1A85EC53.
_MIX_1, _MIX_2 = 0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64
_LOW_31 = (1 << 31) - 1


def shard_hash(ids: Tensor) -> Tensor:
    """Return a hash of each id, the same on every device: it takes whole-number steps only.

    It shares no constant with the hashes of the index and of initial rows, so the ids of one shard
    spread over its index as all ids do.

    Args:
        ids: int64 [*], any values.

    Returns:
        int64 [*], each in ``[0, 2**31)``.

    Source: the finalizer of MurmurHash3 (Appleby, public domain).
    """
    # An arithmetic shift, masked, is a logical one.
    mixed = ids ^ ((ids >> 33) & _LOW_31)
    mixed = mixed * _MIX_1
    mixed = (mixed ^ ((mixed >> 33) & _LOW_31)) * _MIX_2
    return (mixed >> 33) & _LOW_31


__all__ = ["shard_hash"]
