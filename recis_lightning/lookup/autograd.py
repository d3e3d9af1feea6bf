"""Backward pass of a lookup: gradients of rows go to the tables, those of weights to autograd."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from operator import and_, attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recis_lightning.jagged import Bags
from recis_lightning.lookup.batch import Batch
from recis_lightning.lookup.features import FeatureLayout
from recis_lightning.lookup.held_gradients import copy_held_, expected_references
from recis_lightning.lookup.row_source import FetchedRows, OutputGradients
from recis_lightning.ops import embedding_bag, hash_index
from recis_lightning.ops import layout as fields
from recis_lightning.ops.embedding_bag import MODES, Plan
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import MEAN, MEAN_BY_COUNT, NONE, TILE
from recis_lightning.table.anchor import leaves_of
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.lock import write

# For maps over hundreds of tables and tensors.
_requires_grad, _generation, _dtype = map(attrgetter, ("requires_grad", "generation", "dtype"))
_numel: Any = Tensor.numel
_stride: Any = Tensor.stride
_is_neg: Any = Tensor.is_neg  # a view whose memory holds the negative values


def record_lookup(
    layout: FeatureLayout,
    batch: Batch,
    plan: Plan,
    fetched: FetchedRows,
    outputs: list[Tensor],
    training: bool,
) -> list[Tensor]:
    """Return the outputs of a lookup as autograd knows them.

    Args:
        layout: The group's features.
        batch: What was looked up.
        plan: The plan by which the outputs were filled.
        fetched: The rows that it points to.
        outputs: One for each feature.
        training: Whether rows get gradients; per-sample weights get them in evaluation too.
    """
    if not torch.is_grad_enabled():
        return outputs
    details = batch.bags.details
    weighted = [feature for feature in batch.weighted if _requires_grad(details[feature].weights)]
    learns = training and any(layout.trains())
    if not weighted and not learns:
        return outputs
    expected_references()  # what it does must not be nested in a backward pass
    # Autograd calls us for their sake; they get no gradient.
    leaves = leaves_of(layout.anchors) if learns else []
    weights = [details[feature].weights for feature in weighted]
    recorded = LookupFunction.apply(  # type: ignore[no-untyped-call]
        layout, batch, plan, fetched, outputs, weighted, training, *leaves, *weights
    )
    return list(recorded)


class LookupFunction(torch.autograd.Function):
    """Outputs of a lookup; backward leaves gradients with the tables."""

    @staticmethod
    def forward(
        ctx: Any,
        layout: FeatureLayout,
        batch: Batch,
        plan: Plan,
        fetched: FetchedRows,
        outputs: list[Tensor],
        weighted: list[int],
        training: bool,
        *leaves_and_weights: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return ``outputs``, which are filled already."""
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.batch, ctx.plan, ctx.fetched = layout, batch, plan, fetched
        ctx.weighted, ctx.training = weighted, training
        ctx.num_leaves = len(leaves_and_weights) - len(weighted)
        # Of a table that was frozen in the forward pass, autograd would know nothing.
        ctx.trains = layout.trains() if training else [False]
        if layout.frozen:
            frozen = layout.frozen.difference(weighted)
            ctx.mark_non_differentiable(*(outputs[feature] for feature in frozen))
        ctx.generations = list(map(_generation, layout.storages))
        ctx.versions = list(map(fetched.version_of, weighted))
        return tuple(outputs)

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it counts references
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Leave the rows' gradients with the tables; return those of per-sample weights."""
        layout: FeatureLayout = ctx.layout
        features, tensors, strides = _present(gradients)
        by_feature = dict(zip(features, tensors, strict=True)) if ctx.weighted else {}
        trains = layout.trains() if ctx.num_leaves and _accumulates(ctx) else [False]
        if layout.frozen or not all(ctx.trains) or not all(trains):
            trained = set(compress(layout.tables, map(and_, ctx.trains, trains)))
            trains = [
                feature not in layout.frozen and layout.feature_tables[feature] in trained
                for feature in features
            ]
            features, tensors = list(compress(features, trains)), list(compress(tensors, trains))
            strides = list(compress(strides, trains))
        plan = ctx.plan[features] if len(features) < len(gradients) else ctx.plan.copy()
        if features:
            plan[:, fields.PLAN_DATA] = list(map(Tensor.data_ptr, tensors))
            plan[:, fields.PLAN_DATA_STRIDE] = strides
        given = OutputGradients(features, plan, ctx.batch, tensors)
        of_weights = write(layout.current_locks(), _leave_gradients, ctx, given, by_feature)
        return (*[None] * (7 + ctx.num_leaves), *of_weights)


def _leave_gradients(
    ctx: Any, gradients: OutputGradients, by_feature: dict[int, Tensor]
) -> list[Tensor | None]:
    """Leave gradients with the tables, which no other thread uses; return those of weights."""
    generations = list(map(_generation, ctx.layout.storages))
    if generations != ctx.generations:
        _raise_stale_rows(ctx.layout.tables, ctx.generations, generations)
    if ctx.training:
        ctx.fetched.return_gradients(gradients)
    return _weight_gradients(ctx, by_feature)


def _accumulates(ctx: Any) -> bool:
    """Return whether the pass adds gradients up where they belong, those of tables too.

    ``torch.autograd.grad`` returns what it was asked for and adds up nothing, and ``backward`` may
    be asked for the gradients of other leaves alone.
    """
    leaves = [node for node, _ in ctx.next_functions[: ctx.num_leaves]]
    try:
        return any(map(torch._C._will_engine_execute_node, leaves))
    except RuntimeError:  # torch.autograd.grad was asked for an anchor's
        return False


def _present(gradients: Sequence[Tensor | None]) -> tuple[Sequence[int], list[Tensor], list[int]]:
    """Return the gradients that are there, as tensors that nobody else writes to.

    Returns:
        Positions of their features; the gradients as float32 with contiguous rows; their row
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
    strides = list(map(_stride, tensors))
    if not all(inner == 1 for _, inner in strides):
        tensors = [tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in tensors]
        strides = list(map(_stride, tensors))
    return features, tensors, [4 * outer for outer, _ in strides]


def _raise_stale_rows(
    tables: Sequence[HashTable], before: Sequence[int], now: Sequence[int]
) -> None:
    stale = next(table for table, old, new in zip(tables, before, now, strict=True) if old != new)
    raise RuntimeError(
        f"table {stale.name!r} lost rows between a lookup and its backward pass "
        "(evict, delete, clear or load); run backward first, or look up again"
    )


def _weight_gradients(ctx: Any, gradients: dict[int, Tensor]) -> list[Tensor | None]:
    """Return the gradient of each feature's weights that asks for one."""
    layout: FeatureLayout = ctx.layout
    fetched: FetchedRows = ctx.fetched
    results: list[Tensor | None] = []
    for feature, version in zip(ctx.weighted, ctx.versions, strict=True):
        gradient = gradients.get(feature)
        if gradient is None:
            weights: Any = ctx.batch.bags.details[feature].weights
            results.append(None if weights.numel() else torch.zeros_like(weights))
            continue
        if fetched.version_of(feature) != version:
            raise RuntimeError(
                f"{layout.names[feature]}: rows of table {layout.feature_tables[feature].name!r}, "
                "needed for the gradient of weights, were overwritten since the lookup (by an "
                "optimizer's step or insert); run backward first, or look up again"
            )
        bags, first = ctx.batch.bags_of(feature), int(ctx.plan[feature, fields.PLAN_FIRST_ID])
        rows = fetched.rows[first : first + bags.ids.numel()]
        header = fetched.header_of(feature)
        results.append(_weight_gradient(layout, feature, bags, header, rows, gradient))
    return results


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
        picked = tiles[bag, position.clamp(max=tile_len - 1)]
        return (values * picked).sum(1) * is_inside
    dots = (values * gradient.float()[bag]).sum(1)
    if mode == MEAN_BY_COUNT:
        ones = torch.ones_like(dots) * (rows != hash_index.PADDING)
        counts = torch.zeros(bags.num_bags, device=rows.device).index_add_(0, bag, ones)
        dots = torch.where(rows == hash_index.PADDING, 0.0, dots / counts[bag])
    if mode == MEAN:
        assert weights is not None
        counted = weights * (rows != hash_index.PADDING)
        zeros = torch.zeros(2, bags.num_bags, dtype=torch.float32, device=rows.device)
        total = zeros[0].index_add_(0, bag, counted)
        weighted = zeros[1].index_add_(0, bag, dots * weights)
        mean = (weighted / total)[bag]
        dots = torch.where(rows == hash_index.PADDING, 0.0, (dots - mean) / total[bag])
    return dots


__all__ = ["record_lookup"]
