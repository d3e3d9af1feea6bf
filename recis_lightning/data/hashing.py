"""``hash_strings``: 64-bit ids of strings, over Arrow's buffers."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from recis_lightning.arguments import check_int
from recis_lightning.ops import string_hash

__all__ = ["as_arrow", "check_hash", "hash_array", "hash_strings", "with_nulls"]


def hash_strings(
    values: Any, hash: str = "xxh64", seed: int = 0, default: int | None = None
) -> Tensor:
    """Hash strings or bytes to ids, the same on every machine.

    Args:
        values: An Arrow array, a pandas or polars series, a NumPy array or a list, of strings
            (hashed as UTF-8) or bytes. Integers are hashed as the eight bytes of an int64,
            the lowest first.
        hash: ``"xxh64"``; ``"farmhash64"``: FarmHash's ``Fingerprint64``, RecIS's ``farm``;
            ``"murmur3"``: the lower half of MurmurHash3's x64 128-bit hash; ``"murmur64a"``:
            MurmurHash64A, RecIS's ``murmur``.
        seed: At least 0; below 2**32 for ``murmur3``. RecIS has no seed, which is 0 here.
        default: Id of a null; None refuses nulls.

    Returns:
        int64 [n], the bits of the unsigned hash.

    Raises:
        TypeError: ``values`` holds something else.
        ValueError: ``hash`` is unknown, ``seed`` out of range, an integer has more than 64 bits, or
            there is a null and no default.

    Example:
        >>> hash_strings(["", "Berlin", None], default=-1)
        tensor([-1205034819632174695, -5721391512241677820,                   -1])
    """
    check_hash(hash, seed)
    array = with_nulls(as_arrow(values))
    if array.null_count and default is None:
        raise ValueError(f"values: {array.null_count} nulls, and no default= to take for them")
    found = hash_array(array, hash, seed)
    if array.null_count and default is not None:
        found[torch.from_numpy(array.is_null().to_numpy(zero_copy_only=False))] = default
    return found


def check_hash(hash: str | None, seed: int) -> None:
    """Raise unless the hash is known, or None, and takes the seed.

    Raises:
        TypeError: ``seed`` is no int.
        ValueError: Either is out of range.
    """
    if hash is not None and hash not in string_hash.HASHES:
        raise ValueError(f"hash: expected one of {sorted(string_hash.HASHES)}, got {hash!r}")
    most = string_hash.HASHES[hash][1] if hash else 2**63 - 1
    check_int("seed", seed, least=0, most=most)


def hash_array(array: pa.Array, hash: str, seed: int) -> Tensor:
    """Hash an Arrow array to int64 [n]; the ids of nulls mean nothing.

    Raises:
        TypeError: It holds neither strings, bytes nor integers.
    """
    if isinstance(array, pa.ExtensionArray):  # such as arrow.uuid: its bytes
        array = array.storage
    kind = array.type
    if not len(array) or pa.types.is_null(kind):
        return torch.zeros(len(array), dtype=torch.int64, device="cpu")
    if pa.types.is_dictionary(kind):
        if array.dictionary.null_count or not len(array.dictionary):
            return hash_array(array.dictionary_decode(), hash, seed)
        hashes = hash_array(array.dictionary, hash, seed)
        indices = array.indices.fill_null(0).cast(pa.int64()).to_numpy(zero_copy_only=False)
        return torch.from_numpy(hashes.numpy()[indices])
    if pa.types.is_integer(kind):
        values = pc.cast(array, pa.int64(), safe=False).fill_null(0).to_numpy()
        offsets = np.arange(len(array) + 1) * 8
        return string_hash.hash_strings(values.astype("<i8").view(np.uint8), offsets, hash, seed)
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        return hash_array(array.cast(pa.large_binary()), hash, seed)
    if pa.types.is_fixed_size_binary(kind):
        offsets = (np.arange(len(array) + 1) + array.offset) * kind.byte_width
        data = array.buffers()[1]
    elif (
        pa.types.is_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_large_binary(kind)
    ):
        wide = pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)
        _, ends, data = array.buffers()
        offsets = np.frombuffer(ends, np.int64 if wide else np.int32)
        offsets = offsets[array.offset : array.offset + len(array) + 1]
    else:
        raise TypeError(f"expected strings, bytes or integers to hash, got {kind}")
    text = np.empty(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
    return string_hash.hash_strings(text, offsets, hash, seed)


def as_arrow(values: Any) -> pa.Array:
    """Return a list, series, NumPy or Arrow array as one Arrow array."""
    if not isinstance(values, pa.Array | pa.ChunkedArray):
        values = values.to_arrow() if hasattr(values, "to_arrow") else _array_of(values)
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def with_nulls(array: pa.Array) -> pa.Array:
    """Return an array whose nulls are its own: a dictionary may have one among its values."""
    is_hidden = pa.types.is_dictionary(array.type) and array.dictionary.null_count
    return array.dictionary_decode() if is_hidden else array


def _array_of(values: Any) -> pa.Array:
    """Return Python's values as an array; those that int64 does not have as uint64."""
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        # A string's letters would be rows.
        raise TypeError(f"expected a list of values, one for each row, got {values!r:.100}")
    if isinstance(values, np.ndarray) and values.ndim == 2:
        values = list(values)  # a list for each row
    try:
        return pa.array(values)
    except OverflowError:
        wide = pa.uint64()
        for kind in (wide, pa.list_(wide), pa.list_(pa.list_(wide))):
            with suppress(OverflowError, TypeError, pa.ArrowException):
                return pa.array(values, kind)
        raise ValueError("expected integers of 64 bits, all int64 or all uint64") from None
