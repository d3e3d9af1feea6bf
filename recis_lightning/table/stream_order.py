"""Order of a table's uses on several streams of a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from recis_lightning.ops import backend


class StreamedTable(Protocol):
    """A table as its streams are ordered: where it is, and the memory that kernels reach by it."""

    @property
    def device(self) -> torch.device:
        """Device of the memory."""
        ...

    def memory(self) -> Iterator[Tensor]:
        """Yield all tensors on the device that the table keeps."""
        ...


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return the stream on which kernels of tables on a device are launched now; None on a CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


class _Uses:
    """Streams of one device on which tables were used.

    Attributes:
        written_on: That of the last use that may have changed them.
        read_on: Those of later uses that only read.
    """

    def __init__(self, written_on: torch.cuda.Stream | None) -> None:
        self.written_on = written_on
        self.read_on: set[torch.cuda.Stream] = set()


class StreamOrder:
    """Order of the uses of some tables, as their lock is taken: on the device as on the host.

    A use on another stream than the one before waits there for what may conflict with it; the host
    does not wait. Memory that a stream has reached by a table is not reused before that stream is
    done with it. While a CUDA graph is captured nothing is ordered, since a capture must not wait
    for what is outside: torch synchronises before it.

    Attributes:
        is_used: Whether a table is on a device whose kernels run asynchronously.
    """

    def __init__(self) -> None:
        self.is_used = False
        self._tables: weakref.WeakSet[StreamedTable] = weakref.WeakSet()
        self._uses: dict[torch.device, _Uses] = {}

    def watch(self, table: StreamedTable) -> None:
        """Order the uses of a table from now on, if its kernels run asynchronously."""
        device = table.device
        if backend.is_async(device):
            self._tables.add(table)
            self._uses.setdefault(device, _Uses(current_stream(device)))
            self.is_used = True

    def enter(self, writes: bool) -> None:
        """Order what the calling thread launches from now on behind earlier uses.

        Args:
            writes: Whether it may change a table; the lock lets no one else use it meanwhile.
        """
        for device, uses in self._uses.items():
            stream = current_stream(device)
            if stream is None or (stream == uses.written_on and not (writes and uses.read_on)):
                continue
            if not writes and stream in uses.read_on:
                continue
            self._order(device, uses, stream, writes)

    def _order(
        self, device: torch.device, uses: _Uses, stream: torch.cuda.Stream, writes: bool
    ) -> None:
        if torch.cuda.is_current_stream_capturing():
            return
        earlier = {uses.written_on} | (uses.read_on if writes else set())
        for other in earlier - {stream}:
            if other is not None:
                stream.wait_stream(other)
        for table in self._tables:
            if table.device == device:
                for tensor in table.memory():
                    tensor.record_stream(stream)
        if writes:
            uses.written_on, uses.read_on = stream, set()
        else:
            uses.read_on.add(stream)


__all__ = ["StreamOrder", "StreamedTable", "current_stream"]
