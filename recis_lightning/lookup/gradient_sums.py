"""Sums of gradients by id, and gradients of ranks that have sent none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recis_lightning.ops import layout as fields
from recis_lightning.ops import row_update
from recis_lightning.ops.async_copy import to_device_async
from recis_lightning.ops.embedding_bag import Plan


def with_zeros(gradients: Tensor, num_received: Sequence[int], sends: Any) -> Tensor:
    """Return gradients with lines of zeros, which are none, for ids of ranks that sent nothing."""
    is_sent = np.repeat(sends, num_received)
    full = gradients.new_zeros(len(is_sent), gradients.shape[1])
    full[to_device_async(np.flatnonzero(is_sent), gradients.device)] = gradients
    return full


def sum_gradients(plan: Plan, sums: Tensor, scale: float) -> None:
    """Add up the gradients of each id into ``sums``, float32 [u, embedding_dim + 1] of zeros.

    The row update does it, on rows of zeros: SGD with a learning rate of -1 adds the gradient.
    """
    plan = plan.copy()
    sizes = plan[:, fields.PLAN_NUM_IDS]
    if not sizes.sum():
        return
    plan[:, fields.PLAN_FIRST_ID] = np.cumsum(sizes) - sizes
    plan[:, fields.PLAN_FLAT_BASE] = 0
    hyper = np.zeros(fields.HYPER_SIZE, np.float32)
    hyper[[fields.HYPER_LR, fields.HYPER_DECAY]] = -1, 1
    hyper[[fields.HYPER_SCALE, fields.HYPER_CLIP]] = scale, np.inf
    hyper_on_device = to_device_async(hyper, sums.device)
    blocks = np.array([[sums.data_ptr(), hyper_on_device.data_ptr()]], np.int64)
    size, width = sums.shape
    layout = row_update.RowLayout(
        width - 1, torch.float32, 4 * width, size.bit_length(), sums.device
    )
    row_update.update_rows_(row_update.sort_gradients(plan, blocks, layout), fields.SGD)


__all__ = ["sum_gradients", "with_zeros"]
