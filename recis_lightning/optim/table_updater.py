"""Step of an optimizer of tables: add up gradients by row, and update each row once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from recis_lightning import compiler
from recis_lightning.arguments import check_bound, is_fake_mode, refuse_fake_mode
from recis_lightning.distributed import collectives
from recis_lightning.distributed.process_group import ProcessGroup
from recis_lightning.ops import layout as fields
from recis_lightning.ops import row_update
from recis_lightning.ops.row_update import Gradients
from recis_lightning.optim.clip_bounds import check_clip_bound, check_cow_clip
from recis_lightning.optim.first_step import announce_first_step
from recis_lightning.optim.fused_update import FusedUpdate
from recis_lightning.optim.table_groups import ADVICE, different, listed, name_of, read_tables
from recis_lightning.table.anchor import Anchor
from recis_lightning.table.gradient_exchange import exchange_gradients
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.lock import TableLock, distinct_locks, write
from recis_lightning.table.versions import layout_version


class TableUpdater:
    """Tables of one optimizer, and the fused updates that step them.

    Args:
        tables: All tables, each once.
        groups: For each table, the parameter group that it belongs to.
        clip_grad_norm: Scale all gradients down so that the norm of them together is at most this;
            None leaves them. Gradients of a row are summed first.
        clip_grad_value: Clamp every element of a row's gradient to at most this; None leaves them.
        cow_clip: CowClip's r and zeta; None leaves gradients.
    """

    num_steps_begun = 0  # by this object; those that failed included

    def __init__(
        self,
        tables: Sequence[HashTable],
        groups: Sequence[int],
        clip_grad_norm: float | None,
        clip_grad_value: float | None,
        cow_clip: tuple[float, float] | None = None,
    ) -> None:
        self.tables, self.groups = list(tables), list(groups)
        self._process_group = _shared_group(self.tables)
        self.clip_grad_norm, self.clip_grad_value = clip_grad_norm, clip_grad_value
        self.cow_clip = cow_clip
        self._layout_version = -1  # of the tables' storage, for which the following is valid
        self._locks: Sequence[TableLock] = ()
        self._pending = [table.pending for table in self.tables]  # always the same lists
        self._announced = False  # that it steps
        self._updates: list[FusedUpdate] = []  # of all tables
        self._given_away: set[HashTable] = set()
        self._last_waiting: list[bool] = []  # which tables had gradients, when not all had
        self._last_updates: list[FusedUpdate] = []
        self._is_scaled = False  # some pending gradients may have a factor

    def __reduce__(self) -> tuple[Any, ...]:
        bounds = (self.clip_grad_norm, self.clip_grad_value, self.cow_clip)
        return TableUpdater, (self.tables, self.groups, *bounds)

    @property
    def num_groups(self) -> int:
        """Number of parameter groups."""
        return max(self.groups, default=-1) + 1

    def add(self, tables: Sequence[HashTable]) -> None:
        """Take further tables, which are one more parameter group.

        Raises:
            ValueError: They are sharded over other ranks than those there are.
        """
        joined = [*self.tables, *tables]
        self._process_group = _shared_group(joined)
        self.groups += [self.num_groups] * len(tables)
        self.tables, self._pending = joined, [table.pending for table in joined]
        self._last_waiting = []
        self.forget_updates()

    def anchors_of(self, group: int) -> list[Anchor]:
        """Return the anchors of a parameter group's tables."""
        pairs = zip(self.tables, self.groups, strict=True)
        return [table.anchor for table, its_group in pairs if its_group == group]

    def forget_updates(self) -> None:
        """Make the fused updates anew in the next step."""
        self._layout_version = -1

    @compiler.disable  # kernels change rows
    def step(
        self,
        owner: Optimizer,
        rule: int,
        hyperparameters: Callable[[int, int], dict[int, float]],
    ) -> None:
        """Update every row that has a gradient, and use the gradients up.

        If it is interrupted, a table's rows are updated and its gradients gone, or neither.

        Args:
            owner: The optimizer that steps.
            rule: Update rule of ``ops.row_update``.
            hyperparameters: (parameter group, number of the update from 1) -> values by field.

        Raises:
            RuntimeError: A table with a gradient has another optimizer by now.
        """
        if is_fake_mode():
            refuse_fake_mode(type(owner).__name__)
        self.num_steps_begun += 1
        waiting = exchange_gradients(
            self.tables, lambda: f"steps {_describe(owner, self.tables)}", is_due=True
        )
        write(self._current_locks(), self._step, owner, rule, hyperparameters, waiting)

    def norm_power(self, owner: Optimizer, norm_type: float) -> Tensor:
        """Return the sum of ``|g| ** norm_type`` over all rows' gradients, the largest if inf.

        All ranks must call it together. Gradients of a row are summed first.

        Args:
            owner: The optimizer of the tables.
            norm_type: Above 0.

        Returns:
            float64 [] of this rank's rows, on the first table's device.

        Raises:
            RuntimeError: Some gradients were clipped and others came later.
            ValueError: Another ``norm_type`` than 2 for tables on a GPU.
        """
        device = self.tables[0].device
        if norm_type != 2 and any(table.device.type != "cpu" for table in self.tables):
            raise ValueError(
                f"norm_type: expected 2.0 for tables on a GPU, got {norm_type!r}; other norms "
                "are computed on the CPU"
            )

        waiting = exchange_gradients(
            self.tables,
            lambda: f"computes the norm of gradients of {_describe(owner, self.tables)}",
            is_due=True,
        )

        def powers_of_updates() -> tuple[Tensor | None, list[Tensor]]:
            updates = self._current_updates(owner, waiting)
            powers = [update.norm_power(norm_type).to(device) for update in updates]
            return self._scale_of_pending(), powers

        scale, powers = write(self._current_locks(), powers_of_updates)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for power in powers:
            total = torch.maximum(total, power) if math.isinf(norm_type) else total + power
        if scale is None:
            return total
        return total * (scale if math.isinf(norm_type) else scale**norm_type)

    def scale_pending_(self, scale: Tensor) -> None:
        """Multiply all pending gradients, when the next step uses them.

        Args:
            scale: float64 [].
        """
        write(self._current_locks(), self._scale_pending_, scale)

    def _scale_pending_(self, scale: Tensor) -> None:
        before = self._scale_of_pending()
        scale = scale if before is None else scale * before.to(scale.device)
        self._is_scaled = True
        for table in self.tables:
            for record in table.pending:
                record.scales[table] = scale

    def _scale_of_pending(self) -> Tensor | None:
        """Return the factor that all pending gradients have; None if they have none.

        Raises:
            RuntimeError: They have different ones.
        """
        if not self._is_scaled:
            return None
        scales = [record.scales.get(table) for table in self.tables for record in table.pending]
        if len(set(map(id, scales))) > 1:
            raise RuntimeError(
                "tables got gradients after theirs were clipped; clip once, after the last "
                "backward pass of a step"
            )
        return scales[0] if scales else None

    def _current_locks(self) -> Sequence[TableLock]:
        if self._layout_version != layout_version():
            self._locks = distinct_locks(table.lock for table in self.tables)
        return self._locks

    def _step(
        self,
        owner: Optimizer,
        rule: int,
        hyperparameters: Callable[[int, int], dict[int, float]],
        waiting: list[bool] | None,
    ) -> None:
        clip = math.inf if self.clip_grad_value is None else self.clip_grad_value
        updates = self._current_updates(owner, waiting)
        for update in updates:
            update.set_hyperparameters(hyperparameters, clip, self.cow_clip or (0.0, 0.0))
        if self.cow_clip is not None:
            rule += fields.COW_CLIP
        scale = self._scale_of_pending()
        sorted_gradients: dict[FusedUpdate, Gradients] = {}
        if self.clip_grad_norm is not None:
            scale, sorted_gradients = self._clip_norm(updates, self.clip_grad_norm, scale)
        for update in reversed(updates):  # what is sorted comes before what is sorted now
            gradients = sorted_gradients.pop(update, None) or update.gradients()
            if gradients is not None and scale is not None:
                update.scale_(gradients, scale)
            update.apply(gradients, rule)
        self._is_scaled = False

    def _current_updates(self, owner: Optimizer, waiting: list[bool] | None) -> list[FusedUpdate]:
        """Return the updates of the tables that have gradients on any rank.

        Args:
            owner: The optimizer that steps.
            waiting: For each table whether it has, as ``exchange_gradients`` returned it.
        """
        tables = self.tables
        version = layout_version()
        if self._layout_version != version:
            if not self._announced:
                self._announced = True
                announce_first_step(tables)
            self._given_away = {table for table in tables if table.optimizer is not owner}
            self._updates = self._fuse([True] * len(tables))
            self._last_waiting = []
            self._layout_version = version  # last: an interrupted step does all of it again
        # A table's update is one of all its shards, also of those that got no gradient.
        if waiting is None:
            pending = list(map(bool, self._pending))
            waiting = collectives.any_rank(pending, tables[0].device, self._process_group)
        if all(waiting) and not self._given_away:
            return self._updates
        if waiting == self._last_waiting:
            return self._last_updates
        for table, has_gradient in zip(tables, waiting, strict=True):
            if has_gradient and table in self._given_away:
                raise RuntimeError(
                    f"table {table.name!r} was given to another optimizer since, "
                    f"{type(table.optimizer).__name__}; a table has one optimizer at a time"
                )
        self._last_waiting, self._last_updates = waiting, self._fuse(waiting)
        return self._last_updates

    def _fuse(self, is_used: Sequence[bool]) -> list[FusedUpdate]:
        """Return the updates of the tables that are used: one for all with the same row layout."""
        alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for index, table in enumerate(self.tables):
            if is_used[index]:
                alike[str(table.device), table.dtype, table.embedding_dim].append(index)
        return [
            FusedUpdate([self.tables[i] for i in members], [self.groups[i] for i in members])
            for members in alike.values()
        ]

    def _clip_norm(
        self, updates: Sequence[FusedUpdate], max_norm: float, factor: Tensor | None
    ) -> tuple[Tensor, dict[FusedUpdate, Gradients]]:
        """Return the factor of all gradients, as ``torch.nn.utils.clip_grad_norm_`` has it.

        Args:
            updates: Of the tables.
            max_norm: Bound of the norm.
            factor: Factor that the gradients have already, float64 []; None: 1.

        Returns:
            float64 [], on the first table's device: the host does not wait for it. And the
            gradients that were sorted for it and need not be sorted again.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.tables[0].device)
        kept: dict[FusedUpdate, Gradients] = {}
        for update in updates:
            gradients = update.gradients()
            if gradients is not None:
                total += row_update.squared_norm(gradients).to(total.device)
                if not row_update.outlive_next_sort(update.device):
                    kept = {one: its for one, its in kept.items() if one.device != update.device}
                kept[update] = gradients
        norm = collectives.sum_over_ranks(total, self._process_group).sqrt()
        if factor is None:
            scale = max_norm / (norm + 1e-6)
            return torch.where(scale < 1, scale, 1.0), kept
        scale = max_norm / (norm * factor.to(norm.device) + 1e-6)
        return torch.where(scale < 1, scale, 1.0) * factor.to(norm.device), kept


def make_updater(
    tables: Iterable[HashTable] | Iterable[dict[str, Any]],
    lr: float,
    clip_grad_norm: float | None,
    clip_grad_value: float | None,
    cow_clip: Sequence[float] | None = None,
) -> tuple[TableUpdater, list[dict[str, Any]]]:
    """Return the updater of an optimizer's tables, and the optimizer's parameter groups.

    Args:
        tables: Tables, or dicts ``{"params": tables, "lr": ...}`` with their own hyperparameters.
        lr: Learning rate of groups that do not have their own.
        clip_grad_norm: As for ``TableUpdater``.
        clip_grad_value: As for ``TableUpdater``.
        cow_clip: As for ``TableUpdater``.

    Raises:
        TypeError: ``tables`` holds something that is no table.
        ValueError: A hyperparameter out of range, no tables, or a table twice.
    """
    check_bound("lr", lr)
    check_clip_bound("clip_grad_norm", clip_grad_norm)
    check_clip_bound("clip_grad_value", clip_grad_value)
    cow = check_cow_clip(cow_clip)
    given = listed(tables)
    if not given:
        raise ValueError(
            f"tables: expected at least one HashTable, got none; {ADVICE}: tables are not among "
            "module.parameters()"
        )
    if not isinstance(given[0], dict):
        given = [{"params": given}]
    members: list[HashTable] = []
    member_groups: list[int] = []
    param_groups: list[dict[str, Any]] = []
    for index, group in enumerate(given):
        if not isinstance(group, dict) or "params" not in group:
            raise TypeError(f"tables: expected dicts with 'params', got {group!r}")
        joined = read_tables(group["params"], members)
        members += joined
        member_groups += [index] * len(joined)
        name = different(name_of(joined), [other["name"] for other in param_groups])
        anchors = [table.anchor for table in joined]
        param_groups.append({"name": name, **group, "params": anchors})
    updater = TableUpdater(members, member_groups, clip_grad_norm, clip_grad_value, cow)
    return updater, param_groups


def _shared_group(tables: Sequence[HashTable]) -> ProcessGroup | None:
    """Return the process group of an optimizer's tables; ValueError if they have several."""
    for table in tables:
        if table.process_group is not tables[0].process_group:
            raise ValueError(
                f"process_group: tables {tables[0].name!r} and {table.name!r} of one optimizer are "
                "sharded over the ranks of different groups; give each group its own optimizer"
            )
    return tables[0].process_group if tables else None


def _describe(owner: Optimizer, tables: Sequence[HashTable]) -> str:
    return f"{type(owner).__name__} of tables {name_of(tables)}"


__all__ = ["TableUpdater", "make_updater"]
