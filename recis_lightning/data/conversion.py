"""Arrow arrays to tensors, without a Python object for any value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from recis_lightning.data.hashing import hash_array, with_nulls

__all__ = [
    "bags_of",
    "fill_nulls",
    "float_of",
    "int64_of",
    "is_list",
    "one_of_list",
    "ticks_per_second",
]

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def is_list(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's lists, whatever its layout."""
    return bool(
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def int64_of(array: pa.Array, hash: str | None, seed: int) -> Tensor:
    """Return ids of an array, int64 [n]; those of nulls mean nothing.

    Args:
        array: With ``hash``, what ``hash_array`` takes. Without: integers of any width (a uint64
            keeps its bits), bools, whole decimals, or times, dates and durations in their own unit.
        hash: Hash of the values, or None.
        seed: Of the hash.

    Raises:
        TypeError: The type is another.
        ValueError: A decimal has a fraction, or does not fit.
    """
    if hash is not None:
        return hash_array(array, hash, seed)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if pa.types.is_date32(kind) or pa.types.is_time32(kind):
        array = array.cast(pa.int32())
    elif not (
        pa.types.is_integer(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_temporal(kind)
        or pa.types.is_null(kind)
    ):
        advice = "; give it a hash=" if _is_text(kind) else ""
        if pa.types.is_floating(kind) and array.null_count:
            advice = "; integers of which some are missing are Int64 in pandas, not float64"
        raise TypeError(f"expected integers, bools, decimals or times, got {kind}{advice}")
    unsigned = pa.types.is_uint64(kind)
    return _tensor(pc.cast(array, pa.int64(), safe=not unsigned), 0)


def float_of(array: pa.Array, dtype: torch.dtype) -> Tensor:
    """Return the numbers of an array, [n]; those of nulls mean nothing.

    Args:
        array: Integers, floats, bools, decimals; times, dates and durations become seconds.
        dtype: torch.float32 or torch.float64.

    Raises:
        TypeError: The type is another.
    """
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if pa.types.is_temporal(kind):
        ticks = int64_of(array, None, 0).double()
        if pa.types.is_date32(kind):
            return (ticks * 86400).to(dtype)
        return (ticks / ticks_per_second(kind)).to(dtype)
    if not (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_null(kind)
    ):
        raise TypeError(f"expected numbers, bools, decimals or times, got {kind}")
    if pa.types.is_boolean(kind):
        array = array.cast(pa.uint8())
    wanted = pa.float32() if dtype is torch.float32 else pa.float64()
    return _tensor(pc.cast(array, wanted, safe=False), 0.0)


def ticks_per_second(kind: pa.DataType) -> int:
    """Return how many of a time's own units make a second; 1 for integers.

    Args:
        kind: Any type but date32, whose unit is a day.
    """
    if pa.types.is_date64(kind):
        return _PER_SECOND["ms"]
    return _PER_SECOND[kind.unit] if pa.types.is_temporal(kind) else 1


def fill_nulls(found: Tensor, array: pa.Array, default: Any) -> Tensor:
    """Write ``default`` where the array has a null.

    Raises:
        ValueError: There is a null, and ``default`` is None.
    """
    if not array.null_count:
        return found
    if default is None:
        raise ValueError(
            f"{array.null_count} of {len(array)} values are null, and there is no default= for them"
        )
    found[torch.from_numpy(array.is_null().to_numpy(zero_copy_only=False))] = default
    return found


def bags_of(array: pa.Array) -> tuple[pa.Array, Tensor]:
    """Return the values of lists and the length of each, int64 [n]; a null is an empty list.

    An array that holds no lists gives lists of one value; a null among them an empty list.
    """
    if pa.types.is_null(array.type):
        return array[:0], torch.zeros(len(array), dtype=torch.int64, device="cpu")
    if not is_list(array.type):
        array = with_nulls(array)
        valid = torch.from_numpy(array.is_valid().to_numpy(zero_copy_only=False))
        return array.drop_null(), valid.long()
    lengths = pc.cast(pc.list_value_length(array), pa.int64())
    return with_nulls(pc.list_flatten(array)), _tensor(lengths, 0)


def one_of_list(array: pa.Array) -> pa.Array:
    """Return the value of each list of at most one, null for an empty list.

    An array that holds no lists is returned as it is.

    Raises:
        ValueError: A list has more values.
    """
    if not is_list(array.type):
        return with_nulls(array)
    values, lengths = bags_of(array)
    if lengths.numel() and int(lengths.max()) > 1:
        raise ValueError(f"a row has {int(lengths.max())} values, not one")
    index = (lengths.cumsum(0) - 1).numpy()
    return values.take(pa.array(index, mask=lengths.numpy() == 0))


def _is_text(kind: pa.DataType) -> bool:
    return any(word in str(kind) for word in ("string", "binary"))


def _tensor(array: pa.Array, null: float) -> Tensor:
    """Copy numbers to a tensor: Arrow's memory is not ours to write to."""
    filled = array.fill_null(null) if array.null_count else array
    return torch.from_numpy(np.array(filled.to_numpy(zero_copy_only=False)))
