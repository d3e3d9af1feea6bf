"""Digests: numbers by which ranks recognise what another one is about."""

from __future__ import annotations

import hashlib


def digest(value: object) -> int:
    """Return a number of 56 bits that is the same on all ranks for values with the same repr.

    Example:
        >>> digest(("user", 3)) == digest(("user", 3)), digest("user") == digest("item")
        (True, False)
    """
    hashed = hashlib.blake2b(repr(value).encode(), digest_size=7).digest()
    return int.from_bytes(hashed, "little")


__all__ = ["digest"]
