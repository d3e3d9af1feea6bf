"""What a table holds: index, rows and policy columns behind one header, and room for more."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable

import torch
from torch import Tensor

from recis_lightning.admission import Screening
from recis_lightning.ops import backend, hash_index, host_memory
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import (
    CAPACITY,
    CLAIMED,
    COUNTS,
    LAST_SEEN,
    LAST_TIME,
    NUM_IDS,
    SIGHTINGS,
)
from recis_lightning.table.admission_counter import Sightings
from recis_lightning.table.row_store import RowStore
from recis_lightning.table.scan_rows import TableSurvey

_COLUMN_FIELDS = {"last_seen": LAST_SEEN, "counts": COUNTS, "last_time": LAST_TIME}
_AHEAD_ROWS = 1 << 16  # beside a GPU, room ahead is for so many ids, or a quarter of the table


class _Epoch:
    """Counts moments at which what others have noted of a table's storage may be out of date."""

    number = 0

    def advance(self) -> None:
        self.number += 1


_epoch = _Epoch()


def storage_epoch() -> int:
    """Return a number that changes when some table has a new header, dtype or optimizer."""
    return _epoch.number


class TableStorage(TableSurvey):
    """The storage of a table, and the table that index ops know (``ops.hash_index.Table``).

    It grows when an op asks for room; kernels find everything through ``header``.

    Attributes:
        header: int64 [HEADER_SIZE], at one address as long as the storage lives.
        rows: Weights and optimizer state.
        generation: Grows when rows go: rows that a lookup noted before are void.
    """

    embedding_dim: int
    dtype: torch.dtype
    device: torch.device
    sightings: Sightings | None
    kept_columns: tuple[str, ...]
    generation = 0

    @property
    def name(self) -> str:
        """What errors call the table."""
        raise NotImplementedError

    @property
    def keeps_last_seen(self) -> bool:
        """Whether a policy asks for the step of each row's last training lookup."""
        return "last_seen" in self.kept_columns

    @property
    def stamps(self) -> bool:
        """Whether a training lookup must note more of a row than its step."""
        return "counts" in self.kept_columns or "last_time" in self.kept_columns

    @property
    def _last_seen(self) -> Tensor:
        return self._columns["last_seen"]

    def _set_columns(self, columns: dict[str, Tensor]) -> None:
        self._columns = columns
        for name, field in _COLUMN_FIELDS.items():
            column = columns.get(name)
            self.header.fields[field] = (
                0 if column is None or not column.numel() else column.data_ptr()
            )
        self.header.publish()

    def start_storage(self) -> None:
        """Make a header and empty storage."""
        self.header = Header(self.device, backend.is_async(self.device))
        self.empty_storage({}, 0.0)
        _epoch.advance()

    def start_epoch(self) -> None:
        """Tell who noted something of the storage that it may be out of date."""
        _epoch.advance()

    def empty_storage(self, slots: dict[str, int], state_fill: float) -> None:
        """Start anew with no ids, behind the same header; rows are laid out for ``slots``."""
        self._entries = hash_index.empty_entries(self.header, hash_index.MIN_CAPACITY)
        self.rows = RowStore(self.header, self.embedding_dim, self.dtype, slots, state_fill)
        empty = torch.empty(0, dtype=torch.int64, device=self.device)
        self._set_columns(dict.fromkeys(self.kept_columns, empty))

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Give weights another dtype from the next ``empty_storage`` on."""
        self.dtype = dtype
        _epoch.advance()

    def __len__(self) -> int:
        return int(self.header.read_counts()[NUM_IDS])

    def __bool__(self) -> bool:
        return True  # an empty table is still a table

    @property
    def capacity(self) -> int:
        """Entries of the index; it grows before they are full."""
        return int(self.header.fields[CAPACITY])

    @property
    def nbytes(self) -> int:
        """Bytes of index, rows (weights and optimizer state) and policy columns."""
        return self._entries.nbytes + self.rows.nbytes + self.column_bytes

    @property
    def column_bytes(self) -> int:
        """Bytes of what policies keep."""
        sightings = 0 if self.sightings is None else self.sightings.nbytes
        return 8 * sum(map(Tensor.numel, self._columns.values())) + sightings

    def reserve_ids(self, num_new: int) -> None:
        """Make room in the index for ``num_new`` ids more."""
        capacity = hash_index.capacity_for(len(self) + num_new)
        if capacity > self.capacity:
            with _Memory(self, f"an index of {capacity} entries"):
                self._entries, _ = hash_index.rebuild(self.header, capacity)

    def larger_index(self, num_new: int) -> Tensor | None:
        """Allocate an index on the CPU, not cleared, if ``num_new`` more ids need a larger one."""
        capacity = hash_index.capacity_for(len(self) + num_new)
        if capacity <= self.capacity:
            return None
        with _Memory(self, f"an index of {capacity} entries"):
            return host_memory.empty_int64(2 * (capacity + 1)).view(-1, 2)

    def take_index(self, entries: Tensor) -> None:
        """Make an index, with all ids in it, the table's own."""
        hash_index.enter_entries(self.header, entries)
        self._entries = entries

    def reserve_rows(self, num_new: int) -> None:
        """Make room for ``num_new`` rows more."""
        with _Memory(self, f"{num_new} rows more"):
            self.rows.reserve(num_new)
            self._fit_columns()

    def _fit_columns(self) -> None:
        """Give columns as many items as there are rows, keeping what both have."""
        capacity, fitting = self.rows.capacity, {}
        for name, old in self._columns.items():
            if old.numel() == capacity:
                return
            fitting[name] = new = _new_column(capacity, self.device)
            kept = min(old.numel(), capacity)
            new[:kept] = old[:kept]
            new[kept:] = 0
        self._set_columns(fitting)

    def sure_room(self) -> int:
        """Return how many more ids there is room for, surely, without waiting for the device.

        Below 0 where more ids than the host has seen may have filled it already.
        """
        room = self.header.cached_free()
        if room is None:
            unseen, fields = self.header.unacknowledged(), self.header.fields
            capacity = fields.item(CAPACITY)
            entries = int(capacity * hash_index.max_load(capacity)) - fields.item(NUM_IDS)
            room = min(entries, self.rows.unused) - unseen
            self.header.cache_free(room)
        return room

    def reserve_ahead(self, num_new: int, num_ids: int) -> None:
        """Make room, if there is memory, so that later lookups need not ask again.

        Args:
            num_new: Ids about to be inserted, for which there is room already.
            num_ids: Ids of a lookup, known and unknown.
        """
        if self.header.is_mirrored:
            # Twice: the counts that tell how few were new come while the next lookup is launched.
            ahead = num_new + min(2 * num_ids, max(_AHEAD_ROWS, len(self) // 4))
            with contextlib.suppress(MemoryError):
                self.reserve_ids(ahead)
                self.reserve_rows(ahead)

    def start_sightings(self, screening: Screening | None) -> None:
        """Remember sightings of ids without a row as an admission policy asks."""
        self.sightings = None
        self.header.fields[SIGHTINGS] = 0
        if screening is not None:
            with _Memory(self, "sightings"):
                self.sightings = Sightings(screening, self.device)
            self.header.fields[SIGHTINGS] = self.sightings.header.address
        self.header.publish()

    def begin_screening(self) -> None:
        """Count one training lookup."""
        assert self.sightings is not None
        self.sightings.begin_lookup()

    def reserve_sightings(self, at_most: int, count: Callable[[], int] | None = None) -> None:
        """Make room for sightings of ``at_most`` ids more; see ``ops.admission.Screened``."""
        assert self.sightings is not None
        with _Memory(self, f"sightings of {at_most} ids more"):
            self.sightings.reserve(at_most, count)

    def set_slots(self, slots: dict[str, int], state_fill: float) -> None:
        """Lay rows out for an optimizer: state by name -> float32 words, and what it starts from.

        Weights, and slots that stay, are kept.
        """
        with _Memory(self, "rows laid out for another optimizer"):
            self.rows.relayout(slots, state_fill)

    def rebuild_index(self) -> None:
        """Rebuild the index at its size; entries without a row go."""
        self._entries, _ = hash_index.rebuild(self.header, self.capacity)

    def remove_rows(self, gone: Tensor) -> int:
        """Remove the ids of the rows that ``gone`` (bool [rows]) marks; return how many."""
        self._entries, removed = hash_index.rebuild(self.header, self.capacity, gone)
        if not removed:
            return 0
        freed = gone.nonzero().squeeze(1).flip(0)  # the lowest row is reused first
        self.rows.set_free_rows(torch.cat([self.rows.free_rows, freed]))
        for column in self._columns.values():
            column[freed] = 0
        self.generation += 1
        return removed

    def compact(self) -> None:
        """Give back the memory of rows and entries that are not needed for the ids there are.

        Rows from the end move into the places of freed ones; so rows that a lookup noted before
        are void, and there must be no pending gradient.
        """
        num_ids, live = len(self), self._live_rows()
        capacity = hash_index.capacity_for(num_ids)
        if capacity < self.capacity:
            self._entries, _ = hash_index.rebuild(self.header, capacity)
        source = live[num_ids:].nonzero().squeeze(1) + num_ids
        target = (~live[:num_ids]).nonzero().squeeze(1)
        if source.numel():
            renumbered = torch.arange(live.numel(), device=self.device)
            renumbered[source] = target
            rows = self._entries[:, 1]
            known = rows < CLAIMED
            rows[known] = renumbered[rows[known]]
            self.rows.move(source, target)
            for column in self._columns.values():
                column[target] = column[source]
        self.rows.shrink(num_ids)
        self._fit_columns()
        for column in self._columns.values():
            column[num_ids:] = 0
        if self.sightings is not None:
            self.sightings.compact()
        self.generation += 1
        _return_to_system()

    def _live_rows(self) -> Tensor:
        """Return bool [rows], those that an id has."""
        live = torch.ones(self.rows.num_rows, dtype=torch.bool, device=self.device)
        live[self.rows.free_rows] = False
        return live


def _return_to_system() -> None:
    """Let the allocator return what it holds free, where there is a way to ask (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _new_column(count: int, device: torch.device) -> Tensor:
    """Return an uninitialised int64 [count]."""
    with torch.inference_mode(False):  # what is made in inference mode nothing outside may change
        return _allocate_column(count, device)


def _allocate_column(count: int, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return host_memory.empty_int64(count)
    try:
        return torch.empty(count, dtype=torch.int64, device=device)
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"{8 * count} bytes on {device}") from error


class _Memory:
    """Turns a failed allocation into an error that names the table."""

    def __init__(self, table: TableStorage, wanted: str) -> None:
        self.table, self.wanted = table, wanted

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, MemoryError):
            raise MemoryError(
                f"table {self.table.name!r}, with {len(self.table)} rows in "
                f"{self.table.nbytes} bytes, found no memory for {self.wanted}"
            ) from error


__all__ = ["TableStorage", "storage_epoch"]
