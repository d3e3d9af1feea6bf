"""One rank's part of one table in a safetensors file, in pieces of which each is checked.

The first tensor of a file, ``checksums``, holds the CRC-32 of each piece of the others; whoever
names the file as part of a checkpoint notes the CRC-32 of header and ``checksums`` (``Written``).
So no flipped bit passes, and pieces are checked apart, by several threads, as they are read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recis_lightning.checkpoint.chunks import Advance, in_pieces
from recis_lightning.checkpoint.mapped_file import MappedFile, bytes_of, fill_from

try:  # the same checksum, several times as fast
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

# A piece of a tensor has at most that much: threads that work piece by piece take turns in Python
# between them, and with fewer the pieces of a load take two thirds of the time.
_PIECE_BYTES, _PIECE_ROWS = 1 << 22, 1 << 16
_CHECKSUMS, _PIECE = "checksums", "piece_rows"
_ALIGNMENT = 64
_LONGEST_HEADER = 100_000_000  # what safetensors itself accepts
_SYNC_BYTES = 1 << 28  # bytes written before the disk is told to begin
_MOST_OPEN = 64  # files at once: a process may have 1024, and a piece can be read without
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
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Kind(NamedTuple):
    """What a tensor is, but for its content."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one item along the first dimension."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return self.row_bytes * self.shape[0]


class Part(NamedTuple):
    """Tensors of one length that are read, some rows at a time, together.

    Attributes:
        kinds: By name.
        read: Takes a range of rows; returns these rows of each.
    """

    kinds: dict[str, Kind]
    read: Callable[[int, int], Mapping[str, Tensor]]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Part:
        """Return a tensor that is at hand as a part."""
        kind = Kind(tensor.dtype, tuple(tensor.shape))
        return cls({name: kind}, lambda start, stop: {name: tensor[start:stop]})

    @property
    def length(self) -> int:
        """Rows of each tensor."""
        return next(iter(self.kinds.values())).shape[0]

    @property
    def piece_rows(self) -> int:
        """Rows of a piece."""
        widest = max(kind.row_bytes for kind in self.kinds.values())
        return min(max(_PIECE_BYTES // max(widest, 1), 1), _PIECE_ROWS)


class Written(NamedTuple):
    """What a checkpoint notes of a file.

    Attributes:
        size: In bytes.
        checksum: CRC-32 of header and ``checksums``, which hold those of all else.
    """

    size: int
    checksum: int


def write_shard(
    path: Path, metadata: Mapping[str, Any], parts: Sequence[Part], advance: Advance
) -> Written:
    """Write a file under another name, sync it and give it its own; nothing is left if that fails.

    No more than a piece a thread is held in memory beside what the parts hold themselves. The
    folder is not synced.

    Args:
        path: The file.
        metadata: Goes to the header, each value as JSON.
        parts: Its tensors.
        advance: Called with bytes written, now and then.

    Raises:
        OSError: The disk is full, or whatever else it says.
    """
    kinds = {name: kind for part in parts for name, kind in part.kinds.items()}
    rows = {name: part.piece_rows for part in parts for name in part.kinds}
    counts = {name: -(-kind.shape[0] // rows[name]) for name, kind in kinds.items()}
    sums = {name: np.zeros(count, np.int64) for name, count in counts.items()}
    kinds = {_CHECKSUMS: Kind(torch.int64, (sum(counts.values()),)), **kinds}
    header, starts, size = _layout(kinds, {**metadata, _PIECE: rows})
    pieces = [
        (part, start, min(start + part.piece_rows, part.length))
        for part in parts
        for start in range(0, part.length, part.piece_rows)
    ]
    temporary = path.with_name(path.name + ".part")
    file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        _reserve(file, size)

        def write(number: int) -> int:
            part, start, stop = pieces[number]
            done = 0
            for name, tensor in part.read(start, stop).items():
                data = bytes_of(tensor)
                sums[name][start // rows[name]] = crc32(data)
                _write(file, data, starts[name] + start * kinds[name].row_bytes)
                done += len(data)
            return done

        in_pieces(len(pieces), write, advance, lambda: os.fdatasync(file), _SYNC_BYTES)
        checksums = np.concatenate([sums[name] for name in starts if name in sums])
        _write(file, memoryview(header), 0)
        _write(file, bytes_of(torch.from_numpy(checksums)), starts[_CHECKSUMS])
        os.fsync(file)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        os.close(file)
    return Written(size, crc32(checksums.tobytes(), crc32(header)))


def _layout(
    kinds: dict[str, Kind], metadata: Mapping[str, Any]
) -> tuple[bytes, dict[str, int], int]:
    """Return the header, where in the file each tensor starts, and the file's size."""
    # Large items first: each tensor starts at a multiple of its item's size.
    ordered = sorted(kinds, key=lambda name: (name != _CHECKSUMS, -kinds[name].dtype.itemsize))
    described: dict[str, Any] = {
        "__metadata__": {key: json.dumps(value) for key, value in metadata.items()}
    }
    offsets, end = {}, 0
    for name in ordered:
        dtype, shape = kinds[name]
        offsets[name], begin, end = end, end, end + kinds[name].nbytes
        described[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(described).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + at for name, at in offsets.items()}, len(header) + end


def _reserve(file: int, size: int) -> None:
    """Take the file's room on the disk, so that a full disk says so at once."""
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot
            raise
        os.ftruncate(file, size)


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(file, data, offset)
        data, offset = data[done:], offset + done


class ShardFile:
    """A file that ``write_shard`` wrote; open only while something is read (``opened``).

    Attributes:
        metadata: What the writer gave.
        kinds: Of its tensors, without ``checksums``.

    Raises:
        ValueError: The file is missing, or is none of ours, or not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: MappedFile | None = None
        try:
            self.size = os.stat(path).st_size
        except FileNotFoundError:
            raise ValueError(f"{path}: this file of the checkpoint is missing") from None
        self._read_header()

    def _read_header(self) -> None:
        length = int.from_bytes(self._bytes_at(0, min(8, self.size)), "little")
        if not 2 <= length <= min(_LONGEST_HEADER, self.size - 8):
            raise ValueError(f"{self.path}: truncated, or no safetensors file")
        header = self._bytes_at(0, 8 + length)
        try:
            described = json.loads(header[8:])
            metadata = described.pop("__metadata__")
            self.metadata = {key: json.loads(value) for key, value in metadata.items()}
            self.piece_rows: dict[str, int] = self.metadata.pop(_PIECE)
            ends = [len(header)]
            self.kinds, self._starts = {}, {}
            for name, entry in described.items():
                begin, end = (len(header) + at for at in entry["data_offsets"])
                kind = Kind(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
                self.kinds[name], self._starts[name] = kind, begin
                if begin != ends[-1] or end != begin + kind.nbytes:
                    raise ValueError
                ends.append(end)
            num_pieces = self.kinds.pop(_CHECKSUMS).shape[0]
            if num_pieces != sum(map(self.num_pieces, self.kinds)):
                raise ValueError
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
            raise ValueError(f"{self.path}: damaged, or no file of a checkpoint") from None
        if ends[-1] != self.size:
            raise ValueError(
                f"{self.path}: expected {ends[-1]} bytes, found {self.size}: the file is torn"
            )
        data = self._bytes_at(self._starts[_CHECKSUMS], 8 * num_pieces)
        self.checksum = crc32(data, crc32(header))
        cuts = np.cumsum([self.num_pieces(name) for name in self.kinds])[:-1]
        sums = np.split(np.frombuffer(data, np.int64), cuts)
        self._sums = dict(zip(self.kinds, sums, strict=True))

    def num_pieces(self, name: str) -> int:
        """Return how many pieces a tensor has, each with its own checksum."""
        return -(-self.kinds[name].shape[0] // self.piece_rows[name])

    def _bytes_at(self, offset: int, count: int) -> bytearray:
        data = bytearray(count)
        self._read_at(offset, memoryview(data))
        return data

    def _read_at(self, offset: int, data: memoryview) -> None:
        file = os.open(self.path, os.O_RDONLY)
        try:
            fill_from(file, data, offset, self.path)
        finally:
            os.close(file)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Keep the file open, so that its pieces are read where the system has them in memory."""
        if self._open is not None:
            yield
            return
        file = os.open(self.path, os.O_RDONLY)
        try:
            self._open = MappedFile(file, self.path, self.size)
            yield
        finally:
            self._open = None
            os.close(file)

    def view(self, name: str) -> Tensor:
        """Return a whole tensor, and raise ValueError unless it is what was written.

        Of an open file it is the file itself, if the system can map it: no memory is filled.

        Returns:
            Not to be changed, and not to be kept.
        """
        kind = self.kinds[name]
        mapped = None if self._open is None else self._open.mapped
        if mapped is None:
            return self.read(name)
        in_pieces(
            self.num_pieces(name), lambda number: self.piece(name, number).nbytes, lambda done: None
        )
        start = self._starts[name]
        return mapped[start : start + kind.nbytes].view(kind.dtype).view(kind.shape)

    def read(self, name: str) -> Tensor:
        """Read a whole tensor, and raise ValueError unless it is what was written."""
        kind, rows = self.kinds[name], self.piece_rows[name]
        # NumPy, unlike torch, asks for huge pages; of an empty array torch takes no other view.
        memory = torch.from_numpy(np.empty(max(kind.nbytes, 8), np.uint8))[: kind.nbytes]
        tensor = memory.view(kind.dtype).view(kind.shape)

        def fill(number: int) -> int:
            piece = self.piece(name, number)
            tensor[number * rows : number * rows + len(piece)] = piece
            return piece.nbytes

        with self.opened():
            in_pieces(self.num_pieces(name), fill, lambda done: None)
        return tensor

    def empty(self, name: str) -> Tensor:
        """Return a tensor of no rows that is otherwise like one of the file's."""
        kind = self.kinds[name]
        return torch.empty((0, *kind.shape[1:]), dtype=kind.dtype)

    def check(self, written: Written) -> None:
        """Raise ValueError unless this is the very file that was written."""
        if (self.size, self.checksum) != written:
            raise ValueError(
                f"{self.path}: expected {written.size} bytes with checksum {written.checksum:08x}, "
                f"found {self.size} with {self.checksum:08x}: damaged, or of another save"
            )

    def pieces(self) -> list[tuple[str, int]]:
        """List the pieces that can be checked apart: tensor and number."""
        return [(name, number) for name in self.kinds for number in range(self.num_pieces(name))]

    def read_ahead(self, name: str, number: int) -> None:
        """Bring a piece into memory, if the file is open; what is wrong ``piece`` says."""
        there = self._open  # another thread may close it
        if there is not None:
            there.read_ahead(*self._place(name, number)[:2])

    def _place(self, name: str, number: int) -> tuple[int, int, int]:
        """Return where a piece begins in the file, its bytes, and its rows."""
        kind, start = self.kinds[name], number * self.piece_rows[name]
        count = min(self.piece_rows[name], kind.shape[0] - start)
        return self._starts[name] + start * kind.row_bytes, count * kind.row_bytes, count

    def piece(self, name: str, number: int) -> Tensor:
        """Read a piece and raise ValueError unless it is what was written.

        Args:
            name: Of the tensor.
            number: Of the piece.

        Returns:
            The rows of the piece; not to be changed, and not to be kept: it may be the file.
        """
        offset, size, count = self._place(name, number)
        if self._open is None:
            data = torch.empty(size, dtype=torch.uint8)
            self._read_at(offset, bytes_of(data))
        else:
            data = self._open.bytes_at(offset, size)
        if crc32(bytes_of(data)) != self._sums[name][number]:
            start = number * self.piece_rows[name]
            raise ValueError(
                f"{self.path}: {name} is damaged between its rows {start} and {start + count}: "
                "the checksum is another"
            )
        kind = self.kinds[name]
        return data.view(kind.dtype).view(count, *kind.shape[1:])


@contextlib.contextmanager
def opened(files: Sequence[ShardFile]) -> Iterator[None]:
    """Keep files open, but not too many; see ``ShardFile.opened``."""
    with contextlib.ExitStack() as stack:
        for file in files[:_MOST_OPEN]:
            stack.enter_context(file.opened())
        yield


__all__ = ["Kind", "Part", "ShardFile", "Written", "opened", "write_shard"]
