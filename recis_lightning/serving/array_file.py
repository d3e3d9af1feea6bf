"""Files of arrays that are mapped and read in place, each byte checked before its first use.

A file is its arrays one after the other, each from a page boundary on, and at its end the CRC-32 of
every chunk before it. What the arrays are stands in the manifest. Nothing is read when a file is
opened but the checksums: a chunk is checked when it is first touched, so that a large file opens at
once and memory holds what is used.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from recis_lightning.checkpoint.mapped_file import MappedFile
from recis_lightning.checkpoint.regular_file import open_regular

Array = npt.NDArray[Any]

DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        *("uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"),
        *("float16", "float32", "float64"),
    )
}
_ALIGNMENT = 4096
_CHUNK_BYTES = 1 << 14
_MAX_CHUNK_BYTES = 1 << 30


class ArrayPlace(NamedTuple):
    """Place of an array in a file.

    Attributes:
        dtype: Its dtype, by name.
        shape: Its shape.
        offset: Where it begins, in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class FileRecord(NamedTuple):
    """Record of a file in the manifest.

    Attributes:
        file: Its name.
        size: Its bytes, with the checksums at the end.
        chunk_bytes: Bytes under one checksum.
        checksum: CRC-32 of the checksums.
        arrays: Its arrays, by name.
    """

    file: str
    size: int
    chunk_bytes: int
    checksum: int
    arrays: dict[str, ArrayPlace]

    @property
    def data_bytes(self) -> int:
        """Bytes before the checksums."""
        return max((p.offset + p.nbytes for p in self.arrays.values()), default=0)

    def to_state(self) -> dict[str, Any]:
        """Return the record as primitives."""
        arrays = {name: [p.dtype, list(p.shape), p.offset] for name, p in self.arrays.items()}
        return {**self._asdict(), "arrays": arrays}

    @classmethod
    def from_state(cls, state: Any) -> FileRecord:
        """Return the record of primitives; ValueError unless all of it holds together."""
        if not isinstance(state, dict) or set(state) != set(cls._fields):
            raise ValueError("a file's record has other fields")
        file, arrays = state["file"], state["arrays"]
        if not isinstance(file, str) or file in ("", ".", "..") or set(file) & set("/\\\0"):
            raise ValueError(f"file {file!r} is no plain name")
        size, chunk, checksum = state["size"], state["chunk_bytes"], state["checksum"]
        if not all(map(_is_count, (size, chunk, checksum))) or not isinstance(arrays, dict):
            raise ValueError(f"file {file!r}: its record is damaged")
        places = {}
        end = 0
        for name, given in arrays.items():
            dtype, shape, offset = given if isinstance(given, list) and len(given) == 3 else [0] * 3
            if not isinstance(dtype, str) or dtype not in DTYPES or not isinstance(shape, list):
                raise ValueError(f"file {file!r}: array {name!r} is damaged")
            if len(shape) > 32 or not all(map(_is_count, [*shape, offset])):
                raise ValueError(f"file {file!r}: array {name!r} is damaged")
            place = places[name] = ArrayPlace(dtype, tuple(shape), offset)
            if offset % _ALIGNMENT or offset < end:
                raise ValueError(f"file {file!r}: array {name!r} is out of place")
            end = offset + place.nbytes
        if chunk < _ALIGNMENT or chunk > _MAX_CHUNK_BYTES or chunk & (chunk - 1):
            raise ValueError(f"file {file!r}: chunks of {chunk} bytes")
        if size != end + 4 * -(-end // chunk):
            raise ValueError(f"file {file!r}: its size is not that of its arrays")
        return cls(file, size, chunk, checksum, places)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


class ArrayWriter:
    """Writer of one file.

    Args:
        path: Where the file goes; it must not be there.
        row_bytes: Size of the longest row of its arrays, which spans two chunks at most.
    """

    def __init__(self, path: Path, row_bytes: int = 0) -> None:
        self._path, self._arrays = path, dict[str, ArrayPlace]()
        self._chunk_bytes = max(_CHUNK_BYTES, 1 << max(row_bytes - 1, 0).bit_length())
        self._checksums: list[int] = []
        self._checksum = self._position = 0
        self._file = path.open("xb")

    def add(self, name: str, shape: tuple[int, ...], parts: Iterable[Array]) -> None:
        """Write an array.

        Args:
            name: Its name.
            shape: Its shape.
            parts: Its rows, some at a time; all of one dtype, one at least.
        """
        self._write(bytes(-self._position % _ALIGNMENT))
        offset, dtype = self._position, ""
        for part in parts:
            dtype = part.dtype.name
            data = np.ascontiguousarray(part, DTYPES[dtype]).reshape(-1)
            self._write(data.view(np.uint8).data)
        self._arrays[name] = ArrayPlace(dtype, shape, offset)
        assert self._position == offset + self._arrays[name].nbytes

    def _write(self, data: Any) -> None:
        while len(data):
            room = self._chunk_bytes - self._position % self._chunk_bytes
            part, data = data[:room], data[room:]
            self._file.write(part)
            self._checksum = zlib.crc32(part, self._checksum)
            self._position += len(part)
            if self._position % self._chunk_bytes == 0:
                self._checksums.append(self._checksum)
                self._checksum = 0

    def close(self) -> FileRecord:
        """Write the checksums and make the file durable; return its record."""
        if self._position % self._chunk_bytes:
            self._checksums.append(self._checksum)
        table = np.array(self._checksums, "<u4").tobytes()
        with self._file:
            self._file.write(table)
            self._file.flush()
            os.fsync(self._file.fileno())
        size, name = self._position + len(table), self._path.name
        return FileRecord(name, size, self._chunk_bytes, zlib.crc32(table), self._arrays)

    def abandon(self) -> None:
        """Close and remove the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)


class MappedArrays(Mapping[str, Array]):
    """Arrays of an open file. Any number of threads may read them.

    Args:
        folder: Where the file is.
        record: From the manifest.

    Raises:
        ValueError: The file is missing, no regular file, of another size, or its checksums are
            damaged (names it).
    """

    def __init__(self, folder: Path, record: FileRecord) -> None:
        self.path, self._record = folder / record.file, record
        if not self.path.exists():
            raise ValueError(f"{self.path}: this file of the served folder is missing")
        file = open_regular(self.path)
        try:
            size = os.fstat(file).st_size
            if size != record.size:
                raise ValueError(f"{self.path}: expected {record.size} bytes, found {size}")
            self._file = MappedFile(file, self.path, size)
            data = record.data_bytes
            table = self._file.bytes_at(data, size - data).numpy().view("<u4")
            if zlib.crc32(table.tobytes()) != record.checksum:
                raise ValueError(f"{self.path}: damaged (its checksums)")
            whole = self._file.mapped
            if whole is None:  # a file system that maps nothing
                whole = self._file.bytes_at(0, size)
        finally:
            os.close(file)
        self._bytes, self._checksums = whole.numpy(), table
        self._shift = record.chunk_bytes.bit_length() - 1
        self._checked = np.zeros(len(table), np.bool_)
        self.is_checked = not len(table)  # all of it
        self._arrays = {name: self._view(place) for name, place in record.arrays.items()}

    def _view(self, place: ArrayPlace) -> Array:
        part = self._bytes[place.offset : place.offset + place.nbytes]
        return part.view(DTYPES[place.dtype]).reshape(place.shape)

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def check_rows(self, name: str, rows: npt.NDArray[np.int64], count: int = 1) -> None:
        """Check what holds some rows of an array, as far as that has not been done.

        Args:
            name: The array.
            rows: int64 [n], the first of ``count`` rows each; rows beyond the end are passed over.
            count: Rows that follow each other.

        Raises:
            ValueError: They are damaged, or cannot be read.
        """
        if self.is_checked or not rows.size:
            return
        place, array = self._record.arrays[name], self._arrays[name]
        row_bytes = array.nbytes // max(len(array), 1)
        first = place.offset + rows * row_bytes
        chunks = first >> self._shift
        if count == 1 and row_bytes <= _ALIGNMENT and not row_bytes & (row_bytes - 1):
            self._check(chunks)  # aligned rows of such a size lie in one chunk
            return
        last = np.minimum(first + (count * row_bytes - 1), place.offset + place.nbytes - 1)
        self._check(chunks)
        self._check(last >> self._shift)

    def check_all(self) -> None:
        """Check the whole file; ValueError if it is damaged."""
        if not self.is_checked:
            self._check(np.arange(len(self._checked)))

    def _check(self, chunks: npt.NDArray[np.int64]) -> None:
        if np.count_nonzero(self._checked.take(chunks)) == chunks.size:  # quicker than all()
            return
        wanted = np.unique(chunks)
        for chunk in wanted[~self._checked[wanted]].tolist():
            start = chunk << self._shift
            end = min(start + self._record.chunk_bytes, self._record.data_bytes)
            if self._file.mapped is not None:
                self._file.prefetch(start, end - start)
            if zlib.crc32(self._bytes[start:end].data) != self._checksums[chunk]:
                raise ValueError(f"{self.path}: damaged between bytes {start} and {end}")
            self._checked[chunk] = True
        self.is_checked = bool(self._checked.all())


def to_numpy(tensor: torch.Tensor) -> Array:
    """Return a CPU tensor as an array that files hold; bfloat16 as its bits, uint16."""
    if tensor.dtype is torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy()
    if tensor.dtype is torch.bool:
        return tensor.contiguous().view(torch.uint8).numpy()
    return tensor.contiguous().numpy()


__all__ = ["ArrayPlace", "ArrayWriter", "FileRecord", "MappedArrays", "to_numpy"]
