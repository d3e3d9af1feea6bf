"""Draws of a table's ids, by count or uniformly, and the probabilities of ids to be drawn."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recis_lightning.ops import hash_index
from recis_lightning.table.storage import Storage

COUNT, UNIFORM = "count", "uniform"
_RANGE = 2**62  # of random numbers: of fewer values those of a large total would be uneven


class IdSample(NamedTuple):
    """Ids that were drawn from a table, with replacement.

    Attributes:
        ids: int64 [n].
        probabilities: float64 [n], with which each id is drawn; what ``log_q_correction`` takes.
    """

    ids: Tensor
    probabilities: Tensor


def draw(storage: Storage, n: int, by: str, generator: torch.Generator | None) -> IdSample:
    """Draw ids of a table; ``HashTable.sample`` describes it in full.

    Args:
        storage: The table's.
        n: How many.
        by: "count" or "uniform".
        generator: Of the draws; None is torch's of the CPU.
    """
    check_policy(storage, by)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {generator!r}")
    device = storage.device
    if n == 0:
        return IdSample(
            torch.empty(0, dtype=torch.int64, device=device),
            torch.empty(0, dtype=torch.float64, device=device),
        )
    ids, occupied = hash_index.id_of_row(storage.header, storage.rows.num_rows)
    rows = occupied.nonzero().squeeze(1)
    if not rows.numel():
        raise RuntimeError(f"table {storage.name!r} has no rows to sample")
    # By id: the same draws wherever in memory rows are, as after a compaction or on a GPU.
    order = ascending(ids[rows])
    rows = rows[order]
    weights = weights_of(storage, by)[rows]
    reached = weights.cumsum(0)
    total = int(reached[-1])
    if total == 0:
        raise RuntimeError(
            f"table {storage.name!r}: no id has a count left, after halvings; "
            f"sample(by={UNIFORM!r}) needs none"
        )
    made_on = torch.device("cpu") if generator is None else generator.device
    numbers = torch.randint(_RANGE, (n,), generator=generator, device=made_on) % total
    drawn = torch.searchsorted(reached, numbers.to(device), right=True)
    return IdSample(ids[rows[drawn]], weights[drawn].double() / total)


def counts_of(storage: Storage, ids: Tensor, by: str) -> Tensor:
    """Return int64 [n + 1]: the weight with which each of n ids is drawn, and that of all ids.

    Args:
        storage: The table's.
        ids: int64 [n]; one without a row has weight 0.
        by: "count" or "uniform".
    """
    rows = storage.find(ids)
    is_known = rows >= 0
    weights = weights_of(storage, by)
    found = rows.new_zeros(rows.numel() + 1)
    found[:-1][is_known] = weights[rows[is_known]]
    # A free row has no count.
    found[-1] = len(storage) if by == UNIFORM else weights.sum()
    return found


def check_policy(storage: Storage, by: str) -> None:
    """Raise unless ``by`` is one of both, and the table keeps what it takes.

    Raises:
        ValueError: ``by`` is something else.
        RuntimeError: The table keeps no counts.
    """
    if by not in (COUNT, UNIFORM):
        raise ValueError(f"by: expected {COUNT!r} or {UNIFORM!r}, got {by!r}")
    if by == COUNT and "counts" not in storage.kept_columns:
        raise RuntimeError(
            f"table {storage.name!r} keeps no counts; give it a policy that does, such as "
            f'eviction=MaxRows(n=..., by="count"), or sample by={UNIFORM!r}'
        )


def weights_of(storage: Storage, by: str) -> Tensor:
    """Return int64 [rows], to which probabilities are proportional."""
    num_rows = storage.rows.num_rows
    if by == COUNT:
        return storage.columns["counts"][:num_rows]
    return torch.ones(num_rows, dtype=torch.int64, device=storage.device)


def ascending(ids: Tensor) -> Tensor:
    """Return the order in which distinct ids ascend, int64 [n]; NumPy's sort is the faster one."""
    if ids.device.type != "cpu":
        return ids.argsort()
    return torch.from_numpy(np.argsort(ids.numpy()))


__all__ = ["IdSample", "check_policy", "counts_of", "draw"]
