"""Plans of gathers and updates for tests, made without a lookup."""

import numpy as np
import torch

from recis_lightning.ops import layout as fields
from recis_lightning.ops.embedding_bag import MODES
from recis_lightning.ops.layout import PADDING, PLAN_SIZE, UNKNOWN

NAN = float("nan")


class Feature:
    """Feature of a plan: its line, and the tensors that the line points to."""

    def __init__(
        self, table, rows, mode="sum", length=-1, offsets=None, weights=None, tile_len=0, gap=0
    ):
        self.table, self.rows, self.mode = table, rows, mode
        self.length, self.offsets, self.weights, self.tile_len = length, offsets, weights, tile_len
        count = rows.numel()
        if mode == "none":
            self.length, self.num_bags, self.offsets = 1, count, None
        elif offsets is not None:
            self.num_bags = offsets.numel() - 1
        else:
            self.num_bags = count // length
        self.width = table.embedding_dim * (tile_len if mode == "tile" else 1)
        # Outputs start as NaN, which stays where a kernel writes nothing, as in the gap's columns.
        self.buffer = torch.full((self.num_bags, self.width + gap), NAN, dtype=table.dtype)

    def line(self):
        line = np.zeros(PLAN_SIZE, np.int64)
        for field, value in {
            fields.PLAN_HEADER: self.table.storage.header.address,
            fields.PLAN_MODE: MODES[self.mode],
            fields.PLAN_NUM_BAGS: self.num_bags,
            fields.PLAN_BAG_LENGTH: self.length,
            fields.PLAN_OFFSETS: 0 if self.offsets is None else self.offsets.data_ptr(),
            fields.PLAN_WEIGHTS: 0 if self.weights is None else self.weights.data_ptr(),
            fields.PLAN_TILE_LEN: self.tile_len,
            fields.PLAN_DATA: self.buffer.data_ptr(),
            fields.PLAN_DATA_STRIDE: self.buffer.stride(0) * self.buffer.element_size(),
            fields.PLAN_ROWS: self.rows.data_ptr(),
            fields.PLAN_NUM_IDS: self.rows.numel(),
        }.items():
            line[field] = value
        return line

    def fill_gradient(self, generator):
        """Turn the buffer into a float32 gradient of the output."""
        self.buffer = torch.full(self.buffer.shape, NAN)
        gradient = torch.randn(self.num_bags, self.width, generator=generator)
        self.buffer[:, : self.width] = gradient
        return self

    def output(self):
        assert self.buffer[:, self.width :].isnan().all()
        return self.buffer[:, : self.width]


def ragged_offsets(generator, num_bags, longest=9):
    """Return offsets of bags of 0 to ``longest`` ids, every third one empty."""
    sizes = torch.randint(0, longest + 1, (num_bags,), generator=generator)
    sizes[::3] = 0
    return torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])


def random_rows(generator, count, num_rows=500, holes=True):
    """Return rows in no order, with duplicates and, as holes, padding and unknown ids."""
    rows = torch.randint(0, num_rows, (count,), generator=generator)
    if holes:
        chance = torch.rand(count, generator=generator)
        rows[chance < 0.1] = PADDING
        rows[chance > 0.9] = UNKNOWN
    return rows


def mixed_features(table, generator, num_bags):
    """Return features of every mode and layout, with and without weights and holes."""
    features = []
    for number, mode in enumerate([*MODES] * 4):
        weighted, ragged = number // len(MODES) % 2 == 1, number >= 2 * len(MODES)
        offsets = ragged_offsets(generator, num_bags) if ragged else None
        count = int(offsets[-1]) if ragged else 5 * num_bags
        rows = random_rows(generator, count)
        weights = torch.randn(count, generator=generator) if weighted else None
        if weighted and mode == "mean":
            weights = weights.abs()
        length = -1 if ragged else 5
        features.append(
            Feature(table, rows, mode, length, offsets, weights, tile_len=3, gap=number % 3)
        )
    return features
