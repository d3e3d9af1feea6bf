"""Process groups whose ranks tables are sharded over.

By default these are all ranks, in a group of the package's own: DDP sends its messages over torch's
default group in an order that may differ from rank to rank (its backward passes do, where ranks use
other parameters), and no message of ours must be taken for one of them. A table may also have a
group that its user made.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")

ProcessGroup = Any  # torch.distributed.ProcessGroup, which some builds of torch lack

# Torch's default group -> ours with the same ranks.
_own: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def is_initialized() -> bool:
    """Return whether torch has a process group."""
    return distributed.is_available() and distributed.is_initialized()


def world_size(process_group: ProcessGroup | None = None) -> int:
    """Return the number of ranks of a group; 1 while there is none.

    Args:
        process_group: The group; None means all ranks.
    """
    return distributed.get_world_size(process_group) if is_initialized() else 1


def rank(process_group: ProcessGroup | None = None) -> int:
    """Return this process's rank in a group, None for that of all ranks; 0 while there is none."""
    return distributed.get_rank(process_group) if is_initialized() else 0


def communicator(process_group: ProcessGroup | None = None) -> ProcessGroup:
    """Return the group that carries messages.

    That of all ranks is made when it is first asked for, which all ranks do at the same place:
    before their first message.

    Args:
        process_group: A table's; None means all ranks.
    """
    if process_group is not None:
        return process_group
    default = distributed.distributed_c10d._get_default_group()
    own = _own.get(default)
    if own is None:
        own = _own[default] = distributed.new_group(
            timeout=_timeout_of(default), group_desc="recis_lightning"
        )
    return own


def kept_of(
    process_group: ProcessGroup | None,
    kept: weakref.WeakKeyDictionary[Any, T],
    make: Callable[[], T],
) -> T:
    """Return what is kept of a process group that is there, made when it is first asked for.

    Args:
        process_group: The group; None means all ranks.
        kept: Group -> what is kept of it; it goes with the group.
        make: Makes it.
    """
    group = process_group or distributed.distributed_c10d._get_default_group()
    found = kept.get(group)
    if found is None:
        found = kept[group] = make()
    return found


def make_group_beside(process_group: ProcessGroup | None) -> ProcessGroup:
    """Make a gloo group of the same ranks, whose messages meet no others; all ranks call it.

    Args:
        process_group: The ranks; None means all.
    """
    of = process_group or distributed.distributed_c10d._get_default_group()
    return distributed.new_group(
        global_ranks(process_group),
        timeout=_timeout_of(of),
        backend="gloo",
        use_local_synchronization=process_group is not None,
        group_desc="recis_lightning ahead",
    )


def _timeout_of(group: ProcessGroup) -> Any:
    """Return how long a group waits for its ranks; None for torch's default."""
    for device in group._device_types:
        timeout = getattr(group._get_backend(device).options, "_timeout", None)
        if timeout is not None:
            return timeout
    return None


def message_device(process_group: ProcessGroup | None = None) -> torch.device:
    """Return where messages of no device lie: on the CPU, if the ranks' group serves it."""
    group = process_group or distributed.distributed_c10d._get_default_group()
    try:
        group._get_backend(torch.device("cpu"))
    except RuntimeError:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def global_ranks(process_group: ProcessGroup | None = None) -> list[int]:
    """Return for each rank of a group its number among all ranks, by which errors name it."""
    if process_group is None:
        return list(range(world_size()))
    return list(distributed.get_process_group_ranks(process_group))


def check_process_group(process_group: ProcessGroup | None) -> None:
    """Raise unless ``process_group`` is None or a group that this rank is in.

    Raises:
        TypeError: It is no process group.
        ValueError: This rank is not in it.
    """
    if process_group is None:
        return
    if is_initialized() and process_group is distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group: expected a group that this rank is in, got one of others")
    if not isinstance(process_group, getattr(distributed, "ProcessGroup", ())):
        raise TypeError(
            f"process_group: expected torch.distributed.ProcessGroup or None, got {process_group!r}"
        )


__all__ = [
    "ProcessGroup",
    "check_process_group",
    "communicator",
    "global_ranks",
    "is_initialized",
    "kept_of",
    "make_group_beside",
    "message_device",
    "rank",
    "world_size",
]
