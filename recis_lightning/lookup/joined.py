"""Joined output: all features of a module side by side in one tensor, with one gradient.

Each feature's rows are written at its columns, and its gradient is read there, by the strides of
the plan. So a feature costs a line of a plan, and no tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recis_lightning import compiler
from recis_lightning.jagged import Bags, FeatureBags
from recis_lightning.lookup import transfer
from recis_lightning.lookup.autograd import (
    Lookup,
    OutputRecord,
    check_passes,
    inputs_of,
    present_gradients,
)
from recis_lightning.lookup.buffers import Columns
from recis_lightning.lookup.group import LookupGroup, is_transferred, look_up_with
from recis_lightning.lookup.held_gradients import once_differentiable
from recis_lightning.ops.recycled_memory import RecycledMemory
from recis_lightning.table.lock import distinct_locks, write


class JoinedOutput:
    """Places of a module's features in one output.

    Groups whose tables have one dtype and device share a tensor. A module has one, as a rule.

    Args:
        groups: The groups of the module.
        names: Its features, in the order of their columns.
    """

    def __init__(self, groups: Sequence[LookupGroup], names: Sequence[str]) -> None:
        self.groups, self.names = groups, names
        layouts = [group.layout for group in groups]
        kinds = [(layout.dtype, layout.device) for layout in layouts]
        distinct = list(dict.fromkeys(kinds))
        self._tensor_of = [distinct.index(kind) for kind in kinds]  # by group
        self._kinds = distinct
        self._memory = [RecycledMemory() for _ in distinct]
        places = {
            name: (group, feature)
            for group, layout in enumerate(layouts)
            for feature, name in enumerate(layout.names)
        }
        self._first = [np.zeros(len(layout.names), np.int64) for layout in layouts]
        self._widths = [0] * len(distinct)
        columns = []  # (tensor, width) of each feature, in order
        for name in names:
            group, feature = places[name]
            tensor, width = self._tensor_of[group], layouts[group].widths[feature]
            self._first[group][feature] = self._widths[tensor]
            self._widths[tensor] += width
            columns.append((tensor, width))
        # Neighbours in one tensor stay together where several are joined.
        self._runs = [
            (tensor, sum(width for _, width in run))
            for tensor, run in groupby(columns, lambda column: column[0])
        ]

    def look_up(self, bags: Sequence[FeatureBags], num_samples: int, training: bool) -> Tensor:
        """Look all features up.

        Args:
            bags: For each group, those of its features.
            num_samples: B, as ``num_samples`` returns it.
            training: As for ``look_up_groups``.

        Returns:
            [B, sum of widths].
        """
        is_traced = not isinstance(num_samples, int)  # by torch.jit, which is refused below
        tensors = [
            memory.empty(num_samples, width, dtype)
            if device.type == "cpu" and not is_traced
            else torch.empty(num_samples, width, dtype=dtype, device=device)
            for memory, width, (dtype, device) in zip(
                self._memory, self._widths, self._kinds, strict=True
            )
        ]
        columns = [
            Columns(tensors[tensor], first)
            for tensor, first in zip(self._tensor_of, self._first, strict=True)
        ]

        def record(lookups: Sequence[Lookup]) -> list[Tensor]:
            return [
                self._record(tensor, number, lookups, columns)
                for number, tensor in enumerate(tensors)
            ]

        outputs = look_up_with(self.groups, bags, training, columns, record)
        if len(outputs) == 1:
            return outputs[0]
        parts = [
            iter(output.split([width for of, width in self._runs if of == number], 1))
            for number, output in enumerate(outputs)
        ]
        return torch.cat([next(parts[tensor]) for tensor, _ in self._runs], 1)

    def _record(
        self, tensor: Tensor, number: int, lookups: Sequence[Lookup], columns: Sequence[Columns]
    ) -> Tensor:
        """Return one of the tensors as autograd knows it, where the caller has its tensors."""
        members = [i for i, of in enumerate(self._tensor_of) if of == number]
        recorded = record_columns([lookups[i] for i in members], [columns[i] for i in members])
        first = lookups[members[0]]
        if is_transferred(first):
            return transfer.outputs_to_device([recorded], first.batch.came_from)[0]
        return recorded

    def num_samples(self, bags: Sequence[FeatureBags], combined: Collection[str] = ()) -> int:
        """Return the number of samples that all features have.

        Args:
            bags: For each group, those of its features.
            combined: Features whose rows a combiner makes one of.

        Raises:
            ValueError: A feature does not give one row a sample, or others have another number of
                samples (names it).
        """
        sizes: dict[str, int] = {}
        for group, parts in zip(self.groups, bags, strict=True):
            layout = group.layout
            if not parts.details:
                sizes.update(zip(layout.names, parts.sizes, strict=True))
                continue
            for feature, bag in zip(layout.features, parts.details, strict=True):
                mode = "sum" if feature.name in combined else feature.mode
                _check_one_row(feature.name, mode, bag)
                sizes[feature.name] = bag.num_bags
        first = self.names[0]
        num_samples = sizes[first]
        if set(sizes.values()) != {num_samples}:
            other = next(name for name in self.names if sizes[name] != num_samples)
            hint = ""
            if sizes[other] == num_samples - 1 or num_samples == sizes[other] - 1:
                hint = "; offsets are one more than samples: did you pass lengths?"
            raise ValueError(
                f"{other}: concat needs as many samples of each feature, and {first!r} has "
                f"{num_samples}; got {sizes[other]}{hint}"
            )
        return num_samples


def _check_one_row(name: str, mode: str, bags: Bags) -> None:
    """Raise if a feature does not give one row a sample."""
    shape = bags.shape
    if mode == "none" and (shape is None or len(shape) != 1) and shape != (bags.num_bags, 1):
        got = "ragged ids" if shape is None else f"ids of shape {shape}"
        raise ValueError(
            f"{name}: concat needs one id a sample of a feature of mode 'none', [B] or [B, 1], got "
            f"{got}; give it mode='sum', 'mean' or 'tile', or call the engine itself"
        )
    if shape is not None and len(shape) not in (1, 2):
        raise ValueError(f"{name}: concat needs ids [B] or [B, L], got ids of shape {shape}")


def record_columns(lookups: Sequence[Lookup], columns: Sequence[Columns]) -> Tensor:
    """Return the tensor that lookups have filled together as autograd knows it.

    Args:
        lookups: Of groups, whose tables are locked.
        columns: For each, the columns that it has filled; of one tensor.
    """
    tensor = columns[0].tensor
    if not torch.is_grad_enabled():
        return tensor
    recorded = []
    for lookup, filled in zip(lookups, columns, strict=True):
        weighted, learns = lookup.weighted(), lookup.learns()
        if weighted or learns:
            recorded.append((OutputRecord(lookup, weighted, learns), filled.first))
    if not recorded:
        return tensor
    inputs = inputs_of([record for record, _ in recorded])
    joined: Tensor = JoinedFunction.apply([tensor], recorded, *inputs)  # type: ignore[no-untyped-call]
    return joined


class JoinedFunction(torch.autograd.Function):
    """Joined output of lookups; backward leaves gradients with the tables."""

    @staticmethod
    def forward(
        ctx: Any, tensors: list[Tensor], recorded: list[tuple[OutputRecord, Any]], *inputs: Tensor
    ) -> Tensor:
        """Return the one of ``tensors``, which is filled already.

        As an input of its own, autograd would return a view of it.
        """
        ctx.set_materialize_grads(False)
        ctx.recorded, ctx.passed = recorded, set()
        ctx.num_leaves = len(inputs) - sum(len(record.weighted) for record, _ in recorded)
        return tensors[0]

    @staticmethod
    @compiler.disable  # it counts references
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Leave the rows' gradients with the tables; return those of per-sample weights."""
        present, tensors, _ = present_gradients(gradients)
        check_passes(ctx, present)
        records: list[OutputRecord] = [record for record, _ in ctx.recorded]
        trained = [_trained(record) for record in records] if present else []

        def leave_gradients() -> list[Tensor | None]:
            weights: list[Tensor | None] = []
            for record, features in zip(records, trained, strict=False):
                record.check_generations([*features, *record.weighted])
            if not present:
                return [gradient for its in records for gradient in its.weight_gradients({})]
            for (record, first), features in zip(ctx.recorded, trained, strict=True):
                columns = Columns(tensors[0], first)
                _return_columns(record, columns, features)
                weights += record.weight_gradients(_of_weighted(record, columns))
            return weights

        locks = distinct_locks(lock for record in records for lock in record.layout.current_locks())
        return (*[None] * (2 + ctx.num_leaves), *write(locks, leave_gradients))


def _trained(record: OutputRecord) -> Sequence[int]:
    """Return the features whose rows get a gradient, in a backward pass."""
    features = range(len(record.layout.features))
    trained = record.trained(features)
    return features if trained is None else np.flatnonzero(trained).tolist()


def _return_columns(record: OutputRecord, columns: Columns, features: Sequence[int]) -> None:
    """Leave the gradients of some of a lookup's columns with its tables."""
    addresses = columns.addresses()
    if len(features) < len(addresses):
        addresses = addresses[list(features)]
    tensors = [columns.tensor] if features else []
    record.return_gradients(features, addresses, columns.stride_bytes(), tensors)


def _of_weighted(record: OutputRecord, columns: Columns) -> dict[int, Tensor]:
    """Return the gradients of the features whose weights ask for one."""
    widths = record.layout.widths
    return {
        feature: columns.tensor.narrow(1, int(columns.first[feature]), widths[feature])
        for feature in record.weighted
    }


__all__ = ["JoinedOutput", "record_columns"]
