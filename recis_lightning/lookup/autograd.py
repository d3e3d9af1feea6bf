"""Backward pass of a lookup: gradients of rows go to the tables, those of weights to autograd."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recis_lightning import compiler
from recis_lightning.jagged import Bags
from recis_lightning.lookup.batch import Batch
from recis_lightning.lookup.features import FeatureLayout, Removals
from recis_lightning.lookup.held_gradients import (
    copy_held_,
    expected_references,
    once_differentiable,
)
from recis_lightning.lookup.room import note_lookup
from recis_lightning.lookup.row_source import FetchedRows, OutputGradients
from recis_lightning.ops import embedding_bag, hash_index
from recis_lightning.ops import layout as fields
from recis_lightning.ops.embedding_bag import MODES, Plan
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import MEAN, MEAN_BY_COUNT, NONE, TILE
from recis_lightning.table.anchor_hub import AnchorHub
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.lock import write

# For maps over hundreds of tables and tensors.
_requires_grad, _dtype = map(attrgetter, ("requires_grad", "dtype"))
_numel: Any = Tensor.numel
_stride: Any = Tensor.stride
_is_neg: Any = Tensor.is_neg  # a view whose memory holds the negative values


class Lookup(NamedTuple):
    """Lookup of a group's features that has filled its outputs.

    Attributes:
        layout: The group's features.
        batch: What was looked up.
        plan: The plan by which the outputs were filled.
        fetched: The rows that it points to.
        outputs: One for each feature; none if the features fill columns of a joined output.
        training: Whether rows get gradients; per-sample weights get them in evaluation too.
    """

    layout: FeatureLayout
    batch: Batch
    plan: Plan
    fetched: FetchedRows
    outputs: list[Tensor]
    training: bool

    def weighted(self) -> list[int]:
        """Return the features whose weights ask for a gradient."""
        details = self.batch.bags.details
        return [i for i in self.batch.weighted if _requires_grad(details[i].weights)]

    def learns(self) -> bool:
        """Return whether rows of any table get gradients."""
        return self.training and any(self.layout.trains())


class OutputRecord:
    """Record of a lookup's outputs, by which a backward pass returns their gradients.

    Args:
        lookup: The lookup, whose tables are locked.
        weighted: Features whose weights ask for a gradient.
        learns: What its ``learns`` returns.
    """

    def __init__(self, lookup: Lookup, weighted: list[int], learns: bool) -> None:
        # Not the outputs: they hold the graph, which holds this.
        self.lookup, self.weighted = Lookup(*lookup[:4], [], lookup.training), weighted
        layout = self.layout = lookup.layout
        # Of a table that was frozen in the forward pass, autograd would know nothing.
        self._trains = layout.trains() if lookup.training else [False]
        self.hub: AnchorHub | None = layout.hub() if learns else None
        self._is_own = lookup.fetched.is_own
        self._before = layout.removals()
        self._versions = list(map(lookup.fetched.version_of, weighted))
        # Once a backward pass has left gradients, these keep their rows until they are used.
        self._left: Removals | None = None
        if self._is_own:
            note_lookup(layout, self)

    def rows_in_use(self, table: HashTable) -> Iterator[Tensor]:
        """Yield rows of a table that a backward pass may still ask for, int64 [n] each."""
        layout, plan = self.layout, self.lookup.plan
        position = layout.tables.index(table)
        is_stale = self._before.generations[position] != table.storage.generation
        if self._left is not None or is_stale:
            return
        for feature, owner in enumerate(layout.feature_tables):
            if owner is table:
                first = int(plan[feature, fields.PLAN_FIRST_ID])
                size = int(plan[feature, fields.PLAN_NUM_IDS])
                yield self.lookup.fetched.rows[first : first + size]

    def trained(self, features: Sequence[int]) -> list[bool] | None:
        """Return for each of some features whether its rows get a gradient; None if all do.

        Called in a backward pass, which may have been asked for some tables' gradients alone.
        """
        layout = self.layout
        trains = layout.trains()
        asked = [False] if self.hub is None else self.hub.asked()
        if not layout.frozen and all(self._trains) and all(trains) and all(asked):
            return None
        trained = set(
            compress(layout.tables, map(all, zip(self._trains, trains, asked, strict=False)))
        )
        return [
            feature not in layout.frozen and layout.feature_tables[feature] in trained
            for feature in features
        ]

    def check_generations(self, features: Sequence[int]) -> None:
        """Raise if a table lost rows since that some features need; the caller has locked it.

        Args:
            features: Those whose rows, or weights, get a gradient.

        Raises:
            RuntimeError: A row may be another id's by now (names the table).
        """
        if not self._is_own:
            return
        before, left, now = self._before, self._left, self.layout.removals()
        if now is not before and now.generations != before.generations:
            self._check_used(features, before.generations, now.generations)
        if left is not None and now is not left and now.num_rooms != left.num_rooms:
            self._check_used(features, left.num_rooms, now.num_rooms)

    def _check_used(
        self, features: Sequence[int], before: Sequence[int], now: Sequence[int]
    ) -> None:
        of_features, tables = self.layout.segment_tables, self.layout.tables
        for table in dict.fromkeys(of_features[feature] for feature in features):
            if before[table] != now[table]:
                raise RuntimeError(
                    f"table {tables[table].name!r} lost rows between a lookup and its backward "
                    "pass (evict, delete, clear or load); run backward first, or look up again"
                )

    def return_gradients(
        self, features: Sequence[int], addresses: Any, strides: Any, tensors: list[Tensor]
    ) -> None:
        """Leave gradients with the tables; the caller has locked them.

        Args:
            features: Features that have a gradient and train.
            addresses: Where each one's gradient lies.
            strides: Bytes from one bag of each to the next.
            tensors: What has these gradients, float32, and nobody else writes to.
        """
        lookup = self.lookup
        if not lookup.training:
            return
        if self._left is None and len(features):
            self._left = self.layout.removals()
        is_whole = len(features) == len(self.layout.features)
        plan = lookup.plan.copy() if is_whole else lookup.plan[features]
        if len(features):
            plan[:, fields.PLAN_DATA] = addresses
            plan[:, fields.PLAN_DATA_STRIDE] = strides
        lookup.fetched.return_gradients(OutputGradients(features, plan, lookup.batch, tensors))

    def weight_gradients(self, gradients: Mapping[int, Tensor]) -> list[Tensor | None]:
        """Return the gradient of each feature's weights that asks for one.

        Args:
            gradients: Gradients of the features' outputs, as far as there are any.

        Raises:
            RuntimeError: Rows that a gradient needs were overwritten (names feature and table).
        """
        lookup, fetched = self.lookup, self.lookup.fetched
        results: list[Tensor | None] = []
        for feature, version in zip(self.weighted, self._versions, strict=True):
            gradient = gradients.get(feature)
            if gradient is None:
                weights: Any = lookup.batch.bags.details[feature].weights
                results.append(None if weights.numel() else torch.zeros_like(weights))
                continue
            if fetched.version_of(feature) != version:
                raise RuntimeError(
                    f"{self.layout.names[feature]}: rows of table "
                    f"{self.layout.feature_tables[feature].name!r}, needed for the gradient of "
                    "weights, were overwritten since the lookup (by an optimizer's step or "
                    "insert); run backward first, or look up again"
                )
            bags = lookup.batch.bags_of(feature)
            first = int(lookup.plan[feature, fields.PLAN_FIRST_ID])
            rows = fetched.rows[first : first + bags.ids.numel()]
            header = fetched.header_of(feature)
            results.append(_weight_gradient(self.layout, feature, bags, header, rows, gradient))
        return results


def record_lookup(lookup: Lookup) -> list[Tensor]:
    """Return the outputs of a lookup as autograd knows them."""
    if not torch.is_grad_enabled():
        return lookup.outputs
    learns, weighted = lookup.learns(), lookup.weighted()
    if not weighted and not learns:
        return lookup.outputs
    record = OutputRecord(lookup, weighted, learns)
    inputs = inputs_of([record])
    apply: Any = LookupFunction.apply
    if not weighted and not _transforms():
        apply = _apply
    return list(apply(lookup.outputs, record, *inputs))


def inputs_of(records: Sequence[OutputRecord]) -> list[Tensor]:
    """Return what autograd must know of lookups: what reaches their tables, then their weights."""
    expected_references()  # what it does must not be nested in a backward pass
    # Autograd calls us for their sake; they get no gradient.
    leaves: list[Any] = [record.hub.joined for record in records if record.hub is not None]
    for record in records:
        details = record.lookup.batch.bags.details
        leaves += [details[feature].weights for feature in record.weighted]
    return leaves


class LookupFunction(torch.autograd.Function):
    """Outputs of a lookup; backward leaves gradients with the tables."""

    @staticmethod
    def forward(
        ctx: Any, outputs: list[Tensor], record: OutputRecord, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Return ``outputs``, which are filled already."""
        ctx.set_materialize_grads(False)
        ctx.record, ctx.num_leaves = record, len(inputs) - len(record.weighted)
        ctx.passed = set()
        if record.layout.frozen:
            frozen = record.layout.frozen.difference(record.weighted)
            ctx.mark_non_differentiable(*(outputs[feature] for feature in frozen))
        return tuple(outputs)

    @staticmethod
    @compiler.disable  # it counts references
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Leave the rows' gradients with the tables; return those of per-sample weights."""
        record: OutputRecord = ctx.record
        features, tensors, strides = present_gradients(gradients)
        check_passes(ctx, features)
        by_feature: dict[int, Tensor] = {}
        if record.weighted:
            given = dict(zip(features, tensors, strict=True))
            by_feature = {f: given[f] for f in record.weighted if f in given}
        trained = record.trained(features)
        if trained is not None:
            features, tensors = list(compress(features, trained)), list(compress(tensors, trained))
            strides = list(compress(strides, trained))
        addresses = list(map(Tensor.data_ptr, tensors))

        def leave_gradients() -> list[Tensor | None]:
            record.check_generations([*features, *by_feature] if by_feature else features)
            record.return_gradients(features, addresses, strides, tensors)
            return record.weight_gradients(by_feature)

        of_weights = write(record.layout.current_locks(), leave_gradients)
        return (*[None] * (2 + ctx.num_leaves), *of_weights)


# ``Function.apply`` without its preparation for torch.func: no input of ours comes from there where
# no weights are recorded.
_apply: Any = super(torch.autograd.Function, LookupFunction).apply
_transforms: Any = torch._C._are_functorch_transforms_active


def check_passes(ctx: Any, outputs: Sequence[int]) -> None:
    """Raise in a second backward pass through outputs whose graph torch was not told to keep.

    Losses of different outputs may have a pass each: their parts of the graph are apart.

    Args:
        ctx: Of the Function, with a set ``passed`` of outputs that had a pass.
        outputs: Positions of those that get a gradient in this one.

    Raises:
        RuntimeError: torch's own, of a second pass.
    """
    if not ctx.passed.isdisjoint(outputs):
        _ = ctx.saved_tensors  # there are none; torch raises if it has freed the graph
    ctx.passed.update(outputs)


def present_gradients(
    gradients: Sequence[Tensor | None],
) -> tuple[Sequence[int], list[Tensor], list[int]]:
    """Return the gradients that are there, as tensors that nobody else writes to.

    Returns:
        Positions of their outputs; the gradients as float32 with contiguous rows; their row
        strides in bytes.
    """
    features: Sequence[int] = range(len(gradients))
    tensors: list[Any] = list(gradients)
    if set(map(type, tensors)) != {Tensor} or not all(map(_numel, tensors)):
        features = [i for i, tensor in enumerate(tensors) if tensor is not None and tensor.numel()]
        tensors = [tensors[feature] for feature in features]
    copy_held_(tensors)
    if any(map(_is_neg, tensors)):
        tensors = [tensor.resolve_neg() for tensor in tensors]
    if set(map(_dtype, tensors)) - {torch.float32}:
        tensors = [tensor.float() for tensor in tensors]
    outer, inner = zip(*map(_stride, tensors), strict=True) if tensors else ((), ())
    if inner.count(1) < len(inner):
        tensors = [tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in tensors]
        outer, _ = zip(*map(_stride, tensors), strict=True)
    return features, tensors, [4 * stride for stride in outer]


def _weight_gradient(
    layout: FeatureLayout,
    feature: int,
    bags: Bags,
    header: Header,
    rows: Tensor,
    gradient: Tensor,
) -> Tensor:
    """Return the gradient of per-sample weights, float32 [n] (rarely asked for: plain torch).

    Args:
        layout: The group's features.
        feature: The feature's position.
        bags: Its ids and weights.
        header: Of the table that has ``rows``.
        rows: int64 [n].
        gradient: Of the feature's output.
    """
    dim, tile_len = layout.embedding_dim, layout.features[feature].tile_len
    mode, weights = MODES[layout.features[feature].mode], bags.weights
    values = embedding_bag.gather_rows(header, rows, dim, layout.dtype).float()
    if mode == NONE:
        return (values * gradient.float()).sum(1)
    bag, position = bags.positions()
    if mode == TILE:
        tiles = gradient.float().reshape(bags.num_bags, tile_len, dim)
        is_inside = position < tile_len
        picked = tiles[bag, position.clamp(0, tile_len - 1)]
        return (values * picked).sum(1) * is_inside
    dots = (values * gradient.float()[bag]).sum(1)
    if mode == MEAN_BY_COUNT:
        ones = torch.ones_like(dots) * (rows != hash_index.PADDING)
        counts = _sums_of_bags(ones, bags)
        dots = torch.where(rows == hash_index.PADDING, 0.0, dots / counts[bag])
    if mode == MEAN:
        assert weights is not None
        counted = weights * (rows != hash_index.PADDING)
        total = _sums_of_bags(counted, bags)
        weighted = _sums_of_bags(dots * weights, bags)
        mean = (weighted / total)[bag]
        # Of weights that add up to 0 the forward pass makes zeros, whatever they are.
        is_constant = (rows == hash_index.PADDING) | (total == 0)[bag]
        dots = torch.where(is_constant, 0.0, (dots - mean) / total[bag])
    return dots


def _sums_of_bags(values: Tensor, bags: Bags) -> Tensor:
    """Add float32 [n] up by bag, [B], in the order of the ids; atomics would take any order."""
    if bags.offsets is None:
        return values.view(bags.num_bags, bags.bag_length).sum(1)
    # Beside a GPU malformed offsets are found out later: no value outside the feature is read.
    offsets = bags.offsets.clamp(0, values.numel()).cummax(0).values
    sums: Tensor = torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True)
    return sums


__all__ = [
    "Lookup",
    "OutputRecord",
    "check_passes",
    "inputs_of",
    "present_gradients",
    "record_lookup",
]
