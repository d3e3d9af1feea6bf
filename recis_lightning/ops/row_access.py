"""Notes of training lookups on rows, beside ``last_seen``: how often and when; the contract.

Only segments with the STAMP flag do it, whose tables have a column COUNTS or LAST_TIME. The index
stamps ``last_seen`` itself, in the pass that finds rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import backend


def stamp_(
    segments: npt.NDArray[np.int64], rows: Tensor, sightings: Tensor | None, device: torch.device
) -> None:
    """Add to each row's count, and write the time of its table's header.

    Args:
        segments: As for ``find_or_insert``.
        rows: int64 [n], what it returned; negative ones are passed over.
        sightings: int64 [n], occurrences that each position stands for; None means 1.
        device: Where rows are.
    """
    with backend.region("recis::stamp"):
        backend.module("row_access", device).stamp_(segments, rows, sightings)


__all__ = ["stamp_"]
