"""What the optimizers of tables share.

A backward pass leaves gradients with the tables; ``step`` reduces them by row and updates each row
that has one, once. All tables of an optimizer with the same row layout are updated in one pass.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from recis_lightning.arguments import check_bound
from recis_lightning.hash_table import HashTable
from recis_lightning.ops import embedding_bag, row_update
from recis_lightning.ops.row_update import Gradients, RowLayout
from recis_lightning.pending_gradient import PendingGradient
from recis_lightning.sharding import any_rank, sum_over_ranks
from recis_lightning.table_storage import storage_epoch


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
        self._epoch = -1  # of the tables' storage, for which the next is right
        self._layouts: dict[HashTable, tuple[str, str, int]] = {}
        super().__init__(groups, defaults)
        for table in self.tables:
            table.optimizer = self
            table.set_slots(self.slots(table.embedding_dim), self.state_fill())

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
            table.drop_pending()

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
        calls = []
        pairs = zip(self.param_groups, self._tables, strict=True)
        # A table's update is one of all its shards, also of those that got no gradient.
        tables = self.tables
        found = any_rank([bool(table.pending) for table in tables], tables[0].device)
        waiting = {table for table, is_waiting in zip(tables, found, strict=True) if is_waiting}
        owned = {table: group for group, members in pairs for table in members if table in waiting}
        for table in owned:
            if table.optimizer is not self:
                raise RuntimeError(
                    f"table {table.name!r} was given to another optimizer since, "
                    f"{type(table.optimizer).__name__}; a table has one optimizer at a time"
                )
        for members in self._by_layout(owned):
            calls.append((members, self._hyper(members, owned)))
        scale = None if self.clip_grad_norm is None else self._norm_scale(calls)
        for members, hyper in calls:
            gradients = self._gradients(members, hyper, scale)
            if gradients is not None:
                row_update.update_rows_(gradients, self.rule)
        for table in owned:
            table.finish_update()
        return loss

    def _by_layout(self, tables: Iterable[HashTable]) -> list[list[HashTable]]:
        """Split tables into those whose rows look the same, so that one pass updates them."""
        if self._epoch != storage_epoch():
            self._epoch = storage_epoch()
            self._layouts = {
                table: (str(table.device), str(table.dtype), table.embedding_dim)
                for table in self.tables
            }
        split: dict[tuple[str, str, int], list[HashTable]] = defaultdict(list)
        for table in tables:
            split[self._layouts[table]].append(table)
        return list(split.values())

    def _hyper(
        self, members: list[HashTable], owned: dict[HashTable, dict[str, Any]]
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        hyper = np.ones((len(members), row_update.HYPER_SIZE), np.float32)
        numbers: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, table in enumerate(members):
            numbers[id(owned[table]), table.num_updates].append(number)
        for (_, num_updates), alike in numbers.items():
            fields = self.hyperparameters(owned[members[alike[0]]], num_updates + 1)
            for field, value in fields.items():
                hyper[alike, field] = value
        hyper[:, row_update.CLIP] = (
            math.inf if self.clip_grad_value is None else self.clip_grad_value
        )
        return hyper

    def _norm_scale(self, calls: list[tuple[list[HashTable], Any]]) -> Tensor:
        """Return what gradients are multiplied by, as ``torch.nn.utils.clip_grad_norm_`` has it.

        Returns:
            float64 [], on the first table's device: nobody waits for it.
        """
        assert self.clip_grad_norm is not None
        total = torch.zeros((), dtype=torch.float64, device=self.tables[0].device)
        for members, hyper in calls:
            gradients = self._gradients(members, hyper)
            if gradients is not None:
                total += row_update.squared_norm(gradients).to(total.device)
        scale = self.clip_grad_norm / (sum_over_ranks(total).sqrt() + 1e-6)
        return torch.where(scale < 1, scale, 1.0)

    def _gradients(
        self,
        members: list[HashTable],
        hyper: np.ndarray[Any, np.dtype[np.float32]],
        scale: Tensor | None = None,
    ) -> Gradients | None:
        """Join the pending gradients of tables of one layout, and sort them by row."""
        rows = members[0].rows
        records: dict[PendingGradient, set[HashTable]] = defaultdict(set)
        for table in members:
            for record in table.pending:
                records[record].add(table)
        addresses = [table.rows.addresses for table in members]
        counts = np.array([part.size for part in addresses])
        bases = ((np.cumsum(counts) - counts) << rows.block_shift).tolist()
        base_of: dict[object, int] = dict(zip(members, bases, strict=True))
        parts = []
        for record, waiting in records.items():
            part = record.plan
            if len(waiting) < len(record.tables):  # a table twice, or one of another optimizer
                mine = [i for i, table in enumerate(record.tables) if table in waiting]
                part = part[mine]
                part[:, embedding_bag.FLAT_BASE] = [base_of[record.tables[i]] for i in mine]
            else:
                part[:, embedding_bag.FLAT_BASE] = [base_of[table] for table in record.tables]
            parts.append(part)
        if not parts:
            return None
        plan = np.concatenate(parts)
        sizes = plan[:, embedding_bag.NUM_IDS]
        if not sizes.sum():
            return None
        plan[:, embedding_bag.FIRST_ID] = np.cumsum(sizes) - sizes
        blocks = np.empty((counts.sum(), 2), np.int64)
        blocks[:, 0] = np.concatenate(addresses)
        device, values = members[0].device, torch.from_numpy(hyper)
        if device.type != "cpu":
            # Kept until the next step: by then the kernels that read it are in the stream.
            values = self._hyper_on_device = values.pin_memory().to(device, non_blocking=True)
        if scale is not None:
            values[:, row_update.SCALE] = scale.to(device)
        address = values.data_ptr()
        blocks[:, 1] = address + np.repeat(np.arange(len(members)), counts) * hyper.strides[0]
        layout = RowLayout(
            rows.embedding_dim, rows.dtype, 4 * rows.row_words, rows.block_shift, device
        )
        return row_update.sort_gradients(plan, blocks, layout)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{key: vars(self)[key] for key in _KEPT}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._epoch, self._layouts = -1, {}
        if "_tables" in state:  # unpickled or copied: these are other tables
            for table in self.tables:
                table.optimizer = self
                table.set_slots(self.slots(table.embedding_dim), self.state_fill())


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
