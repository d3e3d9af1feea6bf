"""Gathering and pooling in plain torch, and the reader of a plan's features."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import layout as fields
from recis_lightning.ops.embedding_bag import Plan
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import PADDING
from recis_lightning.ops.reference.storage import Rows, header_at, memory, weights_of


class Feature:
    """Feature of a plan: its rows, and their bags."""

    def __init__(self, line: npt.NDArray[np.int64]) -> None:
        self.line = line
        self.mode, self.num_bags = int(line[fields.PLAN_MODE]), int(line[fields.PLAN_NUM_BAGS])
        self.rows = memory(int(line[fields.PLAN_ROWS]), int(line[fields.PLAN_NUM_IDS]), torch.int64)
        self.tile_len = int(line[fields.PLAN_TILE_LEN])
        count = self.rows.numel()
        length = int(line[fields.PLAN_BAG_LENGTH])
        if length >= 0:
            self.offsets = torch.arange(self.num_bags + 1, device="cpu") * length
        else:
            self.offsets = memory(int(line[fields.PLAN_OFFSETS]), self.num_bags + 1, torch.int64)
        sizes = self.offsets.diff()
        ends = (int(self.offsets[0]), int(self.offsets[-1]))
        self.has_valid_offsets = ends == (0, count) and bool((sizes >= 0).all())
        if self.has_valid_offsets:
            self.bag = torch.repeat_interleave(torch.arange(self.num_bags, device="cpu"), sizes)
            self.place = torch.arange(count, device="cpu") - self.offsets[self.bag]
            self.used = self.rows >= 0
            if self.mode == fields.TILE:
                self.used &= self.place < self.tile_len

    def scales(self) -> Tensor:
        """Return the factor of each id's row in the output, float64 [n]."""
        scales = torch.ones(self.rows.numel(), dtype=torch.float64, device="cpu")
        if self.line[fields.PLAN_WEIGHTS]:
            scales *= memory(int(self.line[fields.PLAN_WEIGHTS]), scales.numel(), torch.float32)
        if self.mode in (fields.MEAN, fields.MEAN_BY_COUNT):
            shares = scales if self.mode == fields.MEAN else torch.ones_like(scales)
            counted = shares * (self.rows != PADDING)
            total = torch.zeros(self.num_bags, dtype=torch.float64, device="cpu").index_add_(
                0, self.bag, counted
            )
            scales = torch.where(total == 0, 0.0, 1 / total)[self.bag] * scales
        return scales

    def data(self, embedding_dim: int, dtype: torch.dtype) -> Tensor:
        """View the output, or its gradient, [num_bags, tile_len or 1, embedding_dim]."""
        tiles = self.tile_len if self.mode == fields.TILE else 1
        width = tiles * embedding_dim
        stride = int(self.line[fields.PLAN_DATA_STRIDE]) // dtype.itemsize
        count = (self.num_bags - 1) * stride + width if self.num_bags else 0
        flat = memory(int(self.line[fields.PLAN_DATA]), count, dtype)
        return flat.as_strided((self.num_bags, tiles, embedding_dim), (stride, embedding_dim, 1))

    def tile(self) -> Tensor:
        """Return each id's tile in its bag, int64 [n]; 0 unless the mode is ``tile``."""
        return self.place if self.mode == fields.TILE else torch.zeros_like(self.place)


def gather(plan: Plan, embedding_dim: int, bfloat16: bool, device: torch.device) -> int:
    features = [Feature(line) for line in plan]
    for i, feature in enumerate(features):
        if not feature.has_valid_offsets:
            return i
    for feature in features:
        header = header_at(int(feature.line[fields.PLAN_HEADER]))
        words = Rows.of(header, feature.rows).read(feature.rows)
        values = weights_of(words, embedding_dim, bfloat16).double() * feature.scales()[:, None]
        out = feature.data(embedding_dim, torch.bfloat16 if bfloat16 else torch.float32)
        total = torch.zeros(out.shape, dtype=torch.float64, device="cpu")
        used = feature.used
        places = (feature.bag[used], feature.tile()[used])
        out.copy_(total.index_put_(places, values[used], accumulate=True).float())
    return -1


def write_rows_(header: Header, rows: Tensor, values: Tensor) -> None:
    store = Rows.of(header.tensor, rows)
    words = store.read(rows)
    num_bytes = values.shape[1] * values.element_size()
    words.view(torch.uint8)[:, :num_bytes] = values.view(torch.uint8)
    store.write(rows, words)
