"""Reading of rows into memory that lie in a mapped file, before an op asks for them: the contract.

A row that is not in memory is read when it is touched, and whoever touched it waits; a disk answers
many requests at once. So all rows of a batch are asked for first, and the op finds them in memory.
That is for speed alone: without it every op reads and writes the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from recis_lightning.ops import backend, file_memory
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import BLOCK_SHIFT, BLOCKS, MAPPED, ROW_BYTES

_PAGE = 4096
_CHUNK_BYTES = 1 << 25  # of rows that are copied one after the other, which need not stay in memory


def has_any(header: Header) -> bool:
    """Return whether some rows of a table lie in a mapped file."""
    return header.fields.item(MAPPED) != 0


def bring_in(asked: Sequence[tuple[Header, Tensor]], writes: bool) -> None:
    """Read the rows of a batch that lie in mapped files into memory, many at once.

    Args:
        asked: Tables' headers, each with rows, int64 [n] on the CPU; negative ones are passed
            over.
        writes: Whether the rows will be written: their pages are made ready for that too.

    Raises:
        RuntimeError: This is a forked child, and the file its parent's.
    """
    places: list[npt.NDArray[np.int64]] = []
    for header, rows in asked:
        fields = header.fields
        first: int = fields.item(MAPPED) - 1
        if first < 0 or header.is_mirrored:
            continue
        numbers = rows.numpy()
        mapped = numbers[numbers >= first]
        if not mapped.size:
            continue
        low, high = int(mapped.min()), int(mapped.max())
        shift, row_bytes = fields.item(BLOCK_SHIFT), fields.item(ROW_BYTES)
        blocks = _int64_at(fields.item(BLOCKS), (high >> shift) + 1)
        if high - low < 2 * mapped.size:
            _advise(blocks[low >> shift :], row_bytes << shift)
        place = np.empty((mapped.size, 2), np.int64)
        place[:, 0] = blocks[mapped >> shift] + (mapped & ((1 << shift) - 1)) * row_bytes
        place[:, 1] = row_bytes
        file_memory.check_process(int(place[0, 0]))
        places.append(place)
    if places:
        header, _ = asked[0]
        joined = np.concatenate(places)
        if writes:
            file_memory.note_changes(_PAGE * len(joined))
        backend.module("mapped_rows", header.device).bring_in(joined, writes, _PAGE)


def chunks(header: Header, num_rows: int) -> Iterator[slice]:
    """Yield slices of so many rows, small ones if rows lie in a mapped file.

    All of them need not be in memory at once.
    """
    size = num_rows
    if has_any(header):
        size = max(_CHUNK_BYTES // header.fields.item(ROW_BYTES), 1)
    for start in range(0, num_rows, max(size, 1)):
        yield slice(start, min(start + size, num_rows))


def _advise(blocks: npt.NDArray[np.int64], block_bytes: int) -> None:
    """Have blocks read in the background, those that follow one another at once."""
    starts = np.flatnonzero(np.diff(blocks, prepend=-1) != block_bytes)
    counts = np.diff(starts, append=blocks.size)
    for start, count in zip(blocks[starts].tolist(), counts.tolist(), strict=True):
        skipped = start % _PAGE
        file_memory.advise_needed(start - skipped, count * block_bytes + skipped)


def _int64_at(address: int, count: int) -> npt.NDArray[np.int64]:
    return np.ctypeslib.as_array((ctypes.c_int64 * count).from_address(address))


__all__ = ["bring_in", "chunks", "has_any"]
