"""A table's header as host and kernels share it: one vector on the CPU, two copies beside a GPU.

A GPU's kernels run later than the host that launched them. So there the header is *split*: the host
writes a copy of its own and publishes it in the order of the stream. Counts (how many ids, rows,
freed rows, refusals) are the kernels' to change; the host keeps the last ones it has seen and an
upper bound of what was inserted since, and waits for the device only when it must know them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops.layout import HEADER_SIZE, NEXT_ROW, NUM_FREE, NUM_IDS, NUM_REFUSED

_COUNTS = slice(NUM_IDS, NUM_REFUSED + 1)
assert {NEXT_ROW, NUM_FREE} == set(range(NUM_IDS + 1, NUM_REFUSED))


@dataclass
class _HostCopy:
    """What the host knows of a split header.

    Attributes:
        fields: int64 [HEADER_SIZE]; counts are those last seen.
        unseen: How many ids may have been inserted since then.
        coming: Counts on their way here, when they will have come, and ``unseen`` at that moment.
        room: What the table last said of its room, less what was inserted since; None when that is
            out of date.
    """

    fields: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(HEADER_SIZE, np.int64))
    unseen: int = 0
    coming: tuple[Tensor, torch.cuda.Event | None, int] | None = None
    room: int | None = None


def new_header(device: torch.device, split: bool) -> Tensor:
    """Make a header of zeros.

    Args:
        device: Where it lies.
        split: Whether the host has a copy of its own; else it lies on the CPU.

    Returns:
        int64 [HEADER_SIZE].
    """
    header = torch.zeros(HEADER_SIZE, dtype=torch.int64, device=device)
    if split:
        header._host_copy = _HostCopy()  # type: ignore[attr-defined]
    return header


def copy_header(header: Tensor) -> Tensor:
    """Return a header of its own that says the same."""
    copied = header.clone()
    if is_split(header):
        copied._host_copy = _HostCopy(read_counts(header).copy())  # type: ignore[attr-defined]
    return copied


def _copy_of(header: Tensor) -> _HostCopy | None:
    return getattr(header, "_host_copy", None)


def is_split(header: Tensor) -> bool:
    """Whether the host has a copy of the header of its own."""
    return _copy_of(header) is not None


def host_fields(header: Tensor) -> npt.NDArray[np.int64]:
    """Return the header as the host sees it, to read and write; counts are those last seen."""
    copy = _copy_of(header)
    return header.numpy() if copy is None else copy.fields


def publish(header: Tensor) -> None:
    """Send what the host wrote, but for counts, to the device."""
    copy = _copy_of(header)
    if copy is not None:
        copy.room = None
        for part in (slice(0, _COUNTS.start), slice(_COUNTS.stop, HEADER_SIZE)):
            _send(header, copy.fields, part)


def publish_counts(header: Tensor) -> None:
    """Send the host's counts to the device; call ``read_counts`` before changing them."""
    copy = _copy_of(header)
    if copy is not None:
        _send(header, copy.fields, _COUNTS)
        copy.unseen, copy.coming, copy.room = 0, None, None


def _send(header: Tensor, fields: npt.NDArray[np.int64], part: slice) -> None:
    refresh_(header[part], fields[part])


def sent(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device in the order of its stream, without waiting for it.

    Args:
        values: Read before this returns: the caller may change it then.
        device: Where to; the CPU too.

    Returns:
        A tensor of its shape and dtype.
    """
    return _ready(values, device).to(device, non_blocking=True)


def refresh_(target: Tensor, values: npt.NDArray[Any]) -> None:
    """Overwrite a tensor on a device with an array as ``sent`` copies one."""
    target.copy_(_ready(values, target.device), non_blocking=True)


def _ready(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return values copied to where a device can take them without the host waiting."""
    if device.type == "cpu":
        return torch.from_numpy(values.copy())
    return torch.from_numpy(np.ascontiguousarray(values)).pin_memory()


def read_counts(header: Tensor) -> npt.NDArray[np.int64]:
    """Wait for what kernels have counted; return the header as the host then sees it."""
    copy = _copy_of(header)
    if copy is None:
        return header.numpy()
    copy.fields[_COUNTS] = header[_COUNTS].cpu().numpy()
    copy.unseen, copy.coming, copy.room = 0, None, None
    return copy.fields


def watch_counts(headers: Sequence[Tensor]) -> None:
    """Ask for counts as they will be after what was launched so far, and do not wait.

    Args:
        headers: On one device; all their counts come in one copy.
    """
    asked = []
    for header in headers:
        copy = _copy_of(header)
        if copy is not None and copy.coming is None:
            asked.append((header, copy))
    if not asked:
        return
    device = asked[0][0].device
    values, event = torch.stack([header[_COUNTS] for header, _ in asked]), None
    if device.type != "cpu":
        pinned = torch.empty(values.shape, dtype=torch.int64, pin_memory=True)
        values = pinned.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
    for (_, copy), counts in zip(asked, values.unbind(), strict=True):
        copy.coming = counts, event, copy.unseen


def note_insertion(header: Tensor, at_most: int) -> None:
    """Take note that kernels may from now on insert up to ``at_most`` ids more."""
    copy = _copy_of(header)
    if copy is not None:
        copy.unseen += at_most
        if copy.room is not None:
            copy.room -= at_most


def unseen_insertions(header: Tensor) -> int:
    """Return how many ids may have been inserted beyond the host's counts; does not wait."""
    copy = _copy_of(header)
    if copy is None:
        return 0
    if copy.coming is not None:
        values, event, unseen = copy.coming
        if event is None or event.query():
            copy.fields[_COUNTS] = values.numpy()
            copy.unseen -= unseen
            copy.coming = copy.room = None
    return copy.unseen


def noted_room(header: Tensor) -> int | None:
    """Return the room that ``note_room`` noted, less insertions since; None if it has changed."""
    copy = _copy_of(header)
    if copy is None:
        return None
    if copy.coming is not None:
        unseen_insertions(header)
    return copy.room


def note_room(header: Tensor, room: int) -> None:
    """Note for how many more ids there is room, as the host knows: each lookup asks."""
    copy = _copy_of(header)
    if copy is not None:
        copy.room = room


__all__ = [
    "copy_header",
    "host_fields",
    "is_split",
    "new_header",
    "note_insertion",
    "note_room",
    "noted_room",
    "publish",
    "publish_counts",
    "read_counts",
    "refresh_",
    "sent",
    "unseen_insertions",
    "watch_counts",
]
