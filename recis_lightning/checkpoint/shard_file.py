"""A safetensors file with one rank's rows of one table or several, checked chunk by chunk.

The first tensor, ``checksums``, holds the CRC-32 of each chunk of the others. The checkpoint's
commit holds the CRC-32 of the header and of ``checksums`` (``FileDigest``). So no flipped bit
passes, and threads check chunks independently, as they read them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recis_lightning.checkpoint.chunks import ProgressCallback, parallel_for
from recis_lightning.checkpoint.mapped_file import MappedFile, bytes_of, read_into
from recis_lightning.checkpoint.regular_file import open_regular
from recis_lightning.checkpoint.tensor_group import TensorGroup, TensorSpec
from recis_lightning.system_calls import open_flags, reserve, sync_data, write_at
from recis_lightning.table.state_schema import crc32

_CHECKSUMS, _ROWS_KEY = "checksums", "piece_rows"  # names in the file
_ALIGNMENT = 64
_MAX_HEADER_BYTES = 100_000_000  # as in safetensors
_SYNC_BYTES = 1 << 28  # bytes between two syncs, so that the disk starts before all is written
_MAX_OPEN = 64  # of the 1024 files that a process may have; the others are opened for each chunk
_DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class FileDigest(NamedTuple):
    """Size and checksum of a file, by which a checkpoint recognises it.

    Attributes:
        size: In bytes.
        checksum: CRC-32 of the header and ``checksums``, which covers all other bytes.
    """

    size: int
    checksum: int


def write_shard(
    path: Path,
    metadata: Mapping[str, Any],
    groups: Sequence[TensorGroup],
    on_progress: ProgressCallback,
) -> FileDigest:
    """Write a file under a temporary name, sync it and rename it; leave nothing if that fails.

    Memory holds one chunk a thread beside the groups' own. The folder is not synced.

    Args:
        path: The file.
        metadata: Fields of the header, each value as JSON.
        groups: Tensors of the file.
        on_progress: Called with bytes written.

    Raises:
        OSError: The disk is full, or another error of the system.
    """
    specs = {name: spec for group in groups for name, spec in group.specs.items()}
    rows = {name: group.chunk_rows for group in groups for name in group.specs}
    counts = {name: -(-spec.shape[0] // rows[name]) for name, spec in specs.items()}
    sums = {name: np.zeros(count, np.int64) for name, count in counts.items()}
    specs = {_CHECKSUMS: TensorSpec(torch.int64, (sum(counts.values()),)), **specs}
    header, starts, size = _layout(specs, {**metadata, _ROWS_KEY: rows})
    chunks = [
        (group, start, min(start + group.chunk_rows, group.length))
        for group in groups
        for start in range(0, group.length, group.chunk_rows)
    ]
    temporary = path.with_name(path.name + ".part")
    file = os.open(temporary, open_flags("O_RDWR", "O_CREAT", "O_TRUNC"), 0o644)
    is_open = True
    try:
        reserve(file, size)

        def write(index: int) -> int:
            group, start, stop = chunks[index]
            done = 0
            for name, tensor in group.read(start, stop).items():
                data = bytes_of(tensor)
                sums[name][start // rows[name]] = crc32(data)
                _write(file, data, starts[name] + start * specs[name].row_bytes)
                done += len(data)
            return done

        parallel_for(len(chunks), write, on_progress, lambda: sync_data(file), _SYNC_BYTES)
        checksums = np.concatenate([sums[name] for name in starts if name in sums])
        _write(file, memoryview(header), 0)
        _write(file, bytes_of(torch.from_numpy(checksums)), starts[_CHECKSUMS])
        os.fsync(file)
        os.close(file)  # Windows renames no file that is open
        is_open = False
        os.replace(temporary, path)
    except BaseException as error:
        if is_open:
            os.close(file)
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    return FileDigest(size, crc32(checksums.tobytes(), crc32(header)))


def _layout(
    specs: dict[str, TensorSpec], metadata: Mapping[str, Any]
) -> tuple[bytes, dict[str, int], int]:
    """Return the header, each tensor's offset in the file, and the file's size."""
    # Large items first: each tensor starts at a multiple of its item's size.
    ordered = sorted(specs, key=lambda name: (name != _CHECKSUMS, -specs[name].dtype.itemsize))
    described: dict[str, Any] = {
        "__metadata__": {key: json.dumps(value) for key, value in metadata.items()}
    }
    offsets, end = {}, 0
    for name in ordered:
        dtype, shape = specs[name]
        offsets[name], begin, end = end, end, end + specs[name].nbytes
        described[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(described).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + at for name, at in offsets.items()}, len(header) + end


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        done = write_at(file, data, offset)
        data, offset = data[done:], offset + done


class ShardFile:
    """A file that ``write_shard`` wrote; open only while something is read (``opened``).

    Attributes:
        metadata: Fields that the writer gave.
        num_bytes: Of the file, or of this part of it.
        specs: Specs of its tensors, without ``checksums``.
        chunk_rows: Rows of a chunk, by tensor.

    Raises:
        ValueError: The file is missing, cut short, or was not written by ``write_shard``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: MappedFile | None = None
        self._is_part = False  # small: it is not worth a mapping of the whole file
        file = open_regular(path)
        try:
            self.size = os.fstat(file).st_size
        finally:
            os.close(file)
        self.num_bytes = self.size
        self._read_header()

    def _read_header(self) -> None:
        length = int.from_bytes(self._bytes_at(0, min(8, self.size)), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, self.size - 8):
            raise ValueError(f"{self.path}: truncated, or no safetensors file")
        header = self._bytes_at(0, 8 + length)
        try:
            described = json.loads(header[8:])
            metadata = described.pop("__metadata__")
            self.metadata = {key: json.loads(value) for key, value in metadata.items()}
            self.chunk_rows: dict[str, int] = self.metadata.pop(_ROWS_KEY)
            if not all(type(rows) is int and rows > 0 for rows in self.chunk_rows.values()):
                raise ValueError
            ends = [len(header)]
            self.specs, self._starts = {}, {}
            for name, entry in described.items():
                begin, end = (len(header) + at for at in entry["data_offsets"])
                spec = TensorSpec(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
                if not spec.shape or not all(
                    type(n) is int and 0 <= n < 1 << 63 for n in spec.shape
                ):
                    raise ValueError
                self.specs[name], self._starts[name] = spec, begin
                if begin != ends[-1] or end != begin + spec.nbytes:
                    raise ValueError
                ends.append(end)
            sums_of = self.specs.pop(_CHECKSUMS)
            num_chunks = sums_of.shape[0]
            if sums_of != TensorSpec(torch.int64, (num_chunks,)) or num_chunks != sum(
                map(self.num_chunks, self.specs)
            ):
                raise ValueError
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ):
            raise ValueError(f"{self.path}: damaged, or no file of a checkpoint") from None
        if ends[-1] != self.size:
            raise ValueError(
                f"{self.path}: expected {ends[-1]} bytes, found {self.size}: the file is torn"
            )
        data = self._bytes_at(self._starts[_CHECKSUMS], 8 * num_chunks)
        self.checksum = crc32(data, crc32(header))
        cuts = np.cumsum([self.num_chunks(name) for name in self.specs])[:-1]
        sums = np.split(np.frombuffer(data, np.int64), cuts)
        self._sums = dict(zip(self.specs, sums, strict=True))

    def part(self, prefix: str, metadata: dict[str, Any]) -> ShardFile:
        """Return the tensors of one name before the slash, under what follows it."""
        names = {name.partition("/")[2]: name for name in self._by_prefix.get(prefix, ())}
        part = copy.copy(self)
        part.metadata, part._open, part._is_part = metadata, None, True
        part.specs = {short: self.specs[name] for short, name in names.items()}
        part.chunk_rows = {short: self.chunk_rows[name] for short, name in names.items()}
        part._starts = {short: self._starts[name] for short, name in names.items()}
        part._sums = {short: self._sums[name] for short, name in names.items()}
        part.num_bytes = sum(spec.nbytes for spec in part.specs.values())
        return part

    @functools.cached_property
    def _by_prefix(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for name in self.specs:
            names.setdefault(name.partition("/")[0], []).append(name)
        return names

    def num_chunks(self, name: str) -> int:
        """Return the number of a tensor's chunks, each with its own checksum."""
        return -(-self.specs[name].shape[0] // self.chunk_rows[name])

    def _bytes_at(self, offset: int, count: int) -> bytearray:
        data = bytearray(count)
        self._read_at(offset, memoryview(data))
        return data

    def _read_at(self, offset: int, data: memoryview) -> None:
        file = open_regular(self.path)
        try:
            read_into(file, data, offset, self.path)
        finally:
            os.close(file)

    @property
    def is_mapped(self) -> bool:
        """Whether the file is open and mapped."""
        return self._open is not None and self._open.mapped is not None

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Keep the file open and mapped, so that chunks are read without copies."""
        if self._open is not None or self._is_part:
            yield
            return
        file = open_regular(self.path)
        try:
            self._open = MappedFile(file, self.path, self.size)
            yield
        finally:
            self._open = None
            os.close(file)

    def view(self, name: str) -> Tensor:
        """Return a whole tensor without a copy, if the file is open and the system can map it.

        Returns:
            The tensor, to be neither changed nor kept.

        Raises:
            ValueError: A byte differs from what was written.
        """
        spec = self.specs[name]
        mapped = None if self._open is None else self._open.mapped
        if mapped is None:
            return self.read(name)
        parallel_for(
            self.num_chunks(name), lambda index: self.chunk(name, index).nbytes, lambda done: None
        )
        start = self._starts[name]
        return mapped[start : start + spec.nbytes].view(spec.dtype).view(spec.shape)

    def read(self, name: str) -> Tensor:
        """Read a whole tensor; ValueError if a byte differs from what was written."""
        spec, rows = self.specs[name], self.chunk_rows[name]
        # NumPy asks for huge pages; torch cannot view an empty array as another dtype.
        memory = torch.from_numpy(np.empty(max(spec.nbytes, 8), np.uint8))[: spec.nbytes]
        tensor = memory.view(spec.dtype).view(spec.shape)

        def fill(index: int) -> int:
            chunk = self.chunk(name, index)
            tensor[index * rows : index * rows + len(chunk)] = chunk
            return chunk.nbytes

        with self.opened():
            parallel_for(self.num_chunks(name), fill, lambda done: None)
        return tensor

    def empty(self, name: str) -> Tensor:
        """Return a tensor without rows, of the dtype and width of one in the file."""
        spec = self.specs[name]
        return torch.empty((0, *spec.shape[1:]), dtype=spec.dtype, device="cpu")

    def check(self, digest: FileDigest) -> None:
        """Raise ValueError unless this is the file with that digest."""
        if (self.size, self.checksum) != digest:
            raise ValueError(
                f"{self.path}: expected {digest.size} bytes with checksum {digest.checksum:08x}, "
                f"found {self.size} with {self.checksum:08x}: damaged, or of another save"
            )

    def chunks(self) -> list[tuple[str, int]]:
        """List all chunks, each as the name of its tensor and its index."""
        return [(name, index) for name in self.specs for index in range(self.num_chunks(name))]

    def prefetch(self, name: str, index: int) -> None:
        """Bring a chunk into memory if the file is open; errors wait until it is read."""
        mapped = self._open  # another thread may close it
        if mapped is not None:
            mapped.prefetch(*self._extent(name, index)[:2])

    def _extent(self, name: str, index: int) -> tuple[int, int, int]:
        """Return a chunk's offset in the file, its bytes, and its rows."""
        spec, start = self.specs[name], index * self.chunk_rows[name]
        count = min(self.chunk_rows[name], spec.shape[0] - start)
        return self._starts[name] + start * spec.row_bytes, count * spec.row_bytes, count

    def chunk(self, name: str, index: int) -> Tensor:
        """Read a chunk of a tensor.

        Args:
            name: The tensor.
            index: The chunk.

        Returns:
            Its rows, to be neither changed nor kept: they may be the mapped file itself.

        Raises:
            ValueError: A byte differs from what was written.
        """
        offset, size, count = self._extent(name, index)
        if self._open is None:
            data = torch.empty(size, dtype=torch.uint8, device="cpu")
            self._read_at(offset, bytes_of(data))
        else:
            data = self._open.bytes_at(offset, size)
        if crc32(bytes_of(data)) != self._sums[name][index]:
            start = index * self.chunk_rows[name]
            raise ValueError(
                f"{self.path}: {name} is damaged between its rows {start} and {start + count}: "
                "the checksum is another"
            )
        spec = self.specs[name]
        return data.view(spec.dtype).view(count, *spec.shape[1:])


@contextlib.contextmanager
def opened(files: Sequence[ShardFile]) -> Iterator[None]:
    """Keep files open and mapped, at most ``_MAX_OPEN`` of them."""
    with contextlib.ExitStack() as stack:
        for file in files[:_MAX_OPEN]:
            stack.enter_context(file.opened())
        yield


__all__ = ["FileDigest", "ShardFile", "TensorGroup", "TensorSpec", "opened", "write_shard"]
