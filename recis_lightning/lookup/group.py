"""Many features, one pass: index, gather and gradient of a group of tables.

A group is the tables of one device, dtype and dim. However many features ask them and however
these pool, a lookup is one index op and one gather; backward leaves the gradients where they are
and only notes them with the tables as pending.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recis_lightning.distributed import collectives
from recis_lightning.jagged import Bags, PlainBags
from recis_lightning.lookup import transfer
from recis_lightning.lookup.buffers import new_outputs
from recis_lightning.lookup.exchange import ShardExchange
from recis_lightning.lookup.local import find_or_insert_rows
from recis_lightning.ops import embedding_bag, hash_index
from recis_lightning.ops.embedding_bag import MEAN, MODES, NONE, TILE, Plan
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import SEGMENT_SIZE, SEGMENT_START, UNKNOWN
from recis_lightning.table.hash_table import HashTable, write_segment
from recis_lightning.table.pending_gradient import PendingGradient
from recis_lightning.table.storage import Storage
from recis_lightning.table.versions import layout_version

# For maps over hundreds of tables and tensors.
_trains, _generation, _pending, _dtype, _device, _is_cpu = map(
    attrgetter, ("trainable", "generation", "pending", "dtype", "device", "is_cpu")
)
_numel: Any = Tensor.numel
_stride: Any = Tensor.stride
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
        self._storages = [table.storage for table in self.tables]  # of this layout version
        first = self.tables[0]
        self.embedding_dim, self.dtype, self.device = first.embedding_dim, first.dtype, first.device
        self.segment_tables = [self.tables.index(feature.table) for feature in features]
        self._epoch, self._num_ranks = layout_version(), collectives.world_size()
        admissions = [table.admission for table in self.tables if table.admission is not None]
        self._refuses = bool(admissions)
        self._is_frozen = not all(admission.admits for admission in admissions)
        self._all_known = False  # whether the last training lookup found nothing to insert
        self._shapes: list[Any] = []  # of the last call: what its plan was made for
        self._starts, self._num_ids = np.zeros(len(self.features), np.int64), 0
        self._prototype = torch.empty(0, dtype=self.dtype, device=self.device)
        self._owners = [feature.table for feature in self.features]
        self._is_none = np.array([feature.mode == "none" for feature in self.features])
        self._widths = [
            self.embedding_dim * (feature.tile_len if feature.mode == "tile" else 1)
            for feature in self.features
        ]
        self._training = self._template(insert=True)
        self._evaluation = self._template(insert=False)
        self._plan = np.zeros((len(self.features), embedding_bag.PLAN_SIZE), np.int64)
        for line, feature in zip(self._plan, self.features, strict=True):
            line[embedding_bag.HEADER] = feature.table.storage.header.address
            line[embedding_bag.MODE] = MODES[feature.mode]
            line[embedding_bag.TILE_LEN] = feature.tile_len
        self._plan[:, embedding_bag.DATA_STRIDE] = np.array(self._widths) * self.dtype.itemsize

    def _template(self, insert: bool) -> np.ndarray[Any, np.dtype[np.int64]]:
        segments = np.zeros((len(self.features), SEGMENT_SIZE), np.int64)
        for line, feature in zip(segments, self.features, strict=True):
            write_segment(line, feature.table, insert, feature.padding_idx)
        return segments

    def is_current(self) -> bool:
        """Whether the tables' storage and the ranks are still what the group has noted."""
        return self._epoch == layout_version() and self._num_ranks == collectives.world_size()

    def look_up(self, bags: Sequence[Bags], training: bool) -> list[Tensor]:
        """Return each feature's rows, pooled.

        Args:
            bags: One for each feature, on the group's device.
            training: Insert unknown ids, stamp rows and leave gradients; otherwise only read.

        Returns:
            For each feature [n, dim] ("none"), [B, dim] or [B, tile_len * dim] ("tile").
        """
        if self.device.type == "cpu" and bags[0].ids.is_cuda:
            return self._look_up_from_device(bags, training)
        ids = self._check(bags, training)
        outputs, plan = self._allocate(bags)
        rows = self._fill(ids, plan, training)
        return self._recorded(bags, rows, plan, outputs, training)

    def _check(self, bags: Sequence[Bags], training: bool) -> list[Tensor]:
        """Return the ids of ``bags`` if they can be looked up, and note their shapes."""
        if training:
            self._check_trained()
        ids = bags.ids if isinstance(bags, PlainBags) else [bag.ids for bag in bags]
        if self.device.type == "cpu":
            are_here = all(map(_is_cpu, ids))
        else:  # kernels are given addresses: nothing else would tell
            are_here = isinstance(bags, PlainBags) and set(map(_device, ids)) == {self.device}
        if not are_here:
            self._refuse_devices(bags)
        self._note_shapes(bags, ids)
        return ids

    def _recorded(
        self,
        bags: Sequence[Bags],
        rows: Tensor,
        plan: Plan,
        outputs: list[Tensor],
        training: bool,
        way: ShardExchange | None = None,
    ) -> list[Tensor]:
        """Return outputs as autograd knows them.

        Args:
            bags: As for ``look_up``.
            rows: int64 [n], rows of the tables, or places in what ``way`` brought.
            plan: By which the outputs were filled.
            outputs: One for each feature.
            training: Leave gradients.
            way: How rows came from other ranks; None if they are this rank's.
        """
        if not training or not torch.is_grad_enabled():
            return outputs
        weighted = []
        if not isinstance(bags, PlainBags):
            weighted = [
                index
                for index, bag in enumerate(bags)
                if bag.weights is not None and bag.weights.requires_grad
            ]
        if not weighted and not any(map(_trains, self.tables)):
            return outputs
        weights = [bags[index].weights for index in weighted]
        found = _Lookup.apply(_ANCHOR, self, bags, rows, way, plan, outputs, weighted, *weights)  # type: ignore[no-untyped-call]
        return list(found)

    def _look_up_from_device(self, bags: Sequence[Bags], training: bool) -> list[Tensor]:
        """Look up in tables on the CPU what a model on a GPU asks."""
        device = bags[0].ids.device
        outputs = self.look_up(transfer.bags_from_device(bags, device), training)
        return transfer.outputs_to_device(outputs, device)

    def _refuse_devices(self, bags: Sequence[Bags]) -> None:
        """Raise if a feature is not where its table is."""
        for feature, bag in zip(self.features, bags, strict=True):
            for what in ("ids", "offsets", "weights"):
                part = getattr(bag, what)
                if part is not None and part.device != self.device:
                    raise ValueError(
                        f"{feature.name}: its table is on {self.device}, its {what} on "
                        f"{part.device}"
                    )

    def _note_shapes(self, bags: Sequence[Bags], ids: list[Tensor]) -> None:
        """Fill in what segments and plan say of sizes, if these are not those of the last call."""
        shapes: list[Any]
        if isinstance(bags, PlainBags):
            shapes = bags.sizes
        else:
            shapes = [
                (part.numel(), bag.num_bags, bag.bag_length)
                for part, bag in zip(ids, bags, strict=True)
            ]
        if shapes == self._shapes:
            return
        self._shapes = shapes
        if isinstance(bags, PlainBags):
            sizes = num_bags = np.array(shapes, np.int64)
            lengths = np.ones_like(sizes)
        else:
            sizes, num_bags, lengths = np.array(shapes, np.int64).T
        self._starts, self._num_ids = np.cumsum(sizes) - sizes, int(sizes.sum())
        self._training[:, SEGMENT_START] = self._evaluation[:, SEGMENT_START] = self._starts
        plan = self._plan
        plan[:, embedding_bag.FIRST_ID], plan[:, embedding_bag.NUM_IDS] = self._starts, sizes
        plan[:, embedding_bag.NUM_BAGS] = np.where(self._is_none, sizes, num_bags)
        plan[:, embedding_bag.BAG_LENGTH] = np.where(self._is_none, 1, lengths)

    def _check_trained(self) -> None:
        for table in compress(self.tables, map(_pending, self.tables)):
            if table.optimizer is None:
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

    def _fill(self, ids: list[Tensor], plan: Plan, training: bool) -> Tensor:
        """Look ids up and fill the outputs; return the row of each id.

        One pass does both wherever no id has to be inserted. In training that is seen only at its
        end, so it is tried when the last lookup found every id known.
        """
        segments = self._training if training else self._evaluation
        hash_index.write_addresses(segments, ids)
        layout = (self.embedding_dim, self.dtype, self.device)
        fuses = embedding_bag.fuses(self.device, training)
        if fuses and (self._all_known if training else True):
            rows = torch.empty(self._num_ids, dtype=torch.int64, device=self.device)
            plan[:, embedding_bag.ROWS] = rows.data_ptr() + 8 * self._starts
            if not embedding_bag.find_and_gather(plan, segments, training, *layout):
                if training:
                    hash_index.note_known(segments, rows, self._storages, self.segment_tables)
                return rows
        if training:
            rows, new = find_or_insert_rows(
                segments, ids, self._num_ids, self.tables, self.segment_tables
            )
            # That a frozen table does not know an id is counted only here, not in the one pass.
            self._all_known = fuses and new is None and not self._is_frozen
            if self._all_known and self._refuses:
                self._all_known = not bool((rows == UNKNOWN).any())
        else:
            rows = hash_index.find(segments, self._num_ids, self.device)
        plan[:, embedding_bag.ROWS] = rows.data_ptr() + 8 * self._starts
        embedding_bag.gather(plan, *layout)
        return rows

    def _allocate(self, bags: Sequence[Bags]) -> tuple[list[Tensor], Plan]:
        """Return uninitialised outputs, and the plan that fills them once it has rows."""
        plan = self._plan.copy()
        counts = plan[:, embedding_bag.NUM_BAGS].tolist()
        outputs = new_outputs(counts, self._widths, self._prototype)
        plan[:, embedding_bag.DATA] = list(map(Tensor.data_ptr, outputs))
        if isinstance(bags, PlainBags):
            return outputs, plan
        for index, bag in enumerate(bags):
            if bag.offsets is not None and plan[index, embedding_bag.BAG_LENGTH] < 0:
                plan[index, embedding_bag.OFFSETS] = bag.offsets.data_ptr()
            if bag.weights is not None:
                plan[index, embedding_bag.WEIGHTS] = bag.weights.data_ptr()
        return outputs, plan

    def _leave_gradients(
        self,
        plan: Plan,
        used: Sequence[int],
        bags: Sequence[Bags],
        rows: Tensor,
        kept: list[Tensor],
        way: ShardExchange | None,
    ) -> None:
        """Leave gradients with the tables as pending.

        Args:
            plan: Of the features ``used``; DATA holds gradients.
            used: Positions of the features that have a gradient and train.
            bags: Of all features.
            rows: int64 [n], as for ``_recorded``.
            kept: The gradients.
            way: As for ``_recorded``.
        """
        if not used:
            return
        if not isinstance(bags, PlainBags):
            kept += [bag.offsets for bag in bags if bag.offsets is not None]
            kept += [bag.weights for bag in bags if bag.weights is not None]
        tables = self._owners  # always the same list where that is right: the update knows it
        if len(used) < len(tables):
            tables = [tables[index] for index in used]
        record = PendingGradient(tables, plan, rows, kept)
        for table in self.tables if tables is self._owners else dict.fromkeys(tables):
            table.pending.append(record)

    def weight_gradient(
        self,
        index: int,
        bags: Bags,
        header: Header,
        rows: Tensor,
        weights: Tensor,
        gradient: Tensor,
    ) -> Tensor:
        """Return the gradient of per-sample weights, float32 [n] (rarely asked for: plain torch).

        Args:
            index: The feature's position.
            bags: Its ids.
            header: Where ``rows`` are.
            rows: int64 [n].
            weights: float32 [n].
            gradient: Of the feature's output.
        """
        feature, dim = self.features[index], self.embedding_dim
        mode, count = MODES[feature.mode], bags.ids.numel()
        values = embedding_bag.gather_rows(header, rows, dim, self.dtype).float()
        if mode == NONE:
            return (values * gradient.float()).sum(1)
        if bags.offsets is None:
            bag = torch.arange(count, device=rows.device) // max(bags.bag_length, 1)
            start = bag * bags.bag_length
        else:
            # Not repeat_interleave: a GPU's would wait to know how long the result is.
            bag = torch.searchsorted(
                bags.offsets[1:], torch.arange(count, device=rows.device), right=True
            ).clamp(max=max(bags.num_bags - 1, 0))
            start = bags.offsets[bag]
        if mode == TILE:
            place = torch.arange(count, device=rows.device) - start
            tiles = gradient.float().reshape(bags.num_bags, feature.tile_len, dim)
            inside = place < feature.tile_len
            picked = tiles[bag, place.clamp(max=feature.tile_len - 1)]
            return (values * picked).sum(1) * inside
        dots = (values * gradient.float()[bag]).sum(1)
        if mode == MEAN:
            counted = weights * (rows != hash_index.PADDING)
            zeros = torch.zeros(2, bags.num_bags, dtype=torch.float32, device=rows.device)
            total = zeros[0].index_add_(0, bag, counted)
            weighted = zeros[1].index_add_(0, bag, dots * weights)
            mean = (weighted / total)[bag]
            dots = torch.where(rows == hash_index.PADDING, 0.0, (dots - mean) / total[bag])
        return dots


class _Lookup(torch.autograd.Function):
    """The outputs of a lookup; backward leaves gradients with the tables."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        group: TableGroup,
        bags: Sequence[Bags],
        rows: Tensor,
        way: ShardExchange | None,
        plan: Plan,
        outputs: list[Tensor],
        weighted: list[int],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.group, ctx.bags, ctx.rows, ctx.plan, ctx.weighted = group, bags, rows, plan, weighted
        ctx.way = way
        ctx.generations = list(map(_generation, group._storages))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        group: TableGroup = ctx.group
        if ctx.generations != list(map(_generation, group._storages)):
            _refuse_stale_rows(group._storages, ctx.generations)
        places, given, strides = _given(gradients)
        whole = dict(zip(places, given, strict=True)) if ctx.weighted else {}
        if not all(map(_trains, group.tables)):
            trains = [group.features[index].table.trainable for index in places]
            places, given = list(compress(places, trains)), list(compress(given, trains))
            strides = list(compress(strides, trains))
        plan = ctx.plan[places] if len(places) < len(gradients) else ctx.plan.copy()
        if places:
            plan[:, embedding_bag.DATA] = list(map(Tensor.data_ptr, given))
            plan[:, embedding_bag.DATA_STRIDE] = strides
        group._leave_gradients(plan, places, ctx.bags, ctx.rows, given, ctx.way)
        return (*[None] * 8, *_weight_gradients(ctx, whole))


def _given(gradients: Sequence[Tensor | None]) -> tuple[Sequence[int], list[Tensor], list[int]]:
    """Return which gradients there are, they as float32 with contiguous rows, and row strides.

    The strides are in bytes.
    """
    places: Sequence[int] = range(len(gradients))
    given: list[Any] = list(gradients)
    if set(map(type, given)) != {Tensor} or not all(map(_numel, given)):
        places = [i for i, part in enumerate(given) if part is not None and part.numel()]
        given = [given[place] for place in places]
    if set(map(_dtype, given)) - {torch.float32}:
        given = [part.float() for part in given]
    strides = list(map(_stride, given))
    if not all(inner == 1 for _, inner in strides):
        given = [part if part.stride(1) == 1 else part.contiguous() for part in given]
        strides = list(map(_stride, given))
    return places, given, [4 * outer for outer, _ in strides]


def _refuse_stale_rows(storages: Sequence[Storage], generations: Sequence[int]) -> None:
    for table, generation in zip(storages, generations, strict=True):
        if table.generation != generation:
            raise RuntimeError(
                f"table {table.name!r} lost rows between a lookup and its backward pass "
                "(evict, delete, clear or load); run backward first, or look up again"
            )


def _weight_gradients(ctx: Any, gradients: dict[int, Tensor]) -> list[Tensor | None]:
    """Return the gradient of each feature's weights that asks for one."""
    found: list[Tensor | None] = []
    for index in ctx.weighted:
        bags, first = ctx.bags[index], int(ctx.plan[index, embedding_bag.FIRST_ID])
        rows = ctx.rows[first : first + bags.ids.numel()]
        source = ctx.group.features[index].table.storage if ctx.way is None else ctx.way
        header = source.header
        gradient = gradients.get(index)
        found.append(
            None
            if gradient is None
            else ctx.group.weight_gradient(index, bags, header, rows, bags.weights, gradient)
        )
    return found


__all__ = ["Feature", "TableGroup"]
