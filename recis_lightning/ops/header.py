"""Header of a table: one vector that host and kernels share on the CPU, mirrored beside a GPU.

A GPU's kernels run asynchronously to the host. So there the header is *mirrored*: the host writes a
copy of its own and publishes it in the order of the stream. Counts (of ids, rows, freed rows and
rejections) are changed by kernels. The host keeps the last counts that it received and an upper
bound of the insertions since, and waits for the device only when it needs exact counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import device_memory
from recis_lightning.ops.async_copy import copy_async_
from recis_lightning.ops.layout import (
    CAPACITY,
    HEADER_SIZE,
    IS_FULL,
    NEXT_ROW,
    NUM_FREE,
    NUM_IDS,
    NUM_REJECTED,
)

_COUNTS = slice(NUM_IDS, IS_FULL + 1)
assert {NEXT_ROW, NUM_FREE, NUM_REJECTED} == set(range(NUM_IDS + 1, IS_FULL))
_versions = itertools.count(1)


class Header:
    """Header of zeros.

    Args:
        device: Device whose kernels read the header.
        is_mirrored: Whether the host has a copy of its own; else the header lies on the CPU.

    Attributes:
        tensor: int64 [HEADER_SIZE] that kernels read, at one address as long as the header lives.
        address: Address of the tensor.
        device: Device of the tensor.
        fields: int64 [HEADER_SIZE] that the host reads and writes. Beside a GPU its counts are
            those last received, and ``publish`` sends the other fields.
        is_mirrored: Whether ``fields`` is a copy of ``tensor``; else both are the same memory.
        version: Number that grows when any header is published, or a device is asked for counts:
            what was concluded from headers under another one may be out of date.
    """

    version: ClassVar[int] = 0

    __slots__ = (
        "_free",
        "_in_flight",
        "_unacknowledged",
        "address",
        "device",
        "fields",
        "is_mirrored",
        "tensor",
    )

    def __init__(self, device: torch.device, is_mirrored: bool) -> None:
        self.tensor = device_memory.zeros(HEADER_SIZE, torch.int64, device)
        self.address = self.tensor.data_ptr()
        self.device = self.tensor.device
        self.is_mirrored = is_mirrored
        self.fields: npt.NDArray[np.int64] = (
            np.zeros(HEADER_SIZE, np.int64) if is_mirrored else self.tensor.numpy()
        )
        # Ids that may have been inserted since the counts were received; beside a GPU only.
        self._unacknowledged = 0
        # Counts in flight, the event of their arrival, and the above when they were asked for.
        self._in_flight: tuple[Tensor, torch.cuda.Event | None, int] | None = None
        self._free: int | None = None

    @staticmethod
    def advance_version() -> None:
        """Declare out of date what was concluded from any header so far."""
        Header.version = next(_versions)  # one that no other thread sets

    def copy(self) -> Header:
        """Return a copy for the host; its fields are not published."""
        copied = Header(self.device, self.is_mirrored)
        copied.tensor.copy_(self.tensor)
        if self.is_mirrored:
            copied.fields[:] = self.read_counts()
        return copied

    def publish(self) -> None:
        """Send what the host wrote, except counts, to the device."""
        Header.advance_version()
        if self.is_mirrored:
            self._free = None
            for part in (slice(0, _COUNTS.start), slice(_COUNTS.stop, HEADER_SIZE)):
                copy_async_(self.tensor[part], self.fields[part])

    def publish_counts(self) -> None:
        """Send the host's counts to the device; call ``read_counts`` before changing them."""
        if self.is_mirrored:
            Header.advance_version()
            copy_async_(self.tensor[_COUNTS], self.fields[_COUNTS])
            self._unacknowledged, self._in_flight, self._free = 0, None, None

    def read_counts(self) -> npt.NDArray[np.int64]:
        """Wait for the kernels' counts; return ``fields`` with them.

        Raises:
            RuntimeError: An id found no entry in the index, nor any room for one.
        """
        if self.is_mirrored:
            Header.advance_version()
            self._receive(self.tensor[_COUNTS].cpu().numpy())
            self._unacknowledged, self._in_flight, self._free = 0, None, None
        return self.fields

    def _receive(self, counts: npt.NDArray[np.int64]) -> None:
        if counts[-1]:
            raise RuntimeError(
                f"an index of {self.fields[CAPACITY]} entries, with {counts[0]} ids by its count, "
                "had no room for an id of a lookup; such ids got no row. This is a fault of "
                "recis_lightning: please report it, and go on from a checkpoint"
            )
        self.fields[_COUNTS] = counts

    def restore(self, fields: npt.NDArray[np.int64]) -> None:
        """Put back what ``read_counts`` returned before some fields were changed.

        Args:
            fields: int64 [HEADER_SIZE], a copy.
        """
        self.fields[:] = fields
        self.publish()
        self.publish_counts()

    def note_insertion(self, at_most: int) -> None:
        """Record that kernels may insert up to ``at_most`` more ids from now on."""
        if self.is_mirrored:
            self._unacknowledged += at_most
            if self._free is not None:
                self._free -= at_most

    def unacknowledged(self) -> int:
        """Return how many ids may have been inserted beyond the host's counts; does not wait."""
        if self._in_flight is not None:
            values, event, before = self._in_flight
            if event is None or event.query():
                self._receive(values.numpy())
                self._unacknowledged -= before
                self._in_flight = self._free = None
        return self._unacknowledged

    def cached_free(self) -> int | None:
        """Return what ``cache_free`` was given, less insertions since; None if that is outdated."""
        if self._in_flight is not None:
            self.unacknowledged()
        return self._free

    def cache_free(self, num_ids: int) -> None:
        """Keep the number of ids that are sure to fit, which every lookup asks for."""
        if self.is_mirrored:
            self._free = num_ids


def watch_counts(headers: Sequence[Header]) -> None:
    """Request the counts after all launches so far, without waiting for them.

    Args:
        headers: Headers on one device; all their counts come in one copy.
    """
    watched = [header for header in headers if header.is_mirrored and header._in_flight is None]
    if not watched:
        return
    Header.advance_version()  # what is noted from now on must not be of lookups before
    device = watched[0].device
    values, event = torch.stack([header.tensor[_COUNTS] for header in watched]), None
    if device.type != "cpu":
        pinned = torch.empty(values.shape, dtype=torch.int64, pin_memory=True, device="cpu")
        values = pinned.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
    for header, counts in zip(watched, values.unbind(), strict=True):
        header._in_flight = counts, event, header._unacknowledged


__all__ = ["Header", "watch_counts"]
