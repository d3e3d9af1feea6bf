"""What the optimizers of tables share.

A backward pass leaves gradients with the tables; ``step`` reduces them by row and updates each row
that has one, once. All tables of an optimizer with the same row layout are updated in one pass.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from recis_lightning.arguments import check_bound
from recis_lightning.distributed import collectives
from recis_lightning.ops import row_update
from recis_lightning.ops.row_update import Gradients
from recis_lightning.optim.fused_update import UpdatePass
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.versions import layout_version


class SparseOptimizer(Optimizer):
    """What the sparse optimizers share.

    A parameter group's ``params`` are empty: rows are no parameters, and Lightning's clipping and
    DDP leave them alone. Its other entries (``lr`` first) are live: schedulers change them.

    Args:
        tables: Tables (``hash_tables(module)``), or dicts ``{"params": tables, "lr": ...}`` with
            their own hyperparameters.
        defaults: Hyperparameters of groups that do not have their own.
        clip_grad_norm: Scale all gradients of this optimizer down so that the norm of them
            together is at most this; None leaves them. Gradients of a row are summed first.
        clip_grad_value: Clamp every element of a row's gradient to at most this; None leaves them.

    Raises:
        TypeError: ``tables`` holds something that is no table.
        ValueError: A hyperparameter out of range, no tables, or a table twice.
    """

    rule: ClassVar[int]
    group_name: ClassVar[str] = "sparse"

    def __init__(
        self,
        tables: Iterable[HashTable] | Iterable[dict[str, Any]],
        defaults: dict[str, Any],
        clip_grad_norm: float | None,
        clip_grad_value: float | None,
    ) -> None:
        check_bound("lr", defaults["lr"])
        for name, bound in (
            ("clip_grad_norm", clip_grad_norm),
            ("clip_grad_value", clip_grad_value),
        ):
            if bound is not None and not bound > 0:
                raise ValueError(f"{name}: expected a number > 0 or None, got {bound!r}")
        if isinstance(tables, (HashTable, torch.Tensor)):
            raise TypeError(f"tables: expected an iterable of HashTable, got {tables!r}")
        given: list[Any] = list(tables)
        if not given:
            raise ValueError("tables: expected at least one HashTable, got none")
        if not isinstance(given[0], dict):
            given = [{"params": given}]
        self.clip_grad_norm, self.clip_grad_value = clip_grad_norm, clip_grad_value
        self._tables: list[list[HashTable]] = []
        groups = []
        for number, group in enumerate(given):
            members = _check_tables(group["params"], self.tables)
            self._tables.append(members)
            name = self.group_name + (f"{number}" if len(given) > 1 else "")
            groups.append({"name": name, **group, "params": []})
        self._epoch = -1  # of the tables' storage, for which the passes are right
        self._last_found: list[bool] = []  # which tables had gradients, when not all had
        self._last_passes: list[UpdatePass] = []
        super().__init__(groups, defaults)
        for table in self.tables:
            table.optimizer = self
            table.storage.set_slots(self.slots(table.embedding_dim), self.state_fill())

    @property
    def tables(self) -> list[HashTable]:
        """All tables of all groups."""
        return [table for members in self._tables for table in members]

    def slots(self, embedding_dim: int) -> dict[str, int]:
        """Return the state of a row: name -> float32 words."""
        raise NotImplementedError

    def state_fill(self) -> float:
        """Return what state starts from."""
        return 0.0

    def hyperparameters(self, group: dict[str, Any], num_updates: int) -> dict[int, float]:
        """Return what ``ops.row_update`` needs, by field, for a table's update number (from 1)."""
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients that no step has used."""
        for table in self.tables:
            table.pending.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every row that has a gradient, and use the gradients up.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        clip = math.inf if self.clip_grad_value is None else self.clip_grad_value
        passes = self._passes()
        for tables in passes:
            tables.set_hyperparameters(self._hyperparameters_of, clip)
        scale, ready = None, dict[UpdatePass, Gradients]()
        if self.clip_grad_norm is not None:
            scale, ready = self._norm_scale(passes)
        for tables in reversed(passes):  # what is ready comes before what is sorted now
            gradients = ready.pop(tables, None) or tables.gradients()
            if gradients is not None:
                tables.send_hyperparameters(scale)
                row_update.update_rows_(gradients, self.rule)
        for tables in passes:
            tables.finish()
        return loss

    def _hyperparameters_of(self, group: int, num_updates: int) -> dict[int, float]:
        return self.hyperparameters(self.param_groups[group], num_updates)

    def _passes(self) -> list[UpdatePass]:
        """Split the tables that have gradients so that each part is updated in one pass."""
        if self._epoch != layout_version():
            self._epoch, self._all_tables = layout_version(), self.tables
            self._given_away = {table for table in self._all_tables if table.optimizer is not self}
            self._all_passes = self._split(self._all_tables)
            self._last_found = []
        # A table's update is one of all its shards, also of those that got no gradient.
        tables = self._all_tables
        found = collectives.any_rank([bool(table.pending) for table in tables], tables[0].device)
        if all(found) and not self._given_away:
            return self._all_passes
        if found == self._last_found:
            return self._last_passes
        waiting = [table for table, is_waiting in zip(tables, found, strict=True) if is_waiting]
        for table in waiting:
            if table in self._given_away:
                raise RuntimeError(
                    f"table {table.name!r} was given to another optimizer since, "
                    f"{type(table.optimizer).__name__}; a table has one optimizer at a time"
                )
        self._last_found, self._last_passes = found, self._split(waiting)
        return self._last_passes

    def _split(self, tables: list[HashTable]) -> list[UpdatePass]:
        group_of = {table: group for group, members in enumerate(self._tables) for table in members}
        alike: dict[tuple[Any, ...], list[HashTable]] = defaultdict(list)
        for table in tables:
            alike[str(table.device), table.dtype, table.embedding_dim].append(table)
        return [
            UpdatePass(members, [group_of[table] for table in members])
            for members in alike.values()
        ]

    def _norm_scale(self, passes: list[UpdatePass]) -> tuple[Tensor, dict[UpdatePass, Gradients]]:
        """Return what gradients are multiplied by, as ``torch.nn.utils.clip_grad_norm_`` has it.

        Returns:
            float64 [], on the first table's device: nobody waits for it. And the gradients that
            were sorted for it and need not be sorted again.
        """
        assert self.clip_grad_norm is not None
        total = torch.zeros((), dtype=torch.float64, device=self.tables[0].device)
        ready: dict[UpdatePass, Gradients] = {}
        for tables in passes:
            gradients = tables.gradients()
            if gradients is not None:
                total += row_update.squared_norm(gradients).to(total.device)
                if not row_update.outlive_next_sort(tables.device):
                    ready = {one: its for one, its in ready.items() if one.device != tables.device}
                ready[tables] = gradients
        scale = self.clip_grad_norm / (collectives.sum_over_ranks(total).sqrt() + 1e-6)
        return torch.where(scale < 1, scale, 1.0), ready

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{key: vars(self)[key] for key in _KEPT}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._epoch = -1
        if "_tables" in state:  # unpickled or copied: these are other tables
            for table in self.tables:
                table.optimizer = self
                table.storage.set_slots(self.slots(table.embedding_dim), self.state_fill())


_KEPT = ("_tables", "clip_grad_norm", "clip_grad_value")


def _check_tables(tables: Any, known: list[HashTable]) -> list[HashTable]:
    members = [tables] if isinstance(tables, HashTable) else list(tables)
    for table in members:
        if not isinstance(table, HashTable):
            raise TypeError(
                f"tables: expected HashTable, got {type(table).__name__}; pass "
                "hash_tables(module), not module.parameters()"
            )
        if table in known or members.count(table) > 1:
            raise ValueError(f"tables: table {table.name!r} is there twice")
    return members


__all__ = ["SparseOptimizer"]
