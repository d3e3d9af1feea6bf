"""Table of a served folder: an index and rows that are mapped, and only read.

Ids lie in the order of their hashes, and rows in that of their ids. The top bits of a hash name a
bucket, of one or two ids; ``starts`` has the place of each bucket's first id. All ids of a lookup
are sought at once, and few of them by functions of NumPy that keep the interpreter's lock: ``take``
and ``argmax`` release it, and wait until other requests let it go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.serving import feature_lookup
from recis_lightning.serving.array_file import (
    ArrayGroup,
    ArrayWriter,
    FileRecord,
    MappedArrays,
    to_numpy,
)

FORMATS = ("float32", "bfloat16", "int8")
_MAX_BUCKET = 1 << 12  # ids of a bucket that a file may ask to compare
_WINDOW = 4  # ids of a bucket compared at once
_FEW = 500  # values up to which NumPy keeps the interpreter's lock, where it ever does
# A window's comparisons are read as one number. Its remainder by 19 is another one for each of the
# sixteen numbers that there are, and this is the first place that was equal, -1 for none.
_FOUR_BOOLS, _DIVISOR = np.uint32, np.uint32(19)
_FIRST_EQUAL = np.array([-1, 0, 1, 0, -1, 2, 0, 3, 0, 1, 0, -1, 2, 0, 1, 0, 1, 0, -1])
_CHUNK_ROWS = 1 << 16  # rows written at once
_MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_U32 = np.uint64(32)

Integers = npt.NDArray[np.int64]


def hash_ids(ids: Integers) -> npt.NDArray[np.uint64]:
    """Return the hashes by which ids are ordered, uint64 [n]."""
    mixed = ids.view(np.uint64) * _MIX_1
    mixed ^= mixed >> _U32
    mixed *= _MIX_2
    mixed ^= mixed >> _U32
    return mixed


def write_table(
    path: Path, ids: Integers, read_rows: Callable[[Tensor], Tensor], row_format: str, dim: int
) -> FileRecord:
    """Write a table's file and return its record.

    Args:
        path: Where it goes.
        ids: int64 [n], distinct.
        read_rows: Returns the rows of ids, [m, dim] of float32 or bfloat16.
        row_format: One of ``FORMATS``.
        dim: Weights in a row.

    Raises:
        ValueError: int8 is asked for, and a row has NaN or Inf.
    """
    writer = ArrayWriter(path, 4 * dim)
    try:
        add_table(writer, "", ids, lambda at: read_rows(torch.from_numpy(ids)[at]), row_format, dim)
        return writer.close()
    except BaseException:
        writer.abandon()
        raise


def add_table(
    writer: ArrayWriter,
    prefix: str,
    ids: Integers,
    read_rows_at: Callable[[Tensor], Tensor],
    row_format: str,
    dim: int,
) -> Integers:
    """Write a table's arrays to a file that may hold others too.

    Args:
        writer: Of the file.
        prefix: What the names of the arrays begin with.
        ids: int64 [n], distinct.
        read_rows_at: Returns the rows of the ids at positions in ``ids``, [m, dim].
        row_format: One of ``FORMATS``.
        dim: Weights in a row.

    Returns:
        int64 [n], the order in which ids and rows lie in the file, as positions in ``ids``.

    Raises:
        ValueError: int8 is asked for, and a row has NaN or Inf.
    """
    hashes = hash_ids(ids)
    order = np.argsort(hashes, kind="stable")
    ids, hashes = ids[order], hashes[order]
    bits = bucket_bits(len(ids))
    edges = np.arange(1 << bits, dtype=np.uint64) << np.uint64(64 - bits)
    starts = np.append(np.searchsorted(hashes, edges), len(ids)).astype(np.uint32)
    largest = int(np.diff(starts.astype(np.int64)).max())
    scales = np.zeros(len(ids), np.float32)

    def encoded() -> Iterator[Any]:
        yield _empty_rows(dim, row_format)
        for start in range(0, len(ids), _CHUNK_ROWS):
            chunk = slice(start, start + _CHUNK_ROWS)
            rows = read_rows_at(torch.from_numpy(order[chunk]))
            if row_format == "int8":
                quantised, scales[chunk] = quantise(rows.float())
                yield quantised
            else:
                dtype = torch.bfloat16 if row_format == "bfloat16" else torch.float32
                yield to_numpy(rows.to(dtype))

    writer.add(f"{prefix}starts", starts.shape, [starts])
    writer.add(f"{prefix}ids", ids.shape, [ids])
    writer.add(f"{prefix}rows", (len(ids), dim), encoded())
    if row_format == "int8":
        writer.add(f"{prefix}scales", scales.shape, [scales])
    writer.add(f"{prefix}largest", (1,), [np.array([largest], np.int64)])
    return order


def bucket_bits(num_ids: int) -> int:
    """Return the logarithm of the number of buckets of so many ids: one or two in each.

    Example:
        >>> bucket_bits(0), bucket_bits(1000)
        (1, 9)
    """
    return max(num_ids.bit_length() - 1, 1)


def _empty_rows(dim: int, row_format: str) -> Any:
    return np.empty((0, dim), {"bfloat16": np.uint16, "int8": np.int8}.get(row_format, np.float32))


def quantise(rows: Tensor) -> tuple[Any, Any]:
    """Return rows as int8 [n, dim], and what to multiply each by, float32 [n].

    Raises:
        ValueError: A row has NaN or Inf.

    Example:
        >>> quantised, scales = quantise(torch.tensor([[127.0, -1.0], [0.0, 0.0]]))
        >>> quantised.tolist(), scales.tolist()
        ([[127, -1], [0, 0]], [1.0, 0.0])
    """
    if not bool(rows.isfinite().all()):
        raise ValueError("rows: int8 has no NaN and no Inf, and a row has one")
    scales = rows.abs().amax(1) / 127
    divisors = torch.where(scales == 0, 1.0, scales)
    quantised = (rows / divisors.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)
    return quantised.numpy(), scales.numpy()


class ServedTable:
    """``lookup.named_tables.RowReader`` of a file. Any number of threads may look up.

    Args:
        name: The table's name.
        arrays: From ``write_table``'s file.
        row_format: One of ``FORMATS``.
        dim: Weights in a row.
        dtype: Dtype of outputs, that of the table in training.

    Raises:
        ValueError: The arrays are not those of such a table.
    """

    def __init__(
        self,
        name: str,
        arrays: MappedArrays | ArrayGroup,
        row_format: str,
        dim: int,
        dtype: torch.dtype,
    ) -> None:
        self.name, self.embedding_dim, self.dtype = name, dim, dtype
        self._arrays, self._format = arrays, row_format
        found = {key: (array.dtype.name, array.shape) for key, array in arrays.items()}
        num_ids = len(arrays["ids"]) if "ids" in arrays else 0
        bits = bucket_bits(num_ids)
        rows = _empty_rows(0, row_format).dtype.name
        expected: dict[str, Any] = {
            "starts": ("uint32", ((1 << bits) + 1,)),
            "ids": ("int64", (num_ids,)),
            "rows": (rows, (num_ids, dim)),
            "largest": ("int64", (1,)),
        }
        if row_format == "int8":
            expected["scales"] = ("float32", (num_ids,))
        if found != expected:
            raise ValueError(f"{arrays.path}: its arrays are not those of table {name!r}")
        arrays.check_rows("largest", np.zeros(1, np.int64))
        self._largest = int(arrays["largest"][0])
        if not 0 <= self._largest <= min(num_ids, _MAX_BUCKET):
            raise ValueError(f"{arrays.path}: buckets of {self._largest} ids")
        self._starts, self._ids, self._rows = arrays["starts"], arrays["ids"], arrays["rows"]
        self._shift = np.uint64(64 - bits)
        self._window = np.arange(_WINDOW)

    def __len__(self) -> int:
        return len(self._ids)

    def check_all(self) -> None:
        """Read and check the whole file; ValueError if it is damaged."""
        self._arrays.check_all()

    def ids(self) -> Integers:
        """Return all ids in the order of their places, int64 [n], checked."""
        self._arrays.check_rows("ids", np.arange(len(self._ids)))
        return np.asarray(self._ids, np.int64)

    def find(self, ids: Integers) -> Integers:
        """Return each id's place, -1 where it has none, int64 [n].

        Raises:
            ValueError: What the search reads is damaged.
        """
        if not len(self._ids) or not ids.size:
            return np.full(ids.shape, -1, np.int64)
        buckets = (hash_ids(ids) >> self._shift).view(np.int64)
        self._arrays.check_rows("starts", buckets)
        first = self._starts[buckets].astype(np.int64)
        places = self._compare(ids, first)
        if self._largest > _WINDOW:
            missing = np.flatnonzero(places < 0)
            for skipped in range(_WINDOW, self._largest, _WINDOW):
                if not missing.size:
                    break
                ends = self._starts[buckets[missing] + 1]
                missing = missing[first[missing] + skipped < ends]
                places[missing] = self._compare(ids[missing], first[missing] + skipped)
                missing = missing[places[missing] < 0]
        return places

    def _compare(self, ids: Integers, first: Integers) -> Integers:
        """Return where in a window of places each id is, -1 where it is in none of them."""
        last = len(self._ids) - 1
        first = np.minimum(first, last)
        self._arrays.check_rows("ids", first, _WINDOW)
        # Beyond the end the last id is compared again, and is found where it is.
        if len(ids) > _FEW:
            window = self._ids.take(first[:, None] + self._window, mode="clip")
            equal = window == ids[:, None]
            is_found = equal.view(_FOUR_BOOLS)[:, 0] != 0
            return np.where(is_found, first + equal.argmax(1), -1)
        window = self._ids[np.minimum(first[:, None] + self._window, last)]
        equal = (window == ids[:, None]).view(_FOUR_BOOLS)[:, 0]
        place = _FIRST_EQUAL[(equal % _DIVISOR).astype(np.int64)]
        return np.where(place < 0, -1, first + place)

    def gather(self, places: Integers) -> Tensor:
        """Return the rows at places, [n, dim] in the table's dtype, zeros for -1."""
        values = torch.from_numpy(self._gather(places))
        if self._format == "bfloat16":
            values = values.view(torch.bfloat16)
        return values if values.dtype is self.dtype else values.to(self.dtype)

    def read(self, places: Integers) -> Any:
        """Return the rows at places as ``array_file.to_numpy`` has what ``gather`` returns."""
        is_float = self.dtype is torch.float32 and self._format != "bfloat16"
        return self._gather(places) if is_float else to_numpy(self.gather(places))

    def _gather(self, places: Integers) -> Any:
        """Return rows as they are stored; int8 as float32."""
        is_unknown = places < 0
        has_unknown = np.count_nonzero(is_unknown) > 0
        if not len(self._ids):
            dtype = np.uint16 if self._format == "bfloat16" else np.float32
            return np.zeros((len(places), self.embedding_dim), dtype)
        if not self._arrays.is_checked:
            known = places[~is_unknown] if has_unknown else places
            self._arrays.check_rows("rows", known)
            if self._format == "int8":
                self._arrays.check_rows("scales", known)
        rows = self._rows.take(places, axis=0, mode="clip")  # -1 as 0, which is overwritten below
        if self._format == "int8":
            scales = self._arrays["scales"].take(places, mode="clip")
            rows = rows.astype(np.float32) * scales[:, None]
        if has_unknown:
            rows[is_unknown] = 0
        return rows

    look_up = feature_lookup.look_up


__all__ = [
    "FORMATS",
    "ServedTable",
    "add_table",
    "bucket_bits",
    "hash_ids",
    "quantise",
    "write_table",
]
