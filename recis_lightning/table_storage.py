"""What a table holds: index, rows and policy columns behind one header, and room for more."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from recis_lightning.admission import Screening
from recis_lightning.ops import hash_index
from recis_lightning.ops.table_header import CAPACITY, HEADER_SIZE, LAST_SEEN, NUM_IDS, SIGHTINGS
from recis_lightning.row_store import RowStore
from recis_lightning.sightings import Sightings

_NEVER_EXPIRES = 2**63 - 1  # the stamp of a free row, so that eviction passes it over


class _Epoch:
    """Counts moments at which what others have noted of a table's storage may be out of date."""

    number = 0

    def advance(self) -> None:
        self.number += 1


_epoch = _Epoch()


def storage_epoch() -> int:
    """Return a number that changes when some table has a new header or dtype."""
    return _epoch.number


class TableStorage:
    """The storage of a table, and the table that index ops know (``ops.hash_index.Table``).

    It grows when an op asks for room; kernels find everything through ``header``.

    Attributes:
        header: int64 [HEADER_SIZE], at one address as long as the storage lives.
        rows: Weights and optimizer state.
        generation: Grows when rows go: rows that a lookup noted before are void.
    """

    embedding_dim: int
    dtype: torch.dtype
    sightings: Sightings | None
    generation = 0

    @property
    def name(self) -> str:
        """What errors call the table."""
        raise NotImplementedError

    @property
    def keeps_last_seen(self) -> bool:
        """Whether a policy asks for the step of each row's last training lookup."""
        raise NotImplementedError

    def start_storage(self) -> None:
        """Make a header and empty storage."""
        self.header = torch.zeros(HEADER_SIZE, dtype=torch.int64)
        self._header = self.header.numpy()
        self.empty_storage({}, 0.0)
        _epoch.advance()

    def empty_storage(self, slots: dict[str, int], state_fill: float) -> None:
        """Start anew with no ids, behind the same header; rows are laid out for ``slots``."""
        self._entries = hash_index.empty_entries(self.header, hash_index.MIN_CAPACITY)
        self.rows = RowStore(self.header, self.embedding_dim, self.dtype, slots, state_fill)
        self._last_seen = torch.empty(0, dtype=torch.int64)
        self._header[LAST_SEEN] = 0

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Give weights another dtype from the next ``empty_storage`` on."""
        self.dtype = dtype
        _epoch.advance()

    def __len__(self) -> int:
        return int(self._header[NUM_IDS])

    def __bool__(self) -> bool:
        return True  # an empty table is still a table

    @property
    def capacity(self) -> int:
        """Entries of the index; it grows before they are full."""
        return int(self._header[CAPACITY])

    @property
    def nbytes(self) -> int:
        """Bytes of index, rows (weights and optimizer state) and policy columns."""
        return self._entries.nbytes + self.rows.nbytes + self.column_bytes

    @property
    def column_bytes(self) -> int:
        """Bytes of what policies keep."""
        return self._last_seen.nbytes + (0 if self.sightings is None else self.sightings.nbytes)

    def reserve_ids(self, num_new: int) -> None:
        """Make room in the index for ``num_new`` ids more."""
        capacity = hash_index.capacity_for(len(self) + num_new)
        if capacity > self.capacity:
            with _Memory(self, f"an index of {capacity} entries"):
                self._entries, _ = hash_index.rebuild(self.header, capacity)

    def reserve_rows(self, num_new: int) -> None:
        """Make room for ``num_new`` rows more."""
        with _Memory(self, f"{num_new} rows more"):
            self.rows.reserve(num_new)
            if self.keeps_last_seen and self._last_seen.numel() < self.rows.capacity:
                # np.empty asks for huge pages; the old stamps are the front of the new.
                column = torch.from_numpy(np.empty(self.rows.capacity, np.int64))
                column[: self._last_seen.numel()] = self._last_seen
                self._last_seen = column
                self._header[LAST_SEEN] = column.data_ptr()

    def start_sightings(self, screening: Screening | None) -> None:
        """Remember sightings of ids without a row as an admission policy asks."""
        self.sightings = None if screening is None else Sightings(screening)
        self._header[SIGHTINGS] = 0
        if self.sightings is not None:
            self._header[SIGHTINGS] = self.sightings.header.data_ptr()

    def begin_screening(self) -> None:
        """Count one training lookup."""
        assert self.sightings is not None
        self.sightings.begin_lookup()

    def reserve_sightings(self, num_new: int) -> None:
        """Make room for sightings of ``num_new`` ids more."""
        assert self.sightings is not None
        with _Memory(self, f"sightings of {num_new} ids more"):
            self.sightings.reserve(num_new)

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
        if self.keeps_last_seen:
            self._last_seen.numpy()[freed.numpy()] = _NEVER_EXPIRES
        self.generation += 1
        return removed


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
