"""Access metadata of rows, use counts and times of last use: the contract.

Only segments with the TOUCH flag keep them, whose tables have a column COUNTS or LAST_TIME. The
index writes ``last_seen`` itself, in the pass that finds rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import backend


def touch_(
    segments: npt.NDArray[np.int64], rows: Tensor, occurrences: Tensor | None, device: torch.device
) -> None:
    """Add to each row's use count, and write its time of last use from its table's header.

    Args:
        segments: As for ``find_or_insert``.
        rows: int64 [n], as ``find_or_insert`` returned them; negative ones are skipped.
        occurrences: int64 [n], how many occurrences each position stands for; None means 1.
        device: Device of the rows.
    """
    with backend.region("recis::stamp", lambda: 3 * rows.nbytes):  # row, column read and written
        backend.module("row_access", device).touch_(segments, rows, occurrences)


__all__ = ["touch_"]
