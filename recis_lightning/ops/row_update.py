"""Reduce gradients by row and update rows in place: one contract for every optimizer.

The gradients of all lookups since the last step, of all tables of one optimizer with the same row
layout, are one call: rows are numbered through (a table's first row has its FLAT_BASE), positions
are sorted by row with a stable radix sort, and each row's gradients are added up in the order of
the batch and applied at once. Nothing is added atomically, so the result does not depend on
threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import backend
from recis_lightning.ops import layout as fields
from recis_lightning.ops.embedding_bag import Plan

# Aliases until all rooms name the fields of ops.layout.
LR = fields.HYPER_LR
EPS = fields.HYPER_EPS
INV_SQRT_BIAS2 = fields.HYPER_INV_SQRT_BIAS2
DECAY = fields.HYPER_DECAY
SCALE = fields.HYPER_SCALE
CLIP = fields.HYPER_CLIP
NEW_SHARE1 = fields.HYPER_ONE_MINUS_BETA1
NEW_SHARE2 = fields.HYPER_ONE_MINUS_BETA2
HYPER_SIZE = fields.HYPER_SIZE
SGD = fields.SGD
ADAGRAD = fields.ADAGRAD
ROWWISE_ADAGRAD = fields.ROWWISE_ADAGRAD
ADAM = fields.ADAM


@dataclass(frozen=True)
class RowLayout:
    """How a row of the call's tables looks.

    Attributes:
        embedding_dim: Weights in a row.
        dtype: float32 or bfloat16 weights; state is float32 and follows them.
        row_bytes: From one row to the next.
        block_shift: log2(rows in a block).
        device: Where rows and gradients are.
    """

    embedding_dim: int
    dtype: torch.dtype
    row_bytes: int
    block_shift: int
    device: torch.device


@dataclass(frozen=True)
class Gradients:
    """Gradients of one update call, sorted by row; made by ``sort_gradients``.

    Attributes:
        plan: int64 [num_features, PLAN_SIZE]; DATA holds gradients.
        blocks: int64 [num_blocks, 2]: address of each block, and of its table's hyperparameters.
        layout: Of the rows.
        work: What the backend keeps between sorting and updating. Unless ``outlive_next_sort``
            says otherwise, it lies in scratch memory that the thread's next sort writes over: use
            it before, on the thread that sorted.
    """

    plan: Plan
    blocks: npt.NDArray[np.int64]
    layout: RowLayout
    work: object


def outlive_next_sort(device: torch.device) -> bool:
    """Whether sorted gradients on ``device`` are good also after others were sorted."""
    return backend.runs_later(device)


def sort_gradients(
    plan: Plan,
    blocks: npt.NDArray[np.int64],
    layout: RowLayout,
    blocks_on_device: Tensor | None = None,
) -> Gradients:
    """Sort the positions of ``plan`` by row, stably.

    Args:
        plan: int64 [num_features, PLAN_SIZE]; FIRST_ID numbers the positions of all features
            through, DATA and DATA_STRIDE describe float32 gradients.
        blocks: int64 [num_blocks, 2].
        layout: Of the rows.
        blocks_on_device: ``blocks`` as a tensor on the device, if the caller has one there.

    Returns:
        The sorted gradients; hyperparameters are not read before the update.

    Source: least significant digit radix sort, Knuth, TAOCP vol. 3, 5.2.5.
    """
    with backend.region("recis::sort_gradients"):
        module = backend.module("row_update", layout.device)
        work = module.sort_gradients(plan, blocks, layout, blocks_on_device)
        return Gradients(plan, blocks, layout, work)


def squared_norm(gradients: Gradients) -> Tensor:
    """Add up the squares of all rows' reduced gradients, in a fixed order.

    Returns:
        float64 [], where the gradients are: nobody waits for a device.
    """
    with backend.region("recis::gradient_norm"):
        module = backend.module("row_update", gradients.layout.device)
        return torch.as_tensor(module.squared_norm(gradients), dtype=torch.float64)


def update_rows_(gradients: Gradients, rule: int) -> None:
    """Apply one optimizer step to every row that has a gradient.

    With g the row's reduced gradient, times SCALE and clamped to CLIP, in float32:

    - ``SGD``: w = w * DECAY - LR * g
    - ``ADAGRAD``: s += g * g; w -= LR * g / (sqrt(s) + EPS)
    - ``ROWWISE_ADAGRAD``: s += mean(g * g), one s a row; w as above
    - ``ADAM``: m += NEW_SHARE1 * (g - m); v += NEW_SHARE2 * (g * g - v);
      w = w * DECAY - LR * m / (sqrt(v) * INV_SQRT_BIAS2 + EPS)

    Source: Duchi et al., 2011; Kingma and Ba, 2015; Loshchilov and Hutter, 2019; row-wise as in
    FBGEMM.
    """
    with backend.region("recis::row_update"):
        backend.module("row_update", gradients.layout.device).update_rows_(gradients, rule)
