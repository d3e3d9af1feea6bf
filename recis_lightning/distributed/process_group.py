"""The process group whose ranks tables are sharded over: torch's default one."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import distributed


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def rank() -> int:
    """Return this process's rank; 0 without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return 0


def current_group() -> weakref.ref[Any] | None:
    """Return a reference that tells one process group from a later one; None without any."""
    if distributed.is_available() and distributed.is_initialized():
        return weakref.ref(distributed.distributed_c10d._get_default_group())
    return None


def message_device() -> torch.device:
    """Return where messages of no device lie: on the CPU, if the ranks' group serves it."""
    group = distributed.distributed_c10d._get_default_group()
    try:
        group._get_backend(torch.device("cpu"))
    except RuntimeError:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


__all__ = ["current_group", "message_device", "rank", "world_size"]
