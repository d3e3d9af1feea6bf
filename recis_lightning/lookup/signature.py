"""Signatures: numbers by which ranks recognise what another one looks up."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from recis_lightning.distributed import collectives

FINISHED = -1  # of a rank that has no more lookups; the others are not negative


def digest(value: object) -> int:
    """Return a number of 56 bits that is the same on all ranks for values with the same repr."""
    hashed = hashlib.blake2b(repr(value).encode(), digest_size=7).digest()
    return int.from_bytes(hashed, "little")


def broadcast_signature(signature: int, device: torch.device) -> tuple[Tensor, Any]:
    """Send every rank a signature; return each rank's, and the work to ``wait()`` for before."""
    ones = [1] * collectives.world_size()
    message = torch.full((len(ones),), signature, device=device)
    return collectives.all_to_all(message, ones, ones)


__all__ = ["FINISHED", "broadcast_signature", "digest"]
