"""The rank that owns an id."""

from __future__ import annotations

from torch import Tensor

from recis_lightning.arguments import check_ids, check_int

# As signed 64-bit integers: 0xFF51AFD7ED558CCD and 0xC4CEB9FE1A85EC53.
_MIX_1, _MIX_2 = 0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64
_LOW_31 = (1 << 31) - 1


def owner_of(ids: Tensor, world_size: int) -> Tensor:
    """Return the rank whose shard holds each id's row: a hash of the id, modulo ``world_size``.

    The hash takes whole-number steps only, so it is the same on every device; it shares no
    constant with those of the index and of initial rows, so the ids of one shard spread over its
    index as all ids do.

    Args:
        ids: int64 (or int32) [*], any values.
        world_size: Number of ranks, at least 1.

    Returns:
        int64 [*], each in ``[0, world_size)``.

    Raises:
        TypeError, ValueError: ``ids`` is not int64 or int32, or ``world_size`` no int of 1 or more.

    Example:
        >>> import torch
        >>> owner_of(torch.tensor([0, 1, 2, -1]), 4).tolist()
        [0, 2, 0, 1]

    Source: the finalizer of MurmurHash3 (Appleby, public domain).
    """
    check_int("world_size", world_size, least=1)
    # An arithmetic shift, masked, is a logical one.
    ids = check_ids(ids)
    mixed = ids ^ ((ids >> 33) & _LOW_31)
    mixed = mixed * _MIX_1
    mixed = (mixed ^ ((mixed >> 33) & _LOW_31)) * _MIX_2
    return ((mixed >> 33) & _LOW_31) % world_size


__all__ = ["owner_of"]
