"""The rank that owns an id."""

from __future__ import annotations

from torch import Tensor

from recis_lightning.arguments import check_ids, check_int
from recis_lightning.ops.shard_hash import shard_hash


def owner_of(ids: Tensor, world_size: int) -> Tensor:
    """Return the rank whose shard holds each id's row: a hash of the id, modulo ``world_size``.

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
    """
    check_int("world_size", world_size, least=1)
    return shard_hash(check_ids(ids)) % world_size


__all__ = ["owner_of"]
