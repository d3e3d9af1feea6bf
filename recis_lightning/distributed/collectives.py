"""Rank, number of ranks, and collectives over the ranks that tables are sharded over.

The ranks are those of torch's default process group, which Lightning's ``ddp`` sets up. With one
rank, or none set up, nothing here communicates. Every function that communicates is collective:
all ranks call it, in the same order; if one does something else, all get an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from recis_lightning.distributed.digest import digest
from recis_lightning.distributed.heads import Head, Kind, exchange_heads
from recis_lightning.distributed.process_group import message_device, rank, world_size

_T = TypeVar("_T")


def any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Return for each flag whether it is set on any rank.

    Args:
        flags: As many on each rank.
        device: Where the process group reduces them.
    """
    if world_size() == 1:
        return list(flags)
    check_level("any_rank", len(flags))
    found = torch.tensor(flags, dtype=torch.int32, device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of all ranks' tensors, the same on each; ``values`` stays as it is."""
    if world_size() == 1:
        return values
    check_level("sum_over_ranks", tuple(values.shape))
    total = values.clone()
    distributed.all_reduce(total)
    return total


def gather(value: _T) -> list[_T]:
    """Return each rank's value, by rank; values are pickled."""
    size = world_size()
    values: list[Any] = [value] * size
    if size > 1:
        check_level("gather")
        distributed.all_gather_object(values, value)
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
    distributed.all_gather(parts, own)
    return [[int(x) if x.is_integer() else x for x in part.tolist()] for part in parts]


def check_level(name: str, *about: object) -> None:
    """Raise if another rank is about to do something else than this one.

    Args:
        name: Of a function that communicates.
        about: What must be the same on all ranks, with a repr.

    Raises:
        RuntimeError: Says which rank does what; on every rank.
    """
    told = f"calls {name}({', '.join(map(repr, about))})"
    exchange_heads(Head(Kind.COLLECTIVE, digest((name, about)), lambda: told))


def all_to_all(
    tensor: Tensor, output_splits: Sequence[int], input_splits: Sequence[int]
) -> tuple[Tensor, Any]:
    """Send a part of ``tensor`` to each rank and receive one from each, without waiting.

    Args:
        tensor: [n, ...], contiguous: first what goes to rank 0, then what goes to rank 1, ...;
            kept by the caller until the work is done.
        output_splits: How many items come from each rank.
        input_splits: How many go to each rank.

    Returns:
        [sum(output_splits), ...] by rank, and the work to ``wait()`` for before it is read.
    """
    received = tensor.new_empty((sum(output_splits), *tensor.shape[1:]))
    work = distributed.all_to_all_single(
        received, tensor, list(output_splits), list(input_splits), async_op=True
    )
    return received, work


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


def check_backend(table: str, device: torch.device) -> None:
    """Raise if the process group cannot carry what a table's device holds.

    Args:
        table: Its name.
        device: Where it is.

    Raises:
        ValueError: Names the table, its device and what to set up.
    """
    group = distributed.distributed_c10d._get_default_group()
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
    "gather",
    "gather_numbers",
    "rank",
    "run_on_all_ranks",
    "sum_over_ranks",
    "world_size",
]
