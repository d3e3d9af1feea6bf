"""Optimizer updates in plain torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import layout as fields
from recis_lightning.ops.embedding_bag import Plan
from recis_lightning.ops.reference.embedding_bag import Feature
from recis_lightning.ops.reference.storage import Rows, memory, state_of, weights_of
from recis_lightning.ops.reference.update_rules import RULES
from recis_lightning.ops.row_update import Gradients, RowLayout


class _Reduced(NamedTuple):
    """Reduced gradients: rows, int64 [n] ascending, their gradients, float64 [n, dim], and ids."""

    rows: Tensor
    gradients: Tensor
    num_ids: Tensor  # float64 [n]


def sort_gradients(
    plan: Plan,
    blocks: npt.NDArray[np.int64],
    layout: RowLayout,
    blocks_on_device: Tensor | None,
    hyper: npt.NDArray[np.float32] | None,
    kept: dict[str, Any] | None,
) -> _Reduced:
    rows, gradients, counts = (
        [torch.empty(0, dtype=torch.int64, device="cpu")],
        [torch.empty(0, layout.embedding_dim, device="cpu")],
        [torch.empty(0, device="cpu")],
    )
    for feature in (Feature(line) for line in plan):
        used = feature.used
        data = feature.data(layout.embedding_dim, torch.float32)
        per_id = data[feature.bag[used], feature.tile()[used]]
        gradients.append(per_id * feature.scales()[used, None])
        if feature.line[fields.PLAN_COUNTED]:
            behind = feature.data(layout.embedding_dim + 1, torch.float32)
            counts.append(behind[feature.bag[used], 0, -1])
        else:
            counts.append(torch.ones(len(per_id), device="cpu"))
        rows.append(feature.rows[used] + int(feature.line[fields.PLAN_FLAT_BASE]))
    distinct, inverse = torch.unique(torch.cat(rows), return_inverse=True)
    total = torch.zeros(distinct.numel(), layout.embedding_dim, dtype=torch.float64, device="cpu")
    num_ids = torch.zeros(distinct.numel(), dtype=torch.float64, device="cpu")
    return _Reduced(
        distinct,
        total.index_add_(0, inverse, torch.cat(gradients).double()),
        num_ids.index_add_(0, inverse, torch.cat(counts).double()),
    )


def count_rows(gradients: Gradients) -> int:
    assert isinstance(gradients.work, _Reduced)
    return gradients.work.rows.numel()


def squared_norm(gradients: Gradients) -> float:
    assert isinstance(gradients.work, _Reduced)
    return float(gradients.work.gradients.square().sum())


def update_rows_(gradients: Gradients, rule: int) -> None:
    layout, dim = gradients.layout, gradients.layout.embedding_dim
    bfloat16 = layout.dtype is torch.bfloat16
    assert isinstance(gradients.work, _Reduced)
    rows, g, num_ids = gradients.work
    blocks = torch.from_numpy(gradients.blocks)
    store = Rows(blocks[:, 0], layout.block_shift, layout.row_bytes)
    hypers = [memory(int(at), fields.HYPER_SIZE, torch.float32) for at in blocks[:, 1]]
    hyper = torch.stack(hypers)[rows >> layout.block_shift]
    words = store.read(rows)
    weights, state = weights_of(words, dim, bfloat16), state_of(words, dim, bfloat16)
    w, h = weights.double(), hyper.double().T[:, :, None]
    clip = h[fields.HYPER_CLIP]
    g = g * h[fields.HYPER_SCALE]
    if rule & fields.COW_CLIP:
        bound = torch.maximum(
            h[fields.HYPER_COW_RATIO] * w.norm(dim=1, keepdim=True), h[fields.HYPER_COW_LEAST]
        )
        bound, norm = num_ids[:, None] * bound, g.norm(dim=1, keepdim=True)
        g = torch.where(norm > bound, g * (bound / norm), g)
    g = torch.minimum(torch.maximum(g, -clip), clip)
    if rule & fields.COUPLED_DECAY:
        g = g + h[fields.HYPER_WEIGHT_DECAY] * w
    w = RULES[rule % fields.COUPLED_DECAY](w, g, state, h)
    weights.copy_(w.float())
    gradients.applied[0] = 1
    store.write(rows, words)
    marks = torch.stack([line.view(torch.int64)[fields.HYPER_MARKS // 2] for line in hypers])
    for address, row in zip(marks[rows >> layout.block_shift].tolist(), rows.tolist(), strict=True):
        if address:
            memory(address + row, 1, torch.uint8).zero_()
