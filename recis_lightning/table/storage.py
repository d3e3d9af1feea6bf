"""Storage of a table: index, rows, policy columns and admission counts, reached by one header."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from recis_lightning.admission import Screening
from recis_lightning.ops import backend, device_memory, hash_index, host_memory, row_init
from recis_lightning.ops.device_memory import free_bytes
from recis_lightning.ops.hash_index import Segments, TableMemory
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import (
    ADMISSION_COUNTER,
    CAPACITY,
    CLAIMED,
    COUNTS,
    INSERT,
    LAST_SEEN,
    LAST_TIME,
    NUM_IDS,
    NUM_UPDATES,
    SEGMENT_FLAGS,
    SEGMENT_HEADER,
    SEGMENT_SIZE,
    STEP,
    TIME,
    TOUCH,
)
from recis_lightning.table import sizing
from recis_lightning.table.admission_counter import AdmissionCounter
from recis_lightning.table.allocation import Allocation, return_to_system
from recis_lightning.table.row_changes import RowChanges
from recis_lightning.table.row_file import RowFile
from recis_lightning.table.row_store import RowStore
from recis_lightning.table.undo import Undo
from recis_lightning.table.versions import block_version, layout_version, removal_version

_COLUMN_FIELDS = {"last_seen": LAST_SEEN, "counts": COUNTS, "last_time": LAST_TIME}
# A column of bytes, there as long as someone asks which rows change (``table.row_changes``).
_MARKS = "marks"
# Beside a GPU there is room for two more lookups, if it takes that share of the free memory; else
# for so many ids, or a quarter of the table.
_HEADROOM_SHARE, _HEADROOM_ROWS = 1 / 8, 1 << 16


def _counts_removals(name: str) -> Any:
    """Return a property that counts removals of one kind, and says so where numbers are kept."""

    def write(storage: Storage, count: int) -> None:
        setattr(storage, name, count)
        removal_version.advance()

    return property(attrgetter(name), write)


class Storage(TableMemory):
    """Memory of one table on one device; it grows when an op asks for room.

    Args:
        embedding_dim: Weights in a row.
        dtype: Of the weights.
        device: Where ids and rows are.
        kept_columns: Columns of policies, of ``eviction.KEPT_COLUMNS``.
        screening: Counts of ids without a row that the admission policy asks for; None for none.
        now: Returns the time in seconds, for the column "last_time".
        name: For errors; ``set_key`` changes it.
        row_file: Where rows lie that are not in memory; None: all are.

    Attributes:
        header: By which kernels find everything, at one address as long as the storage lives.
        entries: int64 [capacity + 1, 2], the index.
        rows: Weights and optimizer state.
        columns: Name -> int64 [rows.capacity], what policies keep of rows; "marks" is uint8.
        changes: Which rows changed since when, or None if nobody asks.
        admission_counter: Counts of ids without a row, or None.
        generation: Grows when rows go: row numbers that a lookup noted before are void.
        num_rooms: Evictions that made room: numbers of rows that may still get gradients stayed
            valid.
        num_removed: Rows that went since the table was made, by whatever way.
        num_loaded: Rows that came with a loaded state.
        num_overwrites: Calls of ``insert`` that gave known ids other weights.
        num_void: Entries that insertions left behind which failed: no id has them, and they take
            room until the index is rebuilt.
    """

    entries: Tensor
    rows: RowStore
    columns: dict[str, Tensor]
    generation: int = _counts_removals("_generation")
    num_rooms: int = _counts_removals("_num_rooms")

    def __init__(
        self,
        embedding_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        kept_columns: tuple[str, ...],
        screening: Screening | None,
        now: Callable[[], float],
        name: str,
        row_file: RowFile | None = None,
    ) -> None:
        self.embedding_dim, self.dtype, self.device = embedding_dim, dtype, device
        self.row_file = row_file
        self.kept_columns, self.now, self.name = kept_columns, now, name
        self.generation = self.num_removed = self.num_loaded = self.num_void = 0
        self.num_overwrites = self.num_rooms = 0
        self.changes: RowChanges | None = None
        self.header = Header(device, backend.is_async(device))
        self.admission_counter: AdmissionCounter | None = None
        self._empty({}, 0.0)
        self.set_screening(screening)
        layout_version.advance()

    def undo(self, *owners: object) -> Undo:
        """Return a context in which a change is undone if it does not come to its end.

        Args:
            owners: More objects whose attributes it may set.
        """
        parts: list[object] = [*owners, self, self.rows]
        headers = [self.header]
        if self.admission_counter is not None:
            parts.append(self.admission_counter)
            headers.append(self.admission_counter.header)
        return Undo(parts, headers)

    def _empty(self, slots: dict[str, int], state_fill: float) -> None:
        """Start anew with no ids, behind the same header; rows are laid out for ``slots``."""
        self.num_void = 0
        self.entries = hash_index.empty_entries(self.header, hash_index.MIN_CAPACITY)
        self.rows = RowStore(
            *(self.header, self.embedding_dim, self.dtype, slots, state_fill, self.row_file)
        )
        self._set_columns({name: self._new_column(name, 0) for name in self._column_names})

    def clear(self) -> None:
        """Remove all ids and admission counts; step, number of updates and row layout stay."""
        with self.undo():
            self.generation += 1
            self.num_removed += len(self)
            if self.changes is not None:
                self.changes.note_all()
            if self.admission_counter is not None:
                self.admission_counter.clear()
            self._empty(self.rows.slots, self.rows.state_fill)

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Give weights another dtype from the next ``clear`` on."""
        self.dtype = dtype
        layout_version.advance()

    def set_key(self, seed: int, name: str, begun_as: str | None = None) -> None:
        """Let new rows depend on seed and name, beside their id; on another name if it is given."""
        self.name = name
        row_init.write_key(self.header, seed, name if begun_as is None else begun_as)

    def set_screening(self, screening: Screening | None) -> None:
        """Count ids without a row as a policy asks; counts stay if they are of the same kind."""
        old, new = self.admission_counter, None
        if screening == (None if old is None else old.screening):
            return
        if screening is not None:
            with Allocation(self, "admission counts"):
                new = AdmissionCounter(screening, self.device)
                if old is not None and old.screening.kind == screening.kind:
                    new.load_state(old.state(), self.name)
        self.admission_counter = new
        self.header.fields[ADMISSION_COUNTER] = 0 if new is None else new.header.address
        self.header.publish()

    def set_slots(self, slots: dict[str, int], state_fill: float) -> None:
        """Lay rows out for an optimizer: state by name -> float32 words, and what it starts from.

        Weights, and slots that stay, are kept.
        """
        with Allocation(self, "rows laid out for another optimizer"), self.undo():
            if self.changes is not None and list(slots.items()) != list(self.rows.slots.items()):
                self.changes.note_all()
            self.rows.relayout(slots, state_fill)
            self._fit_columns()  # blocks of another layout hold other numbers of rows
            self.fit_index()

    # ---- sizes

    def __len__(self) -> int:
        return int(self.header.read_counts()[NUM_IDS])

    def __bool__(self) -> bool:
        return True  # an empty storage is still a storage

    @property
    def capacity(self) -> int:
        """Entries of the index; it grows before they are full."""
        return int(self.header.fields[CAPACITY])

    @property
    def nbytes(self) -> int:
        """Bytes of index, rows (weights and optimizer state), columns and admission counts."""
        return self.entries.nbytes + self.rows.nbytes + self.column_bytes

    def memory(self) -> Iterator[Tensor]:
        """Yield all tensors that kernels reach by the header, beside a GPU."""
        yield from (self.header.tensor, self.entries, *self.columns.values())
        yield from self.rows.memory()
        if self.admission_counter is not None:
            yield from self.admission_counter.memory()

    @property
    def column_bytes(self) -> int:
        """Bytes of columns and admission counts."""
        counts = 0 if self.admission_counter is None else self.admission_counter.nbytes
        return sum(column.nbytes for column in self.columns.values()) + counts

    # ---- finding ids

    def segments(self, ids: Tensor, insert: bool = False) -> Segments:
        """Return the one segment of a lookup that asks this table only, whatever its policy.

        Args:
            ids: int64 [n], contiguous; kept by the caller.
            insert: Give unknown ids a row.
        """
        segments = np.zeros((1, SEGMENT_SIZE), np.int64)
        segments[0, SEGMENT_HEADER] = self.header.address
        touch = TOUCH * self.keeps_access_metadata
        segments[0, SEGMENT_FLAGS] = (INSERT | touch) * insert
        hash_index.write_addresses(segments, [ids])
        return segments

    def find(self, ids: Tensor) -> Tensor:
        """Return int64 [n], the row of each id, negative where there is none."""
        flat = ids.reshape(-1).to(self.device).contiguous()
        return hash_index.find(self.segments(flat), flat.numel(), self.device)

    def occupied_rows(self) -> Tensor:
        """Return bool [rows], those that an id has."""
        occupied = torch.ones(self.rows.num_rows, dtype=torch.bool, device=self.device)
        occupied[self.rows.free_rows] = False
        return occupied

    # ---- columns of policies

    @property
    def weights_version(self) -> int:
        """Number that grows whenever weights of rows that were there are overwritten."""
        num_updates: int = self.header.fields.item(NUM_UPDATES)
        return num_updates + self.num_overwrites

    @property
    def step(self) -> int:
        """Step with which training lookups mark rows as seen."""
        step: int = self.header.fields.item(STEP)
        return step

    @property
    @override
    def keeps_last_seen(self) -> bool:
        return "last_seen" in self.kept_columns

    @property
    def keeps_access_metadata(self) -> bool:
        """Whether a training lookup must note frequency or time of a row beside its step."""
        return "counts" in self.kept_columns or "last_time" in self.kept_columns

    @override
    def read_clock(self) -> None:
        if "last_time" in self.kept_columns:
            # Beside a GPU it is sent with the segments of the lookup.
            self.header.fields[TIME] = self._now_us()

    def ages(self, rows: Tensor) -> Tensor:
        """Return for each row the microseconds since its last training lookup, int64 [n]."""
        return self._now_us() - self.columns["last_time"][rows]

    def set_ages(self, rows: Tensor, ages: Tensor) -> None:
        """Set what ``ages`` returns."""
        self.columns["last_time"][rows] = self._now_us() - ages

    def _now_us(self) -> int:
        return round(self.now() * 1e6)

    def halve_counts(self, times: int, step: int) -> None:
        """Halve the counts of all rows some times, rounding down, and set the step."""
        with self.undo():
            if times and "counts" in self.columns:
                old = self.columns["counts"]
                new = self._new_column("counts", old.numel())
                torch.bitwise_right_shift(old, min(times, 63), out=new)
                self._set_columns({**self.columns, "counts": new})
            self.header.fields[STEP] = step

    @property
    def _column_names(self) -> tuple[str, ...]:
        return self.kept_columns if self.changes is None else (*self.kept_columns, _MARKS)

    def _new_column(self, name: str, count: int) -> Tensor:
        """Return an uninitialised column."""
        dtype = torch.uint8 if name == _MARKS else torch.int64
        if self.device.type == "cpu":
            with torch.inference_mode(False):  # as in ``device_memory``
                return torch.from_numpy(host_memory.empty(count * dtype.itemsize)).view(dtype)
        return device_memory.empty(count, dtype, self.device)

    def _set_columns(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns
        block_version.advance()  # an update writes marks where it found them
        for name, field in _COLUMN_FIELDS.items():
            column = columns.get(name)
            self.header.fields[field] = (
                0 if column is None or not column.numel() else column.data_ptr()
            )
        self.header.publish()

    def _fit_columns(self) -> None:
        """Give columns as many items as there are rows, keeping what both have."""
        capacity, fitting = self.rows.capacity, {}
        if self._columns_fit():
            return
        for name, old in self.columns.items():
            fitting[name] = new = self._new_column(name, capacity)
            kept = min(old.numel(), capacity)
            new[:kept] = old[:kept]
            new[kept:] = 0
        self._set_columns(fitting)

    # ---- changes

    @property
    def marks_address(self) -> int:
        """Address of the rows' marks; 0 if nobody asks which rows change."""
        marks = self.columns.get(_MARKS)
        return 0 if marks is None or not marks.numel() else marks.data_ptr()

    def watch_changes(self) -> RowChanges:
        """Note from now on which rows change, and return what is noted."""
        if self.changes is None:
            with Allocation(self, "marks of changed rows"), self.undo():
                marks = self._new_column(_MARKS, self.rows.capacity)
                marks.zero_()
                self.changes = RowChanges()
                self._set_columns({**self.columns, _MARKS: marks})
        return self.changes

    def end_changes(self) -> None:
        """Note no more which rows change."""
        with self.undo():
            self.changes = None
            self._set_columns({k: v for k, v in self.columns.items() if k != _MARKS})

    def note_written(self, rows: Tensor) -> None:
        """Note that rows which may have had an id are written otherwise than by an update."""
        if self.changes is not None:
            self.columns[_MARKS][rows] = 0

    def _columns_fit(self) -> bool:
        capacity = self.rows.capacity
        return all(column.numel() == capacity for column in self.columns.values())

    # ---- growing, as ops ask for it

    @override
    def reserve_ids(self, num_new: int) -> None:
        num_ids = len(self)
        if self.outgrows_index(num_new):
            self._rebuild(max(self._capacity_for(num_ids + num_new), self.capacity))

    @override
    def outgrows_index(self, num_new: int) -> bool:
        num_ids, capacity = len(self) + self.num_void + num_new, self.capacity
        # Half of it may always be filled: most insertions ask no more.
        return 2 * num_ids > capacity and self._capacity_for(num_ids) > capacity

    def _capacity_for(self, num_ids: int) -> int:
        """Return how many entries an index has that is made for so many ids."""
        if self.header.is_mirrored:
            return hash_index.capacity_for(num_ids)
        return sizing.index_capacity(num_ids, self._row_bytes)

    @property
    def _row_bytes(self) -> int:
        return 4 * self.rows.row_words + 8 * len(self.columns)

    @override
    def fit_index(self) -> None:
        num_ids = len(self)
        if num_ids > sizing.SMALL_IDS or self.header.is_mirrored:
            return
        capacity = self._capacity_for(num_ids)
        if capacity < self.capacity:
            with contextlib.suppress(MemoryError):
                self._rebuild(capacity)

    def _rebuild(self, capacity: int) -> None:
        """Move all ids into a new index."""
        with Allocation(self, f"an index of {capacity} entries"), self.undo():
            self.entries, _ = hash_index.rebuild(self.header, capacity)
            self.num_void = 0

    @override
    def larger_index(self, num_new: int) -> Tensor | None:
        capacity = self._capacity_for(len(self) + num_new)
        if capacity <= self.capacity:
            self.reserve_ids(num_new)  # entries without an id may be in the way
            return None
        with Allocation(self, f"an index of {capacity} entries"):
            return host_memory.empty_int64(2 * (capacity + 1)).view(-1, 2)

    @override
    def take_index(self, entries: Tensor) -> None:
        with self.undo():
            self.entries, self.num_void = entries, 0
            hash_index.enter_entries(self.header, entries)

    @override
    def take_back(self, counts: Sequence[int] | None) -> None:
        self.num_void = hash_index.take_back(self.header, counts)

    @override
    def reserve_rows(self, num_new: int) -> None:
        self.header.read_counts()
        if num_new <= self.rows.unused:
            return
        with Allocation(self, f"{num_new} rows more"), self.undo():
            self.rows.reserve(num_new, sizing.row_growth(self.rows.capacity, self._row_bytes))
            self._fit_columns()

    @override
    def guaranteed_free(self) -> int:
        room = self.header.cached_free()
        if room is None:
            unacknowledged, fields = self.header.unacknowledged(), self.header.fields
            capacity = fields.item(CAPACITY)
            entries = int(capacity * hash_index.max_load(capacity)) - fields.item(NUM_IDS)
            room = min(entries - self.num_void, self.rows.unused) - unacknowledged
            self.header.cache_free(room)
        return room

    @override
    def reserve_headroom(self, num_new: int, num_ids: int) -> None:
        if self.header.is_mirrored:
            # Twice: the counts that tell how few were new come while the next lookup is launched.
            headroom = 2 * num_ids
            if headroom * self._bytes_per_id > _HEADROOM_SHARE * free_bytes(self.device):
                headroom = min(headroom, max(_HEADROOM_ROWS, len(self) // 4))
            headroom += num_new
            with contextlib.suppress(MemoryError):
                self.reserve_ids(headroom)
                self.reserve_rows(headroom)

    @property
    def _bytes_per_id(self) -> int:
        """Bytes that room for one more id takes: its row, columns, and entries at a low load."""
        return self._row_bytes + 64

    @property
    @override
    def num_lookups(self) -> int:
        return 0 if self.admission_counter is None else self.admission_counter.num_lookups

    @override
    def count_lookup(self) -> None:
        if self.admission_counter is not None:
            self.admission_counter.count_lookup()

    @override
    def reserve_counts(self, at_most: int, count: Callable[[], int] | None = None) -> None:
        if self.admission_counter is not None:
            with Allocation(self, f"admission counts of {at_most} ids more"):
                self.admission_counter.reserve(at_most, count)

    # ---- shrinking

    def remove_rows(
        self, gone: Tensor, within: Undo | None = None, spares_lookups: bool = False
    ) -> int:
        """Remove the ids of the rows that ``gone`` (bool [rows]) marks; return how many.

        Args:
            gone: Afterwards only rows that had an id are marked.
            within: Context of a change of which this is a part, of this storage's ``undo``.
            spares_lookups: Whether no row goes that a lookup may still bring a gradient for.
        """
        with self.undo() if within is None else contextlib.nullcontext(within) as undo:
            if self.changes is not None:
                ids, occupied = hash_index.id_of_row(self.header, self.rows.num_rows)
                self.changes.note_removed(ids[gone & occupied].cpu())
            self.entries, removed = hash_index.rebuild(self.header, self.capacity, gone)
            self.num_void = 0
            if not removed:
                return 0
            freed = gone.nonzero().squeeze(1).flip(0)  # the lowest row is reused first
            self.rows.set_free_rows(torch.cat([self.rows.free_rows, freed]))
            if spares_lookups:
                self.num_rooms += 1
            else:
                self.generation += 1
            self.num_removed += removed
            self._set_in_columns(undo, freed, {})
        return removed

    def _set_in_columns(self, undo: Undo, rows: Tensor, values: dict[str, Tensor]) -> None:
        """Overwrite columns at some rows, with 0 where no values are given."""
        for name, column in self.columns.items():
            before = column[rows]
            undo.on_failure(partial(column.__setitem__, rows, before))
            column[rows] = values.get(name, 0)

    def erase(self, rows: Tensor) -> None:
        """Overwrite freed rows, int64 [n] distinct: their memory may be read by a dump."""
        layout = (rows.numel(), self.embedding_dim)
        self.rows.write(rows, torch.zeros(layout, dtype=self.dtype, device=self.device), {})

    def compact(self) -> None:
        """Give back the memory of rows and entries that are not needed for the ids there are.

        Rows from the end move into the places of freed ones; so row numbers that a lookup noted
        before are void, and there must be no pending gradient.
        """
        nbytes = self.nbytes
        with self.undo() as undo:
            num_ids, occupied = len(self), self.occupied_rows()
            capacity = self._capacity_for(num_ids)
            source = occupied[num_ids:].nonzero().squeeze(1) + num_ids
            target = (~occupied[:num_ids]).nonzero().squeeze(1)
            if source.numel() or capacity < self.capacity:
                # A new index even if it is as large: the one before must keep its row numbers.
                self.entries, _ = hash_index.rebuild(self.header, min(capacity, self.capacity))
                self.num_void = 0
            if source.numel():
                renumbered = torch.arange(occupied.numel(), device=self.device)
                renumbered[source] = target
                rows = self.entries[:, 1]
                known = rows < CLAIMED
                rows[known] = renumbered[rows[known]]
                self.rows.move(source, target)
                moved = {name: self.columns[name][source] for name in self.kept_columns}
                self._set_in_columns(undo, target, moved)
                self._set_in_columns(undo, source, {})
            self.rows.shrink(num_ids)
            self._fit_columns()
            if self.admission_counter is not None:
                self.admission_counter.compact()
            self.generation += 1
        return_to_system(nbytes - self.nbytes)


__all__ = ["Storage"]
