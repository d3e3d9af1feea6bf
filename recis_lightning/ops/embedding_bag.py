"""Gather rows and pool them into bags: the contract.

All features of a group go in one call, each with its own pooling; a feature is described by one
line of a *plan*, an int64 matrix [num_features, PLAN_SIZE] on the CPU. The same plan, with
gradients in the place of outputs, later tells the row update where each id's gradient lies, so no
gradient is ever copied to one row an id.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import backend
from recis_lightning.ops import layout as fields
from recis_lightning.ops.hash_index import Segments
from recis_lightning.ops.header import Header

# Aliases until all rooms name the fields of ops.layout.
FIRST_ID = fields.PLAN_FIRST_ID
HEADER = fields.PLAN_HEADER
MODE = fields.PLAN_MODE
NUM_BAGS = fields.PLAN_NUM_BAGS
BAG_LENGTH = fields.PLAN_BAG_LENGTH
OFFSETS = fields.PLAN_OFFSETS
WEIGHTS = fields.PLAN_WEIGHTS
TILE_LEN = fields.PLAN_TILE_LEN
DATA = fields.PLAN_DATA
DATA_STRIDE = fields.PLAN_DATA_STRIDE
FIRST_CHUNK = fields.PLAN_FIRST_CHUNK
BAGS_PER_CHUNK = fields.PLAN_BAGS_PER_CHUNK
ROWS = fields.PLAN_ROWS
NUM_IDS = fields.PLAN_NUM_IDS
FLAT_BASE = fields.PLAN_FLAT_BASE
PLAN_SIZE = fields.PLAN_SIZE
NONE = fields.NONE
SUM = fields.SUM
MEAN = fields.MEAN
TILE = fields.TILE
MODES = {"none": NONE, "sum": SUM, "mean": MEAN, "tile": TILE}

Plan = npt.NDArray[np.int64]


def gather(plan: Plan, embedding_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Write every feature's rows, pooled as its mode says, to its output.

    ``none``: one row an id. ``sum``: sum of a bag's rows, times weights if any. ``mean``: the sum
    over the number of ids that are not padding, or over the sum of their weights. ``tile``: the
    first TILE_LEN rows of a bag side by side, zeros behind. Ids without a row are zeros; an empty
    bag is zeros.

    Args:
        plan: int64 [num_features, PLAN_SIZE].
        embedding_dim: Weights in a row.
        dtype: Of weights and outputs.
        device: Where rows and outputs are.

    Raises:
        ValueError: Offsets that do not ascend from 0 to the number of ids.
    """
    with backend.region("recis::gather"):
        module = backend.module("embedding_bag", device)
        bad = module.gather(plan, embedding_dim, dtype is torch.bfloat16, device)
    _check_offsets(plan, bad)


def fuses(device: torch.device, training: bool) -> bool:
    """Return whether the device's kernels have ``find_and_gather``.

    In training the host must know at once whether there are ids to insert; it does not wait for a
    device that runs later.
    """
    if training and backend.runs_later(device):
        return False
    return hasattr(backend.module("embedding_bag", device), "find_and_gather")


def find_and_gather(
    plan: Plan,
    segments: Segments,
    training: bool,
    embedding_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Do what ``hash_index.find`` and ``gather`` do, in one pass over the ids.

    Where ids are to be inserted first, the outputs are not those of the lookup.

    Args:
        plan: As for ``gather``; what ROWS points to is written, not read.
        segments: As for ``hash_index.find``, one for each line of the plan.
        training: Stamp the rows that are found, and look for ids to insert.
        embedding_dim: Weights in a row.
        dtype: Of weights and outputs.
        device: Where ids and outputs are.

    Returns:
        How many ids have no row and are to be inserted; 0 unless training.

    Raises:
        ValueError: As ``gather``.
    """
    with backend.region("recis::find_and_gather"):
        module = backend.module("embedding_bag", device)
        bfloat16 = dtype is torch.bfloat16
        layout = (embedding_dim, bfloat16, device)
        bad, misses = module.find_and_gather(plan, segments, training, *layout)
    _check_offsets(plan, bad)
    return int(misses)


def _check_offsets(plan: Plan, bad: int) -> None:
    if bad >= 0:
        raise ValueError(
            f"offsets: of the call's feature number {bad} must start at 0, never descend and end "
            f"at its number of ids, {int(plan[bad, NUM_IDS])}"
        )


def gather_rows(header: Header, rows: Tensor, embedding_dim: int, dtype: torch.dtype) -> Tensor:
    """Copy rows of one table.

    Args:
        header: The table's header.
        rows: int64 [n]; negative rows give zeros.
        embedding_dim: Weights in a row.
        dtype: Of the weights.

    Returns:
        dtype [n, embedding_dim].
    """
    out = torch.empty(rows.numel(), embedding_dim, dtype=dtype, device=rows.device)
    plan = np.zeros((1, PLAN_SIZE), np.int64)
    plan[0, [HEADER, MODE, NUM_BAGS, BAG_LENGTH]] = header.address, NONE, rows.numel(), 1
    plan[0, [DATA, DATA_STRIDE]] = out.data_ptr(), embedding_dim * out.element_size()
    plan[0, [ROWS, NUM_IDS]] = rows.data_ptr(), rows.numel()
    gather(plan, embedding_dim, dtype, rows.device)
    return out


def write_rows_(header: Header, rows: Tensor, values: Tensor) -> None:
    """Overwrite the front of rows of one table.

    Args:
        header: The table's header.
        rows: int64 [n], distinct, none negative.
        values: [n, words], contiguous; as many bytes as it has are written from each row's start.
    """
    backend.module("embedding_bag", rows.device).write_rows_(header, rows, values)
