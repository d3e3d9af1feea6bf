"""What ranks tell one another, so that all of them go on or none does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

_T = TypeVar("_T")


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; 0 and 1 without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gather(value: _T) -> list[_T]:
    """Return what each rank gave, by rank; all ranks call it together."""
    world_size = rank_and_size()[1]
    values: list[Any] = [value] * world_size
    if world_size > 1:
        distributed.all_gather_object(values, value)
    return values


def together(work: Callable[[], _T]) -> _T:
    """Do some work on every rank; if it fails on one, raise on all.

    Raises:
        RuntimeError: It failed on another rank; says which, and how.
    """
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    told = gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, message in enumerate(told):
        if message is not None:
            raise RuntimeError(f"rank {rank} failed: {message}")
    return result


__all__ = ["gather", "rank_and_size", "together"]
