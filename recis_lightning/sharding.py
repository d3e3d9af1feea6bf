"""Tables sharded over ranks: who owns an id, and what ranks tell one another.

The ranks are those of torch's default process group, which Lightning's ``ddp`` sets up. With one
rank, or none set up, nothing here communicates.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from recis_lightning.arguments import check_ids, check_int

# As signed 64-bit integers: 0xFF51AFD7ED558CCD and 0xC4CEB9FE1A85EC53.
_MIX_1, _MIX_2 = 0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64
_LOW_31 = (1 << 31) - 1


def owner_of(ids: Tensor, world_size: int) -> Tensor:
    """Return the rank whose shard holds each id's row: a hash of the id, modulo ``world_size``.

    The hash takes whole-number steps only, so it is the same on every device; it shares no
    constant with those of the index and of initial rows, so the ids of one shard spread over its
    index as all ids do.

    Args:
        ids: int64 [*], any values.
        world_size: Number of ranks, at least 1.

    Returns:
        int64 [*], each in ``[0, world_size)``.

    Raises:
        TypeError, ValueError: ``ids`` is not int64, or ``world_size`` no int of 1 or more.

    Example:
        >>> owner_of(torch.tensor([0, 1, 2, -1]), 4).tolist()
        [0, 2, 0, 1]

    Source: the finalizer of MurmurHash3 (Appleby, public domain).
    """
    check_int("world_size", world_size, least=1)
    # An arithmetic shift, masked, is a logical one.
    mixed = check_ids(ids) ^ ((ids >> 33) & _LOW_31)
    mixed = mixed * _MIX_1
    mixed = (mixed ^ ((mixed >> 33) & _LOW_31)) * _MIX_2
    return ((mixed >> 33) & _LOW_31) % world_size


def num_ranks() -> int:
    """Return the number of ranks that tables are sharded over; 1 without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Return for each flag whether it is set on any rank; all ranks call it together."""
    if num_ranks() == 1:
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int32, device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of all ranks' tensors, the same on each; all ranks call it together."""
    if num_ranks() == 1:
        return values
    total = values.clone()
    distributed.all_reduce(total)
    return total


def exchange(
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


# Lightning's strategies that tables do not work under, and what to use for them. A strategy that
# starts processes by multiprocessing returns rank 0's module alone to the process that called fit.
_ADVICE = "use Trainer(strategy='ddp'), launched by Lightning or by torchrun"
_REFUSED = {
    "DeepSpeedStrategy": "its engine owns the optimizer and never steps that of tables",
    "FSDPStrategy": "it steps and saves an optimizer of sharded parameters only",
    "ModelParallelStrategy": "it steps and saves an optimizer of sharded parameters only",
}


def check_strategy() -> None:
    """Raise if this lookup runs under a Lightning strategy that cannot train sharded tables.

    Every lookup of a module runs below a method of Lightning's strategy. That is where it is found,
    so that users without our callbacks are told too.

    Raises:
        RuntimeError: Names the strategy and what to use.
    """
    strategy = _lightning_strategy()
    if strategy is None:
        return
    for kind in type(strategy).__mro__:
        if kind.__name__ in _REFUSED:
            raise RuntimeError(
                f"tables do not work under {type(strategy).__name__}: "
                f"{_REFUSED[kind.__name__]}; {_ADVICE}"
            )
    if (method := getattr(strategy, "_start_method", "popen")) != "popen":
        raise RuntimeError(
            f"tables do not work under {type(strategy).__name__} with processes started by "
            f"{method!r} (ddp_spawn, ddp_fork, ddp_notebook): of all shards only rank 0's would "
            f"come back from fit; {_ADVICE}"
        )


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


def join_evaluation() -> None:
    """See to it that ranks whose evaluation ends early go on answering, if Lightning runs this.

    Lightning may give ranks unequal numbers of batches. That the Trainer gets the callback for it
    here spares every user to pass it.
    """
    strategy = _lightning_strategy()
    trainer = getattr(getattr(strategy, "lightning_module", None), "_trainer", None)
    if trainer is not None:
        # By name: what imports Lightning may know of tables, not the other way round.
        callbacks = importlib.import_module("recis_lightning.callbacks.sharded_evaluation")
        callbacks.ShardedEvaluation.attach(trainer)


def _lightning_strategy() -> Any:
    """Return the Lightning strategy that called us, None if none did."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(("lightning.pytorch.strategies.", "pytorch_lightning.strategies.")):
            owner = frame.f_locals.get("self")
            if hasattr(owner, "strategy_name") or hasattr(owner, "root_device"):
                return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None


__all__ = [
    "any_rank",
    "check_backend",
    "check_strategy",
    "exchange",
    "join_evaluation",
    "num_ranks",
    "owner_of",
    "sum_over_ranks",
]
