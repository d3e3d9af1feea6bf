"""Rank, number of ranks, and collectives over the ranks that tables are sharded over.

The ranks are all of those that Lightning's ``ddp`` sets up, or those of a ``process_group``. With
one rank, or none set up, nothing here communicates. Every function that communicates is collective:
all ranks call it, in the same order; if one does something else, all get an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed

from recis_lightning.distributed.digest import digest
from recis_lightning.distributed.heads import Head, Kind, exchange_heads
from recis_lightning.distributed.lost_ranks import naming_lost_ranks
from recis_lightning.distributed.message_memory import MessageMemory
from recis_lightning.distributed.process_group import (
    ProcessGroup,
    communicator,
    global_ranks,
    message_device,
    rank,
    world_size,
)
from recis_lightning.ops import backend

_T = TypeVar("_T")
_received = MessageMemory()


def any_rank(
    flags: Sequence[bool], device: torch.device, process_group: ProcessGroup | None = None
) -> list[bool]:
    """Return for each flag whether it is set on any rank.

    Args:
        flags: As many on each rank.
        device: Where the process group reduces them.
        process_group: The ranks; None means all.
    """
    if world_size(process_group) == 1:
        return list(flags)
    check_level("any_rank", len(flags), process_group=process_group)
    size = 4 * len(flags)
    with (
        naming_lost_ranks(lambda: "calls any_rank()", process_group),
        backend.region("recis::all_reduce", lambda: size),
    ):
        found = torch.tensor(flags, dtype=torch.int32, device=device)
        distributed.all_reduce(found, distributed.ReduceOp.MAX, communicator(process_group))
        return [bool(flag) for flag in found.tolist()]


def sum_over_ranks(values: Tensor, process_group: ProcessGroup | None = None) -> Tensor:
    """Return the sum of all ranks' tensors, the same on each; ``values`` stays as it is."""
    if world_size(process_group) == 1:
        return values
    check_level("sum_over_ranks", tuple(values.shape), process_group=process_group)
    with (
        naming_lost_ranks(lambda: "calls sum_over_ranks()", process_group),
        backend.region("recis::all_reduce", lambda: values.nbytes),
    ):
        total = values.clone()
        distributed.all_reduce(total, group=communicator(process_group))
        return total


def gather(value: _T, process_group: ProcessGroup | None = None) -> list[_T]:
    """Return each rank's value, by rank; values are pickled."""
    size = world_size(process_group)
    values: list[Any] = [value] * size
    if size > 1:
        check_level("gather", process_group=process_group)
        with naming_lost_ranks(lambda: "calls gather()", process_group):
            distributed.all_gather_object(values, value, communicator(process_group))
    return values


def gather_numbers(values: Sequence[float]) -> list[list[float]]:
    """Return every rank's numbers, by rank; whole numbers as ints.

    Args:
        values: As many on each rank; they travel as float64, without pickling.
    """
    if world_size() == 1:
        return [list(values)]
    check_level("gather_numbers", len(values))
    device = message_device()
    own = torch.tensor(values, dtype=torch.float64, device=device)
    parts = [torch.empty_like(own) for _ in range(world_size())]
    with naming_lost_ranks(lambda: "calls gather_numbers()"):
        distributed.all_gather(parts, own, communicator())
    return [[int(x) if x.is_integer() else x for x in part.tolist()] for part in parts]


def exchange_number(name: str, number: int) -> list[int]:
    """Return each rank's number, by rank; one message, which is a head.

    Args:
        name: What it is about, the same on all ranks.
        number: An int64.
    """
    if world_size() == 1:
        return [number]
    head = Head(Kind.COLLECTIVE, digest(name), lambda: f"asks for {name}")
    heads = exchange_heads(head, np.array([number], np.int64))
    return [int(found) for found in heads.payloads[:, 0]]


def check_level(name: str, *about: object, process_group: ProcessGroup | None = None) -> None:
    """Raise if another rank is about to do something else than this one.

    Args:
        name: Of a function that communicates.
        about: What must be the same on all ranks, with a repr.
        process_group: The ranks; None means all.

    Raises:
        RuntimeError: Says which rank does what; on every rank.
    """
    told = f"calls {name}({', '.join(map(repr, about))})"
    exchange_heads(Head(Kind.COLLECTIVE, digest((name, about)), lambda: told), None, process_group)


def all_to_all(
    tensor: Tensor,
    output_splits: Sequence[int],
    input_splits: Sequence[int],
    doing: Callable[[], str],
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Send a part of ``tensor`` to each rank and receive one from each.

    Args:
        tensor: [n, ...], contiguous: first what goes to rank 0, then what goes to rank 1, ...
        output_splits: How many items come from each rank.
        input_splits: How many go to each rank.
        doing: Returns what this rank does, for errors: "looks up tables ['user']".
        process_group: The ranks; None means all.

    Returns:
        [sum(output_splits), ...] by rank.

    Raises:
        RuntimeError: A rank has gone; names it.
    """
    size, width = sum(output_splits), tensor.shape[1:].numel()
    received = _received.empty(size, width, tensor.dtype, tensor.device).view(
        size, *tensor.shape[1:]
    )

    def num_bytes() -> int:
        """Return the bytes that go to other ranks."""
        own = input_splits[rank(process_group)] * tensor[:1].nbytes
        return tensor.nbytes - own if tensor.numel() else 0

    with naming_lost_ranks(doing, process_group), backend.region("recis::all_to_all", num_bytes):
        distributed.all_to_all_single(
            received,
            tensor,
            list(output_splits),
            list(input_splits),
            communicator(process_group),
        )
    return received


def run_on_all_ranks(work: Callable[[], _T]) -> _T:
    """Run ``work`` on every rank; if it fails on one, raise on all.

    Raises:
        RuntimeError: It failed on another rank; names the rank and its error.
    """
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    messages = gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for failed, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"rank {failed} failed: {message}")
    return result


def check_backend(
    table: str, device: torch.device, process_group: ProcessGroup | None = None
) -> None:
    """Raise if the process group cannot carry what a table's device holds.

    Args:
        table: Its name.
        device: Where it is.
        process_group: Its ranks; None means all.

    Raises:
        ValueError: Names the table, its device and what to set up.
    """
    group = process_group or distributed.distributed_c10d._get_default_group()
    try:
        backend = group._get_backend(device).name()
    except RuntimeError:
        backend = "none"
    wanted = "nccl" if device.type == "cuda" else "gloo"
    # gloo says that it serves GPUs, and has no all-to-all for them.
    if backend == "none" or (device.type == "cuda" and backend == "gloo"):
        raise ValueError(
            f"device: table {table!r} is on {str(device)!r}, for which the ranks' process group "
            f"has backend {backend!r}; expected {wanted!r}, as in "
            "DDPStrategy(process_group_backend='cpu:gloo,cuda:nccl')"
        )


__all__ = [
    "all_to_all",
    "any_rank",
    "check_backend",
    "check_level",
    "exchange_number",
    "gather",
    "gather_numbers",
    "global_ranks",
    "rank",
    "run_on_all_ranks",
    "sum_over_ranks",
    "world_size",
]
