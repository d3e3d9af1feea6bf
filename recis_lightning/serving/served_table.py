"""Table of a served folder: an index and rows that are mapped, and only read.

Ids lie in the order of their hashes, and rows in that of their ids. The top bits of a hash name a
bucket, of one or two ids; ``starts`` has the place of each bucket's first id. All ids of a lookup
are sought at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.serving import pooling
from recis_lightning.serving.array_file import ArrayWriter, FileRecord, MappedArrays, to_numpy

FORMATS = ("float32", "bfloat16", "int8")
_MAX_BUCKET = 1 << 12  # ids of a bucket that a file may ask to compare
_WINDOW = 4  # ids of a bucket compared at once
_FOUR_BOOLS = np.uint32  # as which a window's comparisons are read, quicker than by any(1)
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
            rows = read_rows(torch.from_numpy(ids[chunk]))
            if row_format == "int8":
                quantised, scales[chunk] = quantise(rows.float())
                yield quantised
            else:
                dtype = torch.bfloat16 if row_format == "bfloat16" else torch.float32
                yield to_numpy(rows.to(dtype))

    writer = ArrayWriter(path, 4 * dim)
    try:
        writer.add("starts", starts.shape, [starts])
        writer.add("ids", ids.shape, [ids])
        writer.add("rows", (len(ids), dim), encoded())
        if row_format == "int8":
            writer.add("scales", scales.shape, [scales])
        writer.add("largest", (1,), [np.array([largest], np.int64)])
        return writer.close()
    except BaseException:
        writer.abandon()
        raise


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
        self, name: str, arrays: MappedArrays, row_format: str, dim: int, dtype: torch.dtype
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

    def find(self, ids: Integers) -> Integers:
        """Return each id's place, -1 where it has none, int64 [n].

        Raises:
            ValueError: What the search reads is damaged.
        """
        if not len(self._ids) or not ids.size:
            return np.full(ids.shape, -1, np.int64)
        buckets = (hash_ids(ids) >> self._shift).view(np.int64)
        self._arrays.check_rows("starts", buckets)
        first = self._starts.take(buckets).astype(np.int64)
        places = self._compare(ids, first)
        if self._largest > _WINDOW:
            missing = np.flatnonzero(places < 0)
            for skipped in range(_WINDOW, self._largest, _WINDOW):
                if not missing.size:
                    break
                ends = self._starts.take(buckets[missing] + 1)
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
        equal = self._ids.take(first[:, None] + self._window, mode="clip") == ids[:, None]
        is_found = equal.view(_FOUR_BOOLS)[:, 0] != 0
        return np.where(is_found, first + equal.argmax(1), -1)

    def gather(self, places: Integers) -> Tensor:
        """Return the rows at places, [n, dim] in the table's dtype, zeros for -1."""
        values = torch.from_numpy(self._gather(places))
        if self._format == "bfloat16":
            values = values.view(torch.bfloat16)
        return values.to(self.dtype)

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

    def look_up(
        self,
        ids: Tensor,
        offsets: Tensor | None,
        weights: Tensor | None,
        mode: str,
        tile_len: int,
        padding_idx: int | None,
    ) -> Tensor:
        """Look a feature up, as the operator ``recis_lightning::look_up`` describes.

        Raises:
            ValueError: Offsets are malformed, or what is read is damaged.
        """
        flat = np.ascontiguousarray(ids.detach().numpy().reshape(-1), np.int64)
        places = self.find(flat)
        padding = None
        if padding_idx is not None:
            padding = flat == padding_idx
            places[padding] = -1
        if mode == "none" and weights is None:
            return self.gather(places)
        rows = self.gather(places).float().numpy()
        values = None if weights is None else weights.detach().reshape(-1).numpy()
        if values is not None and mode in ("none", "tile"):
            with np.errstate(all="ignore"):
                rows = np.where((places >= 0)[:, None], rows * values[:, None], np.float32(0))
        if mode == "none":
            return torch.from_numpy(rows).to(self.dtype)
        bags = self._bags(ids, offsets)
        if mode == "tile":
            pooled = pooling.tile(rows, bags, tile_len)
        else:
            pooled = pooling.pool(rows, places >= 0, padding, bags, mode, values)
        return torch.from_numpy(pooled).to(self.dtype)

    def _bags(self, ids: Tensor, offsets: Tensor | None) -> pooling.Bags:
        if offsets is None:
            num_bags = ids.shape[0]
            length = ids.shape[1] if ids.dim() == 2 else 1
            lengths = np.full(num_bags, length, np.int64)
            return pooling.Bags(np.arange(num_bags, dtype=np.int64) * length, lengths)
        edges = np.ascontiguousarray(offsets.detach().numpy(), np.int64)
        lengths = np.diff(edges)
        ends = (edges[0], edges[-1]) if len(edges) else (0, -1)
        if ends != (0, ids.numel()) or (lengths < 0).any():
            raise ValueError(
                f"offsets: of a feature of table {self.name!r} must start at 0, never descend and "
                f"end at the number of ids, {ids.numel()}; got {edges[:8].tolist()}"
            )
        return pooling.Bags(edges[:-1], lengths)


__all__ = ["FORMATS", "ServedTable", "bucket_bits", "hash_ids", "quantise", "write_table"]
