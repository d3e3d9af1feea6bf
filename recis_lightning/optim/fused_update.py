"""Fused update: tables updated by one kernel call, with the state reused between steps.

A model may have hundreds of tables: what a step does in Python for each of them is what it costs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import embedding_bag, row_update
from recis_lightning.ops import layout as fields
from recis_lightning.ops.async_copy import to_device_async
from recis_lightning.ops.layout import NUM_UPDATES
from recis_lightning.ops.row_update import Gradients, RowLayout
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.pending_gradient import PendingGradient
from recis_lightning.table.versions import block_version

_pending = attrgetter("pending")


class FusedUpdate:
    """Update of tables of one optimizer with the same row layout, by one kernel call.

    Valid while the storage epoch lasts.

    Args:
        tables: At least one.
        groups: For each table, the parameter group that it belongs to.
    """

    def __init__(self, tables: Sequence[HashTable], groups: Sequence[int]) -> None:
        self.tables, self.groups = list(tables), list(groups)
        self._group = self.groups[0] if len(set(self.groups)) == 1 else None
        self.device = self.tables[0].device
        self._pending = list(map(_pending, self.tables))  # a table's is always the same list
        self._storages = [table.storage for table in self.tables]
        self._fields = [storage.header.fields for storage in self._storages]
        self._hyper = np.ones((len(self.tables), fields.HYPER_SIZE), np.float32)
        self._columns = list(self._hyper.T)
        # Beside a GPU a copy of them travels with each plan.
        self._is_copied = self._storages[0].header.is_mirrored
        self._written: dict[int, float] = {}  # fields that have one value for all tables
        self._kept: dict[str, Any] | None = None
        self._moves = -1  # of blocks, for which their addresses are right
        # Tables of features, as the last record listed them, and the first row of each.
        self._feature_tables: Sequence[object] = ()
        self._feature_bases: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def set_hyperparameters(
        self,
        hyperparameters: Callable[[int, int], dict[int, float]],
        clip: float,
        cow_clip: tuple[float, float],
    ) -> None:
        """Write the hyperparameters of the update rule.

        Args:
            hyperparameters: (parameter group, number of the update from 1) -> values by field.
            clip: Bound of every element of a gradient.
            cow_clip: CowClip's r and zeta, for rules with ``COW_CLIP``.
        """
        num_updates = self._num_updates = [line.item(NUM_UPDATES) for line in self._fields]
        common: dict[int, float] = {}
        if num_updates.count(num_updates[0]) == len(num_updates) and self._group is not None:
            common.update(hyperparameters(self._group, num_updates[0] + 1))
        else:
            self._set_apart(hyperparameters, num_updates)
        common[fields.HYPER_SCALE], common[fields.HYPER_CLIP] = 1.0, clip
        common[fields.HYPER_COW_RATIO], common[fields.HYPER_COW_LEAST] = cow_clip
        columns, written = self._columns, self._written
        for field, value in common.items():  # most are as they were
            if written.get(field) != value:
                columns[field].fill(value)
                written[field] = value

    def _set_apart(
        self, hyperparameters: Callable[[int, int], dict[int, float]], num_updates: Sequence[int]
    ) -> None:
        """Write the hyperparameters of tables that differ in them."""
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, kind in enumerate(zip(self.groups, num_updates, strict=True)):
            alike[kind].append(index)
        for (group, count), tables in alike.items():
            for field, value in hyperparameters(group, count + 1).items():
                self._hyper[tables, field] = value
                self._written.pop(field, None)

    def gradients(self) -> Gradients | None:
        """Join the pending gradients of the tables, and sort them by row."""
        plan = self._joined_plan()
        if plan is None:
            return None
        hyper = self._hyper if self._is_copied else None
        return row_update.sort_gradients(
            *(plan, self._blocks, self._layout, self._blocks_on_device), hyper, self._kept
        )

    def norm_power(self, norm_type: float) -> Tensor:
        """Return the sum of ``|g| ** norm_type`` of the rows' gradients, the largest if it is inf.

        Args:
            norm_type: Above 0; other than 2 only on the CPU, in plain torch.

        Returns:
            float64 [] on the tables' device.
        """
        if norm_type == 2:
            gradients = self.gradients()
            if gradients is not None:
                return row_update.squared_norm(gradients)
        elif (plan := self._joined_plan()) is not None:
            reduced = row_update.reduced_gradients(plan, self._blocks, self._layout).abs()
            if not reduced.numel():
                pass
            elif math.isinf(norm_type):
                return reduced.max()
            else:
                return reduced.pow(norm_type).sum()
        return torch.zeros((), dtype=torch.float64, device=self.device)

    def _joined_plan(self) -> embedding_bag.Plan | None:
        """Return one plan of all pending gradients of the tables; None without any."""
        self._note_blocks()
        self._kept = None
        parts = self._plans()
        if not parts:
            return None
        if self._kept is not None:
            return parts[0]
        plan = parts[0] if len(parts) == 1 else np.concatenate(parts)
        sizes = plan[:, fields.PLAN_NUM_IDS]
        ends = np.cumsum(sizes)
        if not len(ends) or not ends[-1]:
            return None
        plan[:, fields.PLAN_FIRST_ID] = ends - sizes
        return plan

    def scale_(self, gradients: Gradients, scale: Tensor) -> None:
        """Have the update multiply the gradients by ``scale``, float64 []."""
        if self._is_copied:
            row_update.scale_(gradients, scale)
        else:
            self._hyper[:, fields.HYPER_SCALE] = float(scale)
            self._written.clear()

    def _note_blocks(self) -> None:
        """Note the addresses and the numbering of the rows, unless they are known."""
        version = block_version()
        if self._moves == version:
            return
        rows = self._storages[0].rows
        addresses = [storage.rows.addresses for storage in self._storages]
        counts = np.array([part.size for part in addresses])
        bases = (np.cumsum(counts) - counts) << rows.block_shift
        self._base_of: dict[object, int] = dict(zip(self.tables, bases.tolist(), strict=True))
        self._feature_tables = ()
        marks = [storage.marks_address for storage in self._storages]
        self._hyper.view(np.int64)[:, fields.HYPER_MARKS // 2] = [
            address - base if address else 0 for address, base in zip(marks, bases, strict=True)
        ]
        self._blocks = np.empty((counts.sum(), 2), np.int64)
        self._blocks[:, 0] = np.concatenate(addresses)
        hypers = np.arange(len(self.tables)) * self._hyper.strides[0]
        if not self._is_copied:
            hypers += self._hyper.ctypes.data
        self._blocks[:, 1] = np.repeat(hypers, counts)
        self._blocks_on_device = (
            to_device_async(self._blocks, self.device) if self._is_copied else None
        )
        self._layout = RowLayout(
            rows.embedding_dim, rows.dtype, 4 * rows.row_words, rows.block_shift, self.device
        )
        self._moves = version  # last: after an interruption all of it is noted again

    def _plans(self) -> list[embedding_bag.Plan]:
        """Return the plans of the pending gradients, with the features of these tables only."""
        pending = self._pending
        first = pending[0]
        if len(first) == 1 and len(first[0].tables) == len(pending):
            record = first[0]
            if pending == [first] * len(pending):  # one lookup, each table once: the usual case
                record.check_unchanged(self.tables[0].name)
                if record.tables is not self._feature_tables:
                    self._feature_tables = ()
                    self._feature_bases = np.array(
                        [self._base_of[table] for table in record.tables], np.int64
                    )
                    self._feature_tables = record.tables
                record.plan[:, fields.PLAN_FLAT_BASE] = self._feature_bases
                self._kept = record.kept if record.rows.numel() else None
                return [record.plan]
        tables_of: dict[PendingGradient, set[object]] = defaultdict(set)
        for table, records in zip(self.tables, pending, strict=True):
            for record in records:
                record.check_unchanged(table.name)
                tables_of[record].add(table)
        return [self._plan_of(record, tables) for record, tables in tables_of.items()]

    def _plan_of(self, record: PendingGradient, tables: set[object]) -> embedding_bag.Plan:
        # A table may stand there twice, and one of another optimizer too.
        features = [i for i, table in enumerate(record.tables) if table in tables]
        plan = record.plan if len(features) == len(record.tables) else record.plan[features]
        plan[:, fields.PLAN_FLAT_BASE] = [self._base_of[record.tables[i]] for i in features]
        return plan

    def apply(self, gradients: Gradients | None, rule: int) -> None:
        """Update the rows, and use the gradients up, both or neither.

        Args:
            gradients: The sorted gradients; None if no row has one.
            rule: Update rule of ``ops.row_update``.
        """
        try:
            if gradients is not None:
                row_update.update_rows_(gradients, rule)
            self._finish()
        except BaseException:
            if gradients is not None and gradients.applied[0]:
                self._finish()
            raise

    def _finish(self) -> None:
        """Count the update and forget the gradients that it used; may be done twice."""
        for line, count in zip(self._fields, self._num_updates, strict=True):
            line[NUM_UPDATES] = count + 1
        for pending in self._pending:
            pending.clear()


__all__ = ["FusedUpdate"]
