"""Counts of ids that have no row yet, by which an admission policy decides."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from recis_lightning.admission import Screening
from recis_lightning.ops import admission, backend, device_memory, hash_index
from recis_lightning.ops import layout as fields
from recis_lightning.ops.header import Header, watch_counts
from recis_lightning.ops.layout import CAPACITY, NO_ROW, NUM_IDS
from recis_lightning.table.undo import Undo

_MAX_LOAD = 0.7


class AdmissionCounter:
    """Admission counts of one table, behind a header of its own; ``ops.admission`` says how.

    Args:
        screening: What the policy asks to count, and its threshold.
        device: Where the table is.

    Attributes:
        screening: As given.
        header: By which kernels find entries and counters.
    """

    def __init__(self, screening: Screening, device: torch.device) -> None:
        self.screening = screening
        self.header = Header(device, backend.is_async(device))
        for field, value in screening.fields().items():
            self.header.fields[field] = value
        self.clear()

    def clear(self) -> None:
        """Forget all counts; the number of lookups stays. The table undoes it if it fails."""
        self._entries = torch.empty(0, dtype=torch.int64, device=self.header.device)
        if self.screening.kind == fields.COUNT:
            self._entries = hash_index.empty_entries(self.header, hash_index.MIN_CAPACITY)
        check, device = self.screening, self.header.device
        size = check.num_blocks * check.num_hashes * check.width
        # Whole words: kernels may have no compare-and-swap of bytes.
        padded = device_memory.zeros(-(-size // 4) * 4, torch.uint8, device)
        self._counters = padded[:size].view(check.num_blocks, check.num_hashes, check.width)
        self._padded_counters = padded
        self._added = device_memory.zeros(check.num_blocks, torch.int64, device)
        self.header.fields[fields.ADMISSION_COUNTERS] = padded.data_ptr()
        self.header.fields[fields.ADMISSION_ADDED] = self._added.data_ptr()
        self.header.publish()

    @property
    def nbytes(self) -> int:
        """Bytes of entries and counters."""
        return self._entries.nbytes + self._counters.nbytes + self._added.nbytes

    def memory(self) -> Iterator[Tensor]:
        """Yield all tensors that kernels reach by the header."""
        yield from (self.header.tensor, self._entries, self._padded_counters, self._added)

    @property
    def num_lookups(self) -> int:
        """Training lookups so far."""
        return int(self.header.fields[fields.ADMISSION_NUM_LOOKUPS])

    def count_lookup(self) -> None:
        """Count a training lookup, and let a sketch decay when it is due.

        Raises:
            OverflowError: There were 2**30 lookups already.
        """
        if self.num_lookups >= fields.MAX_LOOKUPS - 1:
            raise OverflowError("an admission policy counts 2**30 training lookups at most")
        # Beside a GPU it is sent with the segments of the lookup.
        self.header.fields[fields.ADMISSION_NUM_LOOKUPS] += 1
        if self.screening.fade_after:
            fade_after = self.screening.fade_after
            admission.decay_(self.header, self._counters, self._added, fade_after)

    def reserve(self, at_most: int, count: Callable[[], int] | None = None) -> None:
        """Make room for ``at_most`` ids more; expired entries go first.

        Args:
            at_most: How many ids there may be.
            count: Waits for the device and returns how many there are, where room might run out;
                None if ``at_most`` does. Room is then made for two more lookups as well, by which
                time counts have come.
        """
        if self.screening.kind != fields.COUNT:
            return
        if not self._surely_fits(at_most):
            num_new, ahead = at_most, 0
            if count is not None:
                num_new, ahead = count(), 2 * at_most
            num_ids = int(self.header.read_counts()[NUM_IDS])
            if num_ids + num_new + ahead > self._limit():
                self._rebuild(num_new + ahead)
            at_most = num_new
        elif not self._surely_fits(4 * at_most):  # soon it would have to wait
            watch_counts([self.header])
        self.header.note_insertion(at_most)

    def _surely_fits(self, num_new: int) -> bool:
        """Tell, without waiting for the device, whether there is room for ``num_new`` ids more."""
        num_ids = self.header.unacknowledged() + int(self.header.fields[NUM_IDS])
        return num_ids + num_new <= self._limit()

    def _limit(self) -> float:
        return _MAX_LOAD * int(self.header.fields[CAPACITY])

    def compact(self) -> None:
        """Drop expired entries, and give back the memory they took."""
        if self.screening.kind == fields.COUNT:
            self._rebuild(0)

    def _rebuild(self, num_new: int) -> None:
        live = self._live()
        self._entries[:, 1].masked_fill_(~live, NO_ROW)
        num_live = int(live.sum())
        capacity = hash_index.MIN_CAPACITY
        while capacity < 2 * (num_live + num_new):
            capacity *= 2
        with Undo([self], [self.header]):
            self._entries, _ = hash_index.rebuild(self.header, capacity)
            self.header.read_counts()[NUM_IDS] = num_live
            self.header.publish_counts()

    def _live(self) -> Tensor:
        """Return bool [entries], those of ids below the threshold that were counted recently."""
        cells = self._entries[:, 1]
        live = (cells != NO_ROW) & (cells & fields.COUNT_MASK < self.screening.threshold)
        age = self.num_lookups - (cells >> 32)
        return live & (age <= self.screening.forget_after)

    def forget(self, ids: Tensor) -> bool:
        """Forget the counts of ids, int64 [n]; return False if it cannot, as a sketch cannot."""
        if self.screening.kind == fields.COUNT:
            admission.forget_(self.header, ids.to(self.header.device))
        return self.screening.kind != fields.SKETCH

    def state(self, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
        """Return the counts as a table saves them: tensors on the CPU and primitives.

        Args:
            rank: This rank, whose blocks of a sketch to return; those of others are zeros.
            world_size: Ranks that share the table.
        """
        state: dict[str, Any] = {"num_lookups": self.num_lookups}
        if self.screening.kind == fields.COUNT:
            kept = self._entries[self._live()]
            kept = kept[kept[:, 0].argsort()].cpu()
            state["pending_ids"] = kept[:, 0].clone()
            state["pending_counts"] = kept[:, 1] & fields.COUNT_MASK
            state["pending_lookups"] = kept[:, 1] >> 32
        elif self.screening.kind == fields.SKETCH:
            state["sketch"] = self._counters.flatten(1).to("cpu", copy=True)
            state["num_sketched"] = self._added.to("cpu", copy=True)
            if self.screening.num_blocks % world_size == 0:
                # A loaded sketch has the blocks of all ranks, which those have counted on since.
                blocks = torch.arange(self.screening.num_blocks, device="cpu")
                for value in (state["sketch"], state["num_sketched"]):
                    value[blocks % world_size != rank] = 0
        return state

    def load_state(self, state: dict[str, Any], table: str) -> None:
        """Replace all counts by those of a saved table, none if it has none.

        The table undoes it if it fails.

        Args:
            state: A table's state.
            table: The table's name, for warnings.
        """
        self.clear()
        self.header.fields[fields.ADMISSION_NUM_LOOKUPS] = state.get("num_lookups", 0)
        self.header.publish()
        if self.screening.kind == fields.COUNT and "pending_ids" in state:
            ids = state["pending_ids"]
            self.reserve(ids.numel())
            # Under a lower threshold than before, an id is admitted when it is next looked up.
            counts = state["pending_counts"].clamp(max=self.screening.threshold - 1)
            values = (state["pending_lookups"] << 32) | counts
            entries = torch.stack([ids, values], dim=1).to(self.header.device)
            hash_index.fill(self.header, entries)
        if self.screening.kind == fields.SKETCH and "sketch" in state:
            own = self._counters.flatten(1)
            # Sketches of earlier versions have no blocks, and one number.
            if state["sketch"].shape != own.shape or not isinstance(state["num_sketched"], Tensor):
                warnings.warn(
                    f"table {table!r}: the saved sketch of admission counts has shape "
                    f"{tuple(state['sketch'].shape)}, this policy's has {tuple(own.shape)} "
                    "(blocks, counters); counting starts anew",
                    stacklevel=2,
                )
                return
            own.copy_(state["sketch"])
            self._added.copy_(state["num_sketched"])


__all__ = ["AdmissionCounter"]
