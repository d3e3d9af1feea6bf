"""Gathering of rows and pooling into bags: the contract.

All features of a group go in one call, each with its own pooling. A *plan*, int64
[num_features, PLAN_SIZE] on the CPU, describes a feature in each line. Later the row update takes
the same plan, with gradients in place of outputs, and reads each id's gradient where it lies. So
gradients of bags are never copied to one row per id.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import backend, mapped_rows, traffic
from recis_lightning.ops import layout as fields
from recis_lightning.ops.hash_index import Segments
from recis_lightning.ops.header import Header

MODES = {
    "none": fields.NONE,
    "sum": fields.SUM,
    "mean": fields.MEAN,
    "tile": fields.TILE,
    "mean_by_count": fields.MEAN_BY_COUNT,
}

Plan = npt.NDArray[np.int64]


def gather(plan: Plan, embedding_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Write every feature's rows, pooled as its mode says, to its output.

    ``none``: one row an id. ``sum``: sum of a bag's rows, times weights if any. ``mean``: the sum
    over the number of ids that are not padding, or over the sum of their weights.
    ``mean_by_count``: the weighted sum over the number of these ids, whatever their weights.
    ``tile``: the first PLAN_TILE_LEN rows of a bag side by side, padded with zeros. Ids without a
    row give zeros, and so does an empty bag.

    Args:
        plan: int64 [num_features, PLAN_SIZE].
        embedding_dim: Weights in a row.
        dtype: Dtype of weights and outputs.
        device: Device of rows and outputs.

    Raises:
        MalformedOffsetsError: Offsets do not ascend from 0 to the number of ids. Beside a GPU a
            later call raises a ValueError.
    """
    size = dtype.itemsize
    with backend.region("recis::gather", lambda: traffic.of_gather(plan, embedding_dim, size)):
        module = backend.module("embedding_bag", device)
        malformed = module.gather(plan, embedding_dim, dtype is torch.bfloat16, device)
    _check_offsets(plan, malformed)


def prepare_training(embedding_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile what a training step of such rows runs, if the backend can do so early.

    Args:
        embedding_dim: Weights in a row.
        dtype: Dtype of weights and outputs.
        device: Device of ids and outputs.
    """
    module = backend.module("embedding_bag", device)
    if hasattr(module, "prepare_training"):
        module.prepare_training(embedding_dim, dtype is torch.bfloat16)


def fuses(device: torch.device, training: bool) -> bool:
    """Return whether the device's kernels have ``find_and_gather``.

    In training the host must know at once whether there are ids to insert, and it does not wait for
    an asynchronous device.
    """
    if training and backend.is_async(device):
        return False
    return hasattr(backend.module("embedding_bag", device), "find_and_gather")


def find_and_gather(
    plan: Plan,
    segments: Segments,
    training: bool,
    embedding_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    kept: dict[str, Any] | None = None,
) -> int:
    """Do what ``hash_index.find`` and ``gather`` do, in one pass over the ids.

    Where ids are to be inserted first, the outputs are not those of the lookup.

    Args:
        plan: As for ``gather``, but the memory that PLAN_ROWS points to is written, not read.
        segments: As for ``hash_index.find``, one for each line of the plan.
        training: Update last-seen steps of known rows, and look for ids to insert.
        embedding_dim: Weights in a row.
        dtype: Dtype of weights and outputs.
        device: Device of ids and outputs.
        kept: As for ``hash_index.find_or_insert``.

    Returns:
        Number of ids without a row that are to be inserted; 0 unless training.

    Raises:
        MalformedOffsetsError: As ``gather``.
    """

    def num_bytes() -> int:
        found = traffic.of_find(int(plan[:, fields.PLAN_NUM_IDS].sum()))
        return found + traffic.of_gather(plan, embedding_dim, dtype.itemsize)

    with backend.region("recis::find_and_gather", num_bytes):
        module = backend.module("embedding_bag", device)
        bfloat16 = dtype is torch.bfloat16
        layout = (embedding_dim, bfloat16, device, kept)
        malformed, num_misses = module.find_and_gather(plan, segments, training, *layout)
    _check_offsets(plan, malformed)
    return int(num_misses)


def _check_offsets(plan: Plan, malformed: int) -> None:
    """Raise if a feature has malformed offsets; -1 stands for none."""
    if malformed >= 0:
        raise MalformedOffsetsError(malformed, int(plan[malformed, fields.PLAN_NUM_IDS]))


class MalformedOffsetsError(ValueError):
    """Offsets that do not ascend from 0 to the number of ids.

    Args:
        feature: Position of the feature in the call.
        num_ids: Its number of ids.
    """

    def __init__(self, feature: int, num_ids: int) -> None:
        super().__init__(
            f"offsets: of the call's feature number {feature} must start at 0, never descend and "
            f"end at its number of ids, {num_ids}"
        )
        self.feature = feature


def gather_rows(header: Header, rows: Tensor, embedding_dim: int, dtype: torch.dtype) -> Tensor:
    """Copy rows of one table.

    Args:
        header: The table's header.
        rows: int64 [n]; negative rows give zeros.
        embedding_dim: Weights in a row.
        dtype: Dtype of the weights.

    Returns:
        dtype [n, embedding_dim].
    """
    out = torch.empty(rows.numel(), embedding_dim, dtype=dtype, device=rows.device)
    for chunk in mapped_rows.chunks(header, rows.numel()):
        _gather_into(out[chunk], header, rows[chunk])
    return out


def _gather_into(out: Tensor, header: Header, rows: Tensor) -> None:
    """Copy rows of one table, contiguous as ``out``."""
    mapped_rows.bring_in([(header, rows)], writes=False)
    embedding_dim, dtype = out.shape[1], out.dtype
    plan = np.zeros((1, fields.PLAN_SIZE), np.int64)
    line = plan[0]
    line[fields.PLAN_HEADER] = header.address
    line[fields.PLAN_MODE] = fields.NONE
    line[fields.PLAN_NUM_BAGS] = line[fields.PLAN_NUM_IDS] = rows.numel()
    line[fields.PLAN_BAG_LENGTH] = 1
    line[fields.PLAN_DATA] = out.data_ptr()
    line[fields.PLAN_DATA_STRIDE] = embedding_dim * out.element_size()
    line[fields.PLAN_ROWS] = rows.data_ptr()
    gather(plan, embedding_dim, dtype, rows.device)


def write_rows_(header: Header, rows: Tensor, values: Tensor) -> None:
    """Overwrite the first words of rows of one table.

    Args:
        header: The table's header.
        rows: int64 [n], distinct, none negative.
        values: [n, words], contiguous; its bytes are written from each row's start on.
    """
    module = backend.module("embedding_bag", rows.device)
    for chunk in mapped_rows.chunks(header, rows.numel()):
        mapped_rows.bring_in([(header, rows[chunk])], writes=True)
        module.write_rows_(header, rows[chunk], values[chunk])
