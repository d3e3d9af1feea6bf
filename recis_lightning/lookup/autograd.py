"""Backward pass of a lookup: gradients of rows go to the tables, those of weights to autograd."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recis_lightning.jagged import Bags, FeatureBags
from recis_lightning.lookup.features import FeatureLayout
from recis_lightning.lookup.row_source import FetchedRows, OutputGradients
from recis_lightning.ops import embedding_bag, hash_index
from recis_lightning.ops.embedding_bag import MEAN, MODES, NONE, TILE, Plan
from recis_lightning.ops.header import Header
from recis_lightning.table.hash_table import HashTable

# For maps over hundreds of tables and tensors.
_is_trainable, _generation, _dtype = map(attrgetter, ("trainable", "generation", "dtype"))
_numel: Any = Tensor.numel
_stride: Any = Tensor.stride
_is_neg: Any = Tensor.is_neg
_ANCHOR = torch.zeros((), requires_grad=True)  # makes autograd call us; never gets a gradient


def record_lookup(
    layout: FeatureLayout,
    bags: FeatureBags,
    plan: Plan,
    fetched: FetchedRows,
    outputs: list[Tensor],
) -> list[Tensor]:
    """Return the outputs of a training lookup as autograd knows them.

    Args:
        layout: The group's features.
        bags: One for each feature, on the group's device.
        plan: The plan by which the outputs were filled.
        fetched: The rows that it points to.
        outputs: One for each feature.
    """
    if not torch.is_grad_enabled():
        return outputs
    weighted = [
        feature
        for feature, bag in enumerate(bags.details)
        if bag.weights is not None and bag.weights.requires_grad
    ]
    if not weighted and not any(map(_is_trainable, layout.tables)):
        return outputs
    weights = [bags.details[feature].weights for feature in weighted]
    recorded = LookupFunction.apply(  # type: ignore[no-untyped-call]
        _ANCHOR, layout, bags, plan, fetched, outputs, weighted, *weights
    )
    return list(recorded)


class LookupFunction(torch.autograd.Function):
    """Outputs of a lookup; backward leaves gradients with the tables."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        layout: FeatureLayout,
        bags: FeatureBags,
        plan: Plan,
        fetched: FetchedRows,
        outputs: list[Tensor],
        weighted: list[int],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return ``outputs``, which are filled already."""
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.bags, ctx.plan, ctx.fetched = layout, bags, plan, fetched
        ctx.weighted = weighted
        ctx.generations = list(map(_generation, layout.storages))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Leave the rows' gradients with the tables; return those of per-sample weights."""
        layout: FeatureLayout = ctx.layout
        generations = list(map(_generation, layout.storages))
        if generations != ctx.generations:
            _raise_stale_rows(layout.tables, ctx.generations, generations)
        features, tensors, strides = _present(gradients)
        by_feature = dict(zip(features, tensors, strict=True)) if ctx.weighted else {}
        if not all(map(_is_trainable, layout.tables)):
            trains = [layout.feature_tables[feature].trainable for feature in features]
            features, tensors = list(compress(features, trains)), list(compress(tensors, trains))
            strides = list(compress(strides, trains))
        plan = ctx.plan[features] if len(features) < len(gradients) else ctx.plan.copy()
        if features:
            plan[:, embedding_bag.DATA] = list(map(Tensor.data_ptr, tensors))
            plan[:, embedding_bag.DATA_STRIDE] = strides
        ctx.fetched.return_gradients(OutputGradients(features, plan, ctx.bags, tensors))
        return (*[None] * 7, *_weight_gradients(ctx, by_feature))


def _present(gradients: Sequence[Tensor | None]) -> tuple[Sequence[int], list[Tensor], list[int]]:
    """Return the gradients that are there.

    Returns:
        Positions of their features; the gradients as float32 with contiguous rows; their row
        strides in bytes.
    """
    features: Sequence[int] = range(len(gradients))
    tensors: list[Any] = list(gradients)
    if set(map(type, tensors)) != {Tensor} or not all(map(_numel, tensors)):
        features = [i for i, tensor in enumerate(tensors) if tensor is not None and tensor.numel()]
        tensors = [tensors[feature] for feature in features]
    if set(map(_dtype, tensors)) - {torch.float32}:
        tensors = [tensor.float() for tensor in tensors]
    if any(map(_is_neg, tensors)):
        tensors = [tensor.resolve_neg() for tensor in tensors]
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
    for feature in ctx.weighted:
        gradient = gradients.get(feature)
        if gradient is None:
            results.append(None)
            continue
        bags, first = ctx.bags[feature], int(ctx.plan[feature, embedding_bag.FIRST_ID])
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
