"""Many features, one pass: index, gather and gradient of a group of tables.

A group is the tables of one device, dtype and dim. However many features ask them and however
these pool, a lookup is one index op and one gather; backward leaves the gradients where they are
and only notes them with the tables as pending.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recis_lightning.hash_table import HashTable, refuse_many_ranks, write_segment
from recis_lightning.jagged import Bags
from recis_lightning.ops import embedding_bag, hash_index, row_init
from recis_lightning.ops.embedding_bag import MEAN, MODES, NONE, TILE
from recis_lightning.ops.table_header import SEGMENT_SIZE
from recis_lightning.pending_gradient import PendingGradient
from recis_lightning.table_storage import storage_epoch

_ANCHOR = torch.zeros((), requires_grad=True)  # makes autograd call us; never gets a gradient


class Feature(NamedTuple):
    """How a feature is looked up, apart from its ids.

    Attributes:
        name: What errors call it.
        table: Whose rows it reads.
        mode: "none", "sum", "mean" or "tile".
        padding_idx: An id that is no id, or None.
        tile_len: Rows of a bag for "tile".
    """

    name: str
    table: HashTable
    mode: str
    padding_idx: int | None = None
    tile_len: int = 0


class TableGroup:
    """Features of one device, dtype and dim.

    Args:
        features: Their tables must agree on device, dtype and embedding_dim.
    """

    def __init__(self, features: Sequence[Feature]) -> None:
        self.features = list(features)
        self.tables = list(dict.fromkeys(feature.table for feature in features))
        first = self.tables[0]
        self.embedding_dim, self.dtype, self.device = first.embedding_dim, first.dtype, first.device
        self.segment_tables = [self.tables.index(feature.table) for feature in features]
        self._epoch = storage_epoch()
        self._sizes: list[int] = []
        self._training = self._template(insert=True)
        self._evaluation = self._template(insert=False)
        self._plan = np.zeros((len(self.features), embedding_bag.PLAN_SIZE), np.int64)
        for line, feature in zip(self._plan, self.features, strict=True):
            line[embedding_bag.HEADER] = feature.table.header.data_ptr()
            line[embedding_bag.MODE] = MODES[feature.mode]
            line[embedding_bag.TILE_LEN] = feature.tile_len

    def _template(self, insert: bool) -> np.ndarray[Any, np.dtype[np.int64]]:
        segments = np.zeros((len(self.features), SEGMENT_SIZE), np.int64)
        for line, feature in zip(segments, self.features, strict=True):
            write_segment(line, 0, feature.table, insert, feature.padding_idx)
        return segments

    def is_current(self) -> bool:
        """Whether the tables' storage is still what the group has noted of it."""
        return self._epoch == storage_epoch()

    def look_up(self, bags: Sequence[Bags], training: bool) -> list[Tensor]:
        """Return each feature's rows, pooled.

        Args:
            bags: One for each feature, on the group's device.
            training: Insert unknown ids, stamp rows and leave gradients; otherwise only read.

        Returns:
            For each feature [n, dim] ("none"), [B, dim] or [B, tile_len * dim] ("tile").
        """
        if training:
            refuse_many_ranks("a training lookup")
            self._check_trained()
        for feature, bag in zip(self.features, bags, strict=True):
            if bag.ids.device.type != self.device.type:
                raise ValueError(
                    f"{feature.name}: its table is on {self.device}, its ids on {bag.ids.device}"
                )
        rows = self._find_rows([bag.ids for bag in bags], training)
        weights = [bag.weights for bag in bags]
        if training and torch.is_grad_enabled() and self._needs_gradient(weights):
            return list(_Lookup.apply(_ANCHOR, self, bags, rows, *weights))  # type: ignore[no-untyped-call]
        return self._gather(bags, rows, weights)[0]

    def _needs_gradient(self, weights: Sequence[Tensor | None]) -> bool:
        return any(table.trainable for table in self.tables) or any(
            weight is not None and weight.requires_grad for weight in weights
        )

    def _check_trained(self) -> None:
        for table in self.tables:
            if table.pending and table.optimizer is None:
                raise RuntimeError(
                    f"table {table.name!r} has a gradient and no optimizer that would use it; add "
                    "SparseAdamW(hash_tables(self), lr=...) to configure_optimizers, as in "
                    "SparseDenseOptimizer(torch.optim.AdamW(self.parameters()), "
                    "SparseAdamW(hash_tables(self))), or make the table trainable=False"
                )
        half = torch.is_autocast_enabled(self.device.type) and (
            torch.get_autocast_dtype(self.device.type) is torch.float16
        )
        if half and torch.is_grad_enabled():
            raise RuntimeError(
                "precision '16-mixed' scales the loss, and its GradScaler cannot unscale the "
                "gradients of tables; use precision='bf16-mixed' or '32-true'"
            )

    def _find_rows(self, ids: list[Tensor], training: bool) -> Tensor:
        joined = ids[0] if len(ids) == 1 else torch.cat(ids)
        sizes = [part.numel() for part in ids]
        if sizes != self._sizes:
            self._sizes = sizes
            self._training[:, 0] = self._evaluation[:, 0] = np.cumsum(sizes) - sizes
        described = torch.from_numpy(self._training if training else self._evaluation)
        if not training:
            return hash_index.find(joined, described)
        rows, new = hash_index.find_or_insert(joined, described, self.tables, self.segment_tables)
        if new is not None:
            bfloat16 = self.dtype is torch.bfloat16
            row_init.init_rows_(joined, rows, new, described, self.embedding_dim, bfloat16)
        return rows

    def _gather(
        self, bags: Sequence[Bags], rows: Tensor, weights: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], np.ndarray[Any, np.dtype[np.int64]]]:
        plan = self._plan.copy()
        outputs, lines, first = [], [], 0
        item = self.dtype.itemsize
        rows_address = rows.data_ptr()
        for feature, bag, weight in zip(self.features, bags, weights, strict=True):
            count = bag.ids.numel()
            width = self.embedding_dim
            num_bags, bag_length, offsets = bag.num_bags, bag.bag_length, bag.offsets
            if feature.mode == "none":
                if offsets is not None and count == 0:
                    offsets = None
                num_bags, bag_length = count, 1
            elif feature.mode == "tile":
                width *= feature.tile_len
            out = torch.empty(num_bags, width, dtype=self.dtype, device=self.device)
            outputs.append(out)
            lines.append(
                (
                    first,
                    num_bags,
                    bag_length,
                    0 if bag_length >= 0 or offsets is None else offsets.data_ptr(),
                    0 if weight is None else weight.data_ptr(),
                    out.data_ptr(),
                    width * item,
                    rows_address + 8 * first,
                    count,
                )
            )
            first += count
        plan[:, _CALL_COLUMNS] = lines
        embedding_bag.gather(plan, self.embedding_dim, self.dtype, self.device)
        return outputs, plan

    def weight_gradient(
        self, index: int, bags: Bags, rows: Tensor, weights: Tensor, gradient: Tensor
    ) -> Tensor:
        """Return the gradient of per-sample weights, float32 [n] (rarely asked for: plain torch).

        Args:
            index: The feature's position.
            bags: Its ids.
            rows: int64 [n].
            weights: float32 [n].
            gradient: Of the feature's output.
        """
        feature, dim = self.features[index], self.embedding_dim
        mode, count = MODES[feature.mode], bags.ids.numel()
        values = embedding_bag.gather_rows(feature.table.header, rows, dim, self.dtype).float()
        if mode == NONE:
            return (values * gradient.float()).sum(1)
        if bags.offsets is None:
            bag = torch.arange(count) // max(bags.bag_length, 1)
            start = bag * bags.bag_length
        else:
            bag = torch.repeat_interleave(torch.arange(bags.num_bags), bags.offsets.diff())
            start = bags.offsets[bag]
        if mode == TILE:
            place = torch.arange(count) - start
            tiles = gradient.float().reshape(bags.num_bags, feature.tile_len, dim)
            inside = place < feature.tile_len
            picked = tiles[bag, place.clamp(max=feature.tile_len - 1)]
            return (values * picked).sum(1) * inside
        dots = (values * gradient.float()[bag]).sum(1)
        if mode == MEAN:
            counted = weights * (rows != hash_index.PADDING)
            zeros = torch.zeros(2, bags.num_bags, dtype=torch.float32)
            total = zeros[0].index_add_(0, bag, counted)
            weighted = zeros[1].index_add_(0, bag, dots * weights)
            mean = (weighted / total)[bag]
            dots = torch.where(rows == hash_index.PADDING, 0.0, (dots - mean) / total[bag])
        return dots


_CALL_COLUMNS = [
    embedding_bag.FIRST_ID,
    embedding_bag.NUM_BAGS,
    embedding_bag.BAG_LENGTH,
    embedding_bag.OFFSETS,
    embedding_bag.WEIGHTS,
    embedding_bag.DATA,
    embedding_bag.DATA_STRIDE,
    embedding_bag.ROWS,
    embedding_bag.NUM_IDS,
]


class _Lookup(torch.autograd.Function):
    """Gather; backward leaves gradients with the tables."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        group: TableGroup,
        bags: Sequence[Bags],
        rows: Tensor,
        *weights: Tensor | None,
    ) -> tuple[Tensor, ...]:
        outputs, plan = group._gather(bags, rows, weights)
        ctx.set_materialize_grads(False)
        ctx.group, ctx.bags, ctx.rows, ctx.plan, ctx.weights = group, bags, rows, plan, weights
        ctx.generations = [table.generation for table in group.tables]
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        group: TableGroup = ctx.group
        kept: list[Tensor] = []
        used: list[int] = []
        plan = ctx.plan.copy()
        weight_gradients: list[Tensor | None] = [None] * len(gradients)
        for index, gradient in enumerate(gradients):
            if gradient is None or gradient.numel() == 0:
                continue
            feature, bags, weights = group.features[index], ctx.bags[index], ctx.weights[index]
            if feature.table.generation != ctx.generations[group.segment_tables[index]]:
                raise RuntimeError(
                    f"table {feature.table.name!r} lost rows between a lookup and its backward "
                    "pass (evict, delete, clear or load); run backward first, or look up again"
                )
            if gradient.dtype is not torch.float32:
                gradient = gradient.float()
            stride, inner = gradient.stride()
            if inner != 1:
                gradient = gradient.contiguous()
                stride = gradient.shape[1]
            if ctx.needs_input_grad[4 + index]:
                first = int(plan[index, embedding_bag.FIRST_ID])
                rows = ctx.rows[first : first + bags.ids.numel()]
                weight_gradients[index] = group.weight_gradient(
                    index, bags, rows, weights, gradient
                )
            if not feature.table.trainable:
                continue
            plan[index, embedding_bag.DATA] = gradient.data_ptr()
            plan[index, embedding_bag.DATA_STRIDE] = 4 * stride
            kept += [part for part in (gradient, bags.offsets, weights) if part is not None]
            used.append(index)
        if used:
            tables = [group.features[index].table for index in used]
            record = PendingGradient(tables, plan[used], ctx.rows, kept)
            for table in dict.fromkeys(tables):
                table.pending.append(record)
        return (None, None, None, None, *weight_gradients)


__all__ = ["Feature", "TableGroup"]
