"""Rows in fixed-size blocks: growth copies one block at most.

A row is a table's weights for one id and the optimizer's state behind them, so that one update is
one contiguous read and write. Kernels find blocks through a table of their addresses. Whole blocks
never move. On the CPU, while there are few, the last one may be a part, with memory for its first
rows alone, which moves when it grows: small tables are small. A table that may be larger than
memory has its first blocks there and the others in a mapped file (``table.row_file``).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import device_memory, host_memory, row_io
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import (
    BLOCK_SHIFT,
    BLOCKS,
    FREE_ROWS,
    MAPPED,
    NEXT_ROW,
    NUM_FREE,
    NUM_STATE,
    ROW_BYTES,
    STATE_FILL,
)
from recis_lightning.ops.row_io import RowField
from recis_lightning.table.row_file import RowFile
from recis_lightning.table.versions import block_version

_BLOCK_BYTES = 1 << 18  # about this much a block: quick to copy, and tables of blocks are small
_GPU_BLOCK_BYTES = 1 << 21  # on a GPU allocations are dear, and block addresses travel each step
_FEW_BLOCKS = 16  # a store of as many whole blocks has no part of one
_CHUNK_ROWS = 1 << 16  # rows read or written at once where all of them are copied
_MAPPED_RANGE = 1 << 26  # bytes of a file mapped at once, of which a shrinking store copies one
_MAPPED_BYTES = 1 << 25  # from here malloc always asks the system, which hands out small pages


class RowStore:
    """The rows of one table.

    Methods that change it keep the memory that it has whole until they return: the caller undoes
    them by its attributes and header (``table.undo``).

    Args:
        header: The table's header; the store owns its row fields.
        embedding_dim: Weights in a row.
        dtype: float32 or bfloat16 weights; state is float32.
        slots: Optimizer state: name -> float32 words a row.
        state_fill: What state starts from.
        file: Where blocks lie that are not in memory; None: all are.

    Attributes:
        addresses: int64 [num_blocks], of the blocks.
        capacity: Rows there is memory for.
    """

    def __init__(
        self,
        header: Header,
        embedding_dim: int,
        dtype: torch.dtype,
        slots: dict[str, int] | None = None,
        state_fill: float = 0.0,
        file: RowFile | None = None,
    ) -> None:
        self.header, self.file = header, file
        self.embedding_dim = embedding_dim
        self.dtype = dtype
        self._set_counts(0, 0)
        self.slots, self.state_fill = dict(slots or {}), state_fill
        words = self.weight_words + sum(self.slots.values())
        # A GPU's lanes load four words at once, from where rows lie at multiples of 16 bytes.
        self.row_words = -(-words // 4) * 4 if header.is_mirrored else words
        block_bytes = _BLOCK_BYTES if header.device.type == "cpu" else _GPU_BLOCK_BYTES
        self.block_shift = max(3, (block_bytes // (4 * self.row_words)).bit_length() - 1)
        self._enter_layout()
        self._set_allocations((), 0)
        self.set_free_rows(torch.empty(0, dtype=torch.int64, device=header.device))

    def _set_counts(self, next_row: int, num_free: int) -> None:
        fields = self.header.read_counts()
        fields[NEXT_ROW], fields[NUM_FREE] = next_row, num_free
        self.header.publish_counts()

    def _set_allocations(
        self, allocations: tuple[npt.NDArray[np.float32] | Tensor, ...], num_mapped: int
    ) -> None:
        """Take memory for rows: allocations of whole blocks, the last one perhaps of a part.

        Args:
            allocations: In the order of the rows.
            num_mapped: How many of them lie in the file, the last ones.
        """
        block_version.advance()
        self._allocations, self._num_mapped = allocations, num_mapped
        row_bytes = 4 * self.row_words
        sizes = [allocation.nbytes // row_bytes for allocation in allocations]
        self.capacity = sum(sizes)
        # Row numbers from which on rows lie in the file.
        self._first_mapped = sum(sizes[: len(sizes) - num_mapped])
        starts = [
            np.arange(0, allocation.nbytes, row_bytes << self.block_shift, dtype=np.int64)
            + _address_of(allocation)
            for allocation in allocations
        ]
        self.addresses = addresses = np.concatenate([np.empty(0, np.int64), *starts])
        self._addresses = torch.from_numpy(addresses).to(self.header.device)
        self.header.fields[BLOCKS] = self._addresses.data_ptr()
        self.header.fields[MAPPED] = 1 + self._first_mapped if num_mapped else 0
        self.header.publish()

    def _enter_layout(self) -> None:
        """Enter the layout of a row into the header; ``_set_allocations`` publishes it."""
        fields = self.header.fields
        fields[ROW_BYTES], fields[BLOCK_SHIFT] = 4 * self.row_words, self.block_shift
        fields[NUM_STATE] = sum(self.slots.values())
        fields[STATE_FILL] = np.float64(self.state_fill).view(np.int64)

    @property
    def weight_words(self) -> int:
        """Float32 words that the weights of a row take."""
        return self.embedding_dim if self.dtype is torch.float32 else (self.embedding_dim + 1) // 2

    @property
    def num_rows(self) -> int:
        """Rows that were ever handed out, freed ones included."""
        return int(self.header.read_counts()[NEXT_ROW])

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, the addresses and the list of freed rows."""
        return 4 * self.row_words * self.capacity + self.addresses.nbytes + self._free_rows.nbytes

    def memory(self) -> Iterator[Tensor]:
        """Yield the tensors of rows, addresses and freed rows, beside a GPU."""
        yield from (self._addresses, self._free_rows)
        yield from (part for part in self._allocations if isinstance(part, Tensor))

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the blocks that lie in the file."""
        return 4 * self.row_words * (self.capacity - self._first_mapped)

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer state in all blocks."""
        return 4 * sum(self.slots.values()) * self.capacity

    @property
    def unused(self) -> int:
        """Rows there is memory for and no id has, by the counts that the host has seen."""
        return self.capacity - self.header.fields.item(NEXT_ROW) + self.header.fields.item(NUM_FREE)

    def reserve(self, num_new: int, growth: int = 0) -> None:
        """Make room for ``num_new`` rows more; freed rows count as room.

        Args:
            num_new: Rows.
            growth: By how many rows at least a store of few blocks grows, if it does.
        """
        self.header.read_counts()
        unused = self.unused
        if num_new <= unused:
            return
        missing, block_rows = num_new - unused, 1 << self.block_shift
        if len(self.addresses) >= _FEW_BLOCKS or self.header.is_mirrored:
            growth = len(self.addresses) // 8 << self.block_shift
        wanted = self.capacity + max(missing, growth)
        kept, part = self._allocations, None
        new: list[npt.NDArray[np.float32] | Tensor] = []
        in_memory = wanted if self.file is None else min(wanted, self._rows_in_memory(wanted))
        if in_memory > self._first_mapped:
            old_whole, old_rest = divmod(self._first_mapped, block_rows)
            whole, rest = self._divide(in_memory)
            if old_rest:
                kept, part = kept[:-1], kept[-1]
            sizes = ((whole - old_whole) << self.block_shift, rest)
            new = [self._allocate(size) for size in sizes if size]
            in_memory = (whole << self.block_shift) + rest
        mapped = self._map(wanted - max(in_memory, self.capacity))
        if part is not None:  # the first of the new ones is larger
            new[0][: len(part)] = part  # type: ignore[assignment]  # both are of one kind
        self._set_allocations((*kept, *new, *mapped), self._num_mapped + len(mapped))

    def _rows_in_memory(self, wanted: int) -> int:
        """Return how many of the first rows are to lie in memory, whole blocks or all."""
        if self._num_mapped:
            return self._first_mapped
        assert self.file is not None
        row_bytes, rows = 4 * self.row_words, self._first_mapped
        room = self.file.room_in_memory(rows * row_bytes, (wanted - rows) * row_bytes) // row_bytes
        if rows + room >= wanted:
            return wanted
        whole = (rows + room) >> self.block_shift << self.block_shift
        return max(whole, self.blocks_for(rows) << self.block_shift)

    def _map(self, num_rows: int) -> list[npt.NDArray[np.float32]]:
        """Return allocations in the file, of blocks that hold so many rows."""
        block_bytes = 4 * self.row_words << self.block_shift
        left, at_once = self.blocks_for(max(num_rows, 0)), max(_MAPPED_RANGE // block_bytes, 1)
        mapped: list[npt.NDArray[np.float32]] = []
        try:
            while left:
                count = min(left, at_once)
                assert self.file is not None
                mapped.append(self.file.empty(count * block_bytes).view(np.float32))
                left -= count
        except BaseException:
            mapped.clear()  # whoever keeps the error would keep the space
            raise
        return mapped

    def _divide(self, num_rows: int) -> tuple[int, int]:
        """Return the whole blocks to hold so many rows, and the rows of a part behind them."""
        whole, rest = divmod(num_rows, 1 << self.block_shift)
        is_whole = whole >= _FEW_BLOCKS or self.header.is_mirrored
        if rest and (is_whole or (self._num_mapped and num_rows > self._first_mapped)):
            return whole + 1, 0
        return whole, rest

    def _allocate(self, num_rows: int) -> npt.NDArray[np.float32] | Tensor:
        return _allocate(num_rows * self.row_words, self.header.device)

    def blocks_for(self, num_rows: int) -> int:
        """Return how many blocks hold so many rows."""
        return -(-num_rows >> self.block_shift)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy whole rows to other places.

        Args:
            source: int64 [n].
            target: int64 [n], distinct, none of them in ``source``.
        """
        count = min(source.numel(), _CHUNK_ROWS)
        words = torch.empty(count, self.row_words, device=self.header.device)
        for start in range(0, source.numel(), _CHUNK_ROWS):
            chunk = slice(start, min(start + _CHUNK_ROWS, source.numel()))
            columns = [RowField(words[: chunk.stop - chunk.start], 0)]
            row_io.gather_fields(self.header, source[chunk], columns)
            row_io.scatter_fields_(self.header, target[chunk], columns)

    def copy_of(self, rows: Tensor) -> Tensor:
        """Return whole rows, int64 [n], as float32 [n, row_words] on the rows' device."""
        words = torch.empty(rows.numel(), self.row_words, device=self.header.device)
        row_io.gather_fields(self.header, rows, [RowField(words, 0)])
        return words

    def put_back(self, rows: Tensor, words: Tensor) -> None:
        """Overwrite rows with what ``copy_of`` returned of them."""
        row_io.scatter_fields_(self.header, rows, [RowField(words, 0)])

    def shrink(self, num_rows: int) -> None:
        """Keep the first ``num_rows`` rows, none of them freed, and the memory that holds them.

        What is kept of an allocation that is not kept whole is copied.
        """
        whole, rest = self._divide(num_rows)
        kept, left = [], (whole << self.block_shift) + rest
        num_mapped, first_mapped = 0, len(self._allocations) - self._num_mapped
        for number, allocation in enumerate(self._allocations):
            rows = allocation.nbytes // (4 * self.row_words)
            num_mapped += number >= first_mapped and left > 0
            if rows <= left:
                kept.append(allocation)
            elif left > 0 and number >= first_mapped:
                kept.append(self._first_part(allocation, left))
            elif left > 0:
                whole_rows = left >> self.block_shift << self.block_shift
                for start, stop in ((0, whole_rows), (whole_rows, left)):
                    if start < stop:
                        smaller, words = self._allocate(stop - start), self.row_words
                        smaller[:] = allocation[start * words : stop * words]  # type: ignore[assignment]
                        kept.append(smaller)
            left -= rows
        self._set_allocations(tuple(kept), num_mapped)
        self._set_counts(num_rows, 0)
        self.set_free_rows(torch.empty(0, dtype=torch.int64, device=self.header.device))

    def _first_part(
        self, allocation: npt.NDArray[np.float32] | Tensor, num_rows: int
    ) -> npt.NDArray[np.float32] | Tensor:
        """Return a copy of an allocation's first rows in the file, or all of it on a full disk."""
        try:
            (copied,) = self._map(num_rows)
        except (OSError, MemoryError):  # to give space back must not need any
            return allocation
        copied[:] = allocation[: copied.size]
        return copied

    def set_free_rows(self, rows: Tensor) -> None:
        """Replace the stack of freed rows; the last one is reused first."""
        self._free_rows = rows.contiguous()
        self._set_counts(self.num_rows, rows.numel())
        self.header.fields[FREE_ROWS] = self._free_rows.data_ptr()
        self.header.publish()

    @property
    def free_rows(self) -> Tensor:
        """int64 [n], the stack of freed rows."""
        return self._free_rows[: int(self.header.read_counts()[NUM_FREE])]

    def relayout(self, slots: dict[str, int], state_fill: float) -> None:
        """Change the optimizer state behind the weights, keeping weights and slots that stay.

        Raises:
            MemoryError: No room for both layouts at once; the store is as it was.
        """
        if list(slots.items()) == list(self.slots.items()):
            self.state_fill = state_fill
            self._enter_layout()
            self.header.publish()
            return
        # Behind a header of its own: until all rows are there, nothing of this store changes.
        header, file = self.header.copy(), self.file
        other = RowStore(header, self.embedding_dim, self.dtype, slots, state_fill, file)
        num_rows = self.num_rows
        other.reserve(num_rows)
        kept = [name for name in slots if self.slots.get(name) == slots[name]]
        for start in range(0, num_rows, _CHUNK_ROWS):
            stop = min(start + _CHUNK_ROWS, num_rows)
            rows = torch.arange(start, stop, device=self.header.device)
            weights, state = self._read(rows)
            other._write(rows, weights, {name: state[name] for name in kept})
        self._take_blocks(other)

    def _take_blocks(self, other: RowStore) -> None:
        """Take over the blocks of another store, and their layout; header and counts stay."""
        self.slots, self.state_fill = other.slots, other.state_fill
        self.row_words, self.block_shift = other.row_words, other.block_shift
        self._enter_layout()
        self._set_allocations(other._allocations, other._num_mapped)

    def read(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Copy rows out.

        Args:
            rows: int64 [n], none negative.

        Returns:
            weights: [n, embedding_dim] in the store's dtype; on the CPU, wherever the rows are.
            slots: name -> float32 [n, words].
        """
        if self.header.device.type == "cpu":
            return self._read(rows)
        n = rows.numel()
        weights = torch.empty(n, self.embedding_dim, dtype=self.dtype, device="cpu")
        slots = {name: torch.empty(n, words, device="cpu") for name, words in self.slots.items()}
        for start in range(0, n, _CHUNK_ROWS):  # so that the device need not hold them twice
            chunk = slice(start, min(start + _CHUNK_ROWS, n))
            weights[chunk], state = self._read(rows[chunk])
            for name, slot in state.items():
                slots[name][chunk] = slot
        return weights, slots

    def read_whole(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Copy rows to the CPU, with all their optimizer state together.

        Args:
            rows: int64 [n], none negative; all are held at once on their device too.

        Returns:
            weights: [n, embedding_dim] in the store's dtype, a view.
            state: float32 [n, words], a view.
        """
        first = self.weight_words
        size = first + sum(self.slots.values())
        words = torch.empty(rows.numel(), size, device=rows.device)
        row_io.gather_fields(self.header, rows, [RowField(words, 0)])
        words = words.cpu()
        weights = words if self.dtype is torch.float32 else words.view(self.dtype)
        return weights[:, : self.embedding_dim], words[:, first:]

    def _read(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        n, device = rows.numel(), rows.device
        weights = _empty_rows(n, self.embedding_dim, self.dtype, device)
        slots = {
            name: _empty_rows(n, words, torch.float32, device) for name, words in self.slots.items()
        }
        row_io.gather_fields(self.header, rows, self._columns(weights, slots))
        return weights, slots

    def write(self, rows: Tensor, weights: Tensor, slots: dict[str, Tensor]) -> None:
        """Overwrite whole rows; slots that are not given start afresh.

        Args:
            rows: int64 [n], distinct.
            weights: [n, embedding_dim] in the store's dtype, on the CPU or where the rows are.
            slots: name -> float32 [n, words].
        """
        device = self.header.device
        if weights.device == device:
            self._write(rows, weights, slots)
            return
        for start in range(0, rows.numel(), _CHUNK_ROWS):
            chunk = slice(start, start + _CHUNK_ROWS)
            state = {name: slot[chunk].to(device) for name, slot in slots.items()}
            self._write(rows[chunk], weights[chunk].to(device), state)

    def _write(self, rows: Tensor, weights: Tensor, slots: dict[str, Tensor]) -> None:
        filled = {
            name: torch.full((1, words), self.state_fill, device=weights.device)
            for name, words in self.slots.items()
        }
        given = {name: slots[name].contiguous() for name in self.slots if name in slots}
        columns = self._columns(weights.contiguous(), {**filled, **given})
        row_io.scatter_fields_(self.header, rows, columns)

    def _columns(self, weights: Tensor, slots: dict[str, Tensor]) -> list[RowField]:
        """Return where in a row weights and slots stand."""
        columns, words = [RowField(weights, 0)], self.weight_words
        for name, width in self.slots.items():
            columns.append(RowField(slots[name], 4 * words))
            words += width
        return columns


def _empty_rows(n: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised [n, width]."""
    num_bytes = n * width * dtype.itemsize
    if device.type != "cpu" or num_bytes < _MAPPED_BYTES:
        return torch.empty(n, width, dtype=dtype, device=device)
    # The first touch of 400 MB took 144 ms of system time in small pages, and takes 29 in huge.
    return torch.from_numpy(host_memory.empty(num_bytes)).view(dtype).view(n, width)


def _allocate(words: int, device: torch.device) -> npt.NDArray[np.float32] | Tensor:
    """Return uninitialised float32 words that start on a cache line."""
    if device.type != "cpu":
        return device_memory.empty(words, torch.float32, device)
    return host_memory.empty(4 * words).view(np.float32)


def _address_of(allocation: npt.NDArray[np.float32] | Tensor) -> int:
    return allocation.data_ptr() if isinstance(allocation, Tensor) else allocation.ctypes.data


__all__ = ["RowStore"]
