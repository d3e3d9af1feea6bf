"""Type of the optimizers of tables.

A backward pass leaves gradients with the tables; ``step`` reduces them by row and updates each row
that has one, once. All tables of an optimizer with the same row layout are updated in one pass.
"""

from __future__ import annotations

import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from recis_lightning.compiler import disable
from recis_lightning.ops import layout as fields
from recis_lightning.ops import row_update
from recis_lightning.optim.clip_bounds import check_clip_bound, check_cow_clip
from recis_lightning.optim.grad_scaler import REFUSES_SCALER
from recis_lightning.optim.step_hooks import hooked
from recis_lightning.optim.table_groups import different, name_of, read_parameters
from recis_lightning.optim.table_updater import TableUpdater
from recis_lightning.table.anchor import Anchor
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.lock import write
from recis_lightning.table.state import warn_of_other_slots

# What torch's own method calls once it has imported torch._dynamo.
_add_param_group = disable(inspect.unwrap(Optimizer.add_param_group))


class SparseOptimizer(Optimizer, ABC):
    """Optimizer of tables; its heirs say what an update does to a row.

    A parameter group's ``params`` are the anchors of its tables, which have no elements: rows are
    no parameters, and Lightning's clipping leaves them alone, but its ``toggle_optimizer`` freezes
    and unfreezes them. Other entries (``lr`` first) are live: schedulers change them.
    """

    holds_anchors: ClassVar[bool] = True
    _step_supports_amp_scaling = REFUSES_SCALER

    _updater: TableUpdater  # made and owned by each heir

    @property
    @abstractmethod
    def rule(self) -> int:
        """Update rule of ``ops.row_update``."""

    @abstractmethod
    def slots(self, embedding_dim: int) -> dict[str, int]:
        """Return the state of a row: name -> float32 words."""

    @abstractmethod
    def state_fill(self) -> float:
        """Return the initial value of state."""

    @abstractmethod
    def hyperparameters(self, group: dict[str, Any], num_updates: int) -> dict[int, float]:
        """Return the fields that ``ops.row_update`` needs for a table's update number (from 1)."""

    @property
    def tables(self) -> list[HashTable]:
        """All tables of all groups."""
        return list(self._updater.tables)

    @property
    def num_steps_begun(self) -> int:
        """Steps that may have changed rows, those that failed included."""
        return self._updater.num_steps_begun

    @property
    def clip_grad_norm(self) -> float | None:
        """Bound of the norm of all gradients together."""
        return self._updater.clip_grad_norm

    @clip_grad_norm.setter
    def clip_grad_norm(self, bound: float | None) -> None:
        self._updater.clip_grad_norm = check_clip_bound("clip_grad_norm", bound)

    @property
    def clip_grad_value(self) -> float | None:
        """Bound of every element of a row's gradient."""
        return self._updater.clip_grad_value

    @clip_grad_value.setter
    def clip_grad_value(self, bound: float | None) -> None:
        self._updater.clip_grad_value = check_clip_bound("clip_grad_value", bound)

    @property
    def cow_clip(self) -> tuple[float, float] | None:
        """CowClip's r and zeta: bounds of the norm of each row's gradient.

        Set it between a step and the next backward pass: on several ranks, gradients have travelled
        with their numbers of ids, or without, once ``clip_grad_norm_`` has seen them.
        """
        return self._updater.cow_clip

    @cow_clip.setter
    def cow_clip(self, bounds: Sequence[float] | None) -> None:
        self._updater.cow_clip = check_cow_clip(bounds)

    def norm_power(self, norm_type: float) -> Tensor:
        """Return the sum of ``|g| ** norm_type`` over the rows' gradients, the largest if inf.

        Returns:
            float64 [] of this rank's rows. Used by ``clip_grad_norm_``.
        """
        return self._updater.norm_power(self, norm_type)

    def scale_pending_(self, scale: Tensor) -> None:
        """Multiply all pending gradients by ``scale``, float64 [], when the next step uses them."""
        self._updater.scale_pending_(scale)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of tables, which this optimizer trains from now on.

        Args:
            param_group: ``{"params": tables, "lr": ...}`` as for the constructor. Parameters of
                modules stand for their tables, as where Lightning unfreezes a module.

        Raises:
            TypeError: ``params`` holds something else than tables.
            ValueError: A table is in the optimizer already, or sharded over other ranks.
        """
        # torch's own would import its compiler, which takes a second.
        if len(self.param_groups) < self._updater.num_groups:  # one of the constructor's
            _add_param_group(self, param_group)
            return
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"param_group: expected a dict with 'params', got {param_group!r}")
        tables = read_parameters(param_group["params"], self._updater.tables)
        name = different(name_of(tables), [str(group.get("name")) for group in self.param_groups])
        anchors = [table.anchor for table in tables]
        self._updater.add(tables)
        _add_param_group(self, {"name": name, **param_group, "params": anchors})
        self._own_tables()

    def _own_tables(self) -> None:
        """Make this the optimizer of its tables, and lay out their rows for its state."""
        row_update.announce_rule(self.rule)
        for table in self._updater.tables:
            table.optimizer = self
            slots = self.slots(table.embedding_dim)
            warn_of_other_slots(table.storage, slots, "the state of its rows is")
            write([table.lock], table.storage.set_slots, slots, self.state_fill())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients that no step has used."""
        for table in self._updater.tables:
            table.pending.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the groups' hyperparameters; rows and their state are in the module's state."""
        state = super().state_dict()
        groups = [{**group, "params": []} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the groups' hyperparameters."""
        groups = with_anchors(state_dict["param_groups"], self.param_groups)
        super().load_state_dict({**state_dict, "param_groups": groups})

    @hooked
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every row that has a gradient, and use the gradients up.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            The loss that ``closure`` returned, or None.

        Raises:
            RuntimeError: A table with a gradient has another optimizer by now.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        is_recorded = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # torch.no_grad, as a decorator, takes 3 us
        try:
            self._updater.step(self, self.rule, self._hyperparameters_of)
        finally:
            torch._C._set_grad_enabled(is_recorded)
        return loss

    def _hyperparameters_of(self, group: int, num_updates: int) -> dict[int, float]:
        return self.hyperparameters(self.param_groups[group], num_updates)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_updater": self._updater}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # those of an older state may lack what was added since
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._updater.forget_updates()
        if "_updater" in state:  # unpickled or copied: these are other tables
            for index, group in enumerate(self.param_groups):
                group["params"] = self._updater.anchors_of(index)
            self._own_tables()


def with_decay(rule: int, groups: Sequence[dict[str, Any]]) -> int:
    """Return an update rule with weight decay in the gradient, if a group asks for it.

    Args:
        rule: Of ``ops.row_update``.
        groups: Parameter groups; their rule's fields have ``HYPER_WEIGHT_DECAY``.
    """
    is_decayed = any(group.get("weight_decay", 0) for group in groups)
    return rule + fields.COUPLED_DECAY if is_decayed else rule


def with_anchors(
    saved: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return saved groups with as many numbers in ``params`` as there are anchors in ours.

    Groups are saved without anchors, so that a model may gain tables, and so that files are those
    of a time when there were none.

    Args:
        saved: Groups of an optimizer's state.
        groups: The optimizer's; where they are not as many, ``load_state_dict`` will say so.
    """
    result = [dict(group) for group in saved]
    numbers = itertools.count(1 + max((n for group in saved for n in group["params"]), default=-1))
    for group, ours in zip(result, groups, strict=False):
        is_anchor = [isinstance(parameter, Anchor) for parameter in ours["params"]]
        if is_anchor and all(is_anchor):
            if not group["params"]:
                group["params"] = list(itertools.islice(numbers, len(is_anchor)))
            for name, value in ours.items():  # settings that came after the state was saved
                group.setdefault(name, value)
    return result


__all__ = ["SparseOptimizer", "with_anchors", "with_decay"]
