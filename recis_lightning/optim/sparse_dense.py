"""One optimizer for Lightning that joins a dense optimizer and sparse ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from itertools import compress
from operator import is_
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from recis_lightning.optim.grad_scaler import REFUSES_SCALER
from recis_lightning.optim.sparse_optimizer import SparseOptimizer, with_anchors
from recis_lightning.optim.step_hooks import hooked
from recis_lightning.optim.table_groups import different
from recis_lightning.table.anchor import Anchor


class SparseDenseOptimizer(Optimizer):
    """A dense and a sparse optimizer as one, for Lightning's automatic optimization.

    ``param_groups`` are the dense optimizer's and then the sparse ones', the same objects: learning
    rate schedulers and ``LearningRateMonitor`` see and drive both. Clipping by the Trainer
    (``gradient_clip_val``) finds the dense parameters only: ``ClipGradNormHook`` clips all
    gradients together, a sparse optimizer's ``clip_grad_norm`` or ``clip_grad_value`` its tables'.

    Args:
        dense: Any torch optimizer of the dense parameters.
        sparse: A sparse optimizer, or several.

    Raises:
        TypeError: An argument is no optimizer of its kind, or ``dense`` cannot step without a
            closure, as LBFGS.

    Example:
        >>> from recis_lightning import DynamicEmbedding, hash_tables
        >>> from recis_lightning.optim import SparseAdamW
        >>> user, tower = DynamicEmbedding(4, name="user"), torch.nn.Linear(4, 1)
        >>> optimizer = SparseDenseOptimizer(
        ...     torch.optim.AdamW(tower.parameters(), lr=1e-3),
        ...     SparseAdamW(hash_tables(user), lr=1e-2),
        ... )
        >>> tower(user(torch.tensor([3, 9]))).sum().backward()
        >>> optimizer.step()
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.001, 0.01]
    """

    holds_anchors: ClassVar[bool] = True  # in the groups of its sparse parts
    num_steps_begun = 0  # by this object: steps that may have changed weights
    _step_supports_amp_scaling = REFUSES_SCALER

    def __init__(
        self, dense: Optimizer, sparse: SparseOptimizer | Sequence[SparseOptimizer]
    ) -> None:
        if not isinstance(dense, Optimizer) or isinstance(dense, SparseOptimizer):
            raise TypeError(
                f"dense: expected a torch.optim.Optimizer of parameters, got {type(dense).__name__}"
            )
        if _needs_closure(dense):
            raise TypeError(
                f"dense: {type(dense).__name__} evaluates the loss several times in a step, and "
                "rows would not move in between; expected an optimizer that steps without a "
                "closure, such as torch.optim.AdamW"
            )
        self.dense = dense
        self.sparse = [sparse] if isinstance(sparse, SparseOptimizer) else list(sparse)
        for optimizer in self.sparse:
            if not isinstance(optimizer, SparseOptimizer):
                raise TypeError(
                    f"sparse: expected a sparse optimizer, got {type(optimizer).__name__}"
                )
        groups = [group for optimizer in self._parts for group in optimizer.param_groups]
        self._group_parts = [
            part for part, optimizer in enumerate(self._parts) for _ in optimizer.param_groups
        ]
        self._fit_in(groups, len(dense.param_groups))
        super().__init__(groups, {})
        self.defaults = dict(dense.defaults)
        self._share()

    @property
    def _parts(self) -> list[Optimizer]:
        return [self.dense, *self.sparse]

    def _fit_in(self, groups: Sequence[dict[str, Any]], first: int) -> None:
        """Give the groups of tables, from number ``first``, the names and entries of the whole."""
        _name_apart(groups, first)
        # The dense optimizer's defaults are not those of tables. Lightning's monitors read these
        # two of every group, if one has them: tables without have none of either.
        for group in groups[first:]:
            for name, none in (("betas", (0.0, 0.0)), ("weight_decay", 0.0)):
                if name in self.dense.defaults:
                    group.setdefault(name, none)

    def _share(self) -> None:
        """Make the parts use this optimizer's groups and state: the same objects."""
        # Groups that came later, by whatever way, are dense: Lightning's finetuning adds them, and
        # sets all groups at once when it resumes.
        self._group_parts += [0] * (len(self.param_groups) - len(self._group_parts))
        del self._group_parts[len(self.param_groups) :]
        for part, optimizer in enumerate(self._parts):
            of_part = [its_part == part for its_part in self._group_parts]
            optimizer.param_groups = list(compress(self.param_groups, of_part))
        self._shared_groups = list(self.param_groups)
        if self.dense.state and not self.state:
            self.state.update(self.dense.state)
        self.dense.state = self.state

    def __getstate__(self) -> dict[str, Any]:
        parts = {"dense": self.dense, "sparse": self.sparse, "_group_parts": self._group_parts}
        return {**super().__getstate__(), **parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "dense" in state:  # unpickled or copied: share what the parts have
            if "_group_parts" not in state:  # by 0.1.0
                counts = [len(part.param_groups) for part in self._parts]
                self._group_parts = [i for i, n in enumerate(counts) for _ in range(n)]
            self._share()

    def _share_new_groups(self) -> None:
        """Share groups again if somebody has set or appended some."""
        if sum(len(part.param_groups) for part in self._parts) > len(self._group_parts):
            self._adopt_groups()
        groups, shared = self.param_groups, self._shared_groups
        if len(groups) != len(shared) or not all(map(is_, groups, shared)):
            self._share()

    def _adopt_groups(self) -> None:
        """Take up the groups that were added to a part itself: it would lose them."""
        added = [
            (part, group)
            for part, optimizer in enumerate(self._parts)
            for group in optimizer.param_groups[self._group_parts.count(part) :]
        ]
        self._share()
        num_dense = len(self.param_groups) + sum(part == 0 for part, _ in added)  # come first
        for part, group in added:
            self.param_groups.append(group)
            self._group_parts.append(part)
        self._fit_in(self.param_groups, num_dense)
        self._share()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the dense gradients and forget the sparse ones."""
        self._share_new_groups()
        for optimizer in self._parts:
            optimizer.zero_grad(set_to_none)

    @hooked
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run ``closure``, then step the dense and the sparse optimizers.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            The loss that ``closure`` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._share_new_groups()
        self.num_steps_begun += 1
        for optimizer in self._parts:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the dense part, and the groups' hyperparameters of all."""
        self._share_new_groups()
        state = super().state_dict()
        groups = [
            group if part == 0 else {**group, "params": []}
            for group, part in zip(state["param_groups"], self._group_parts, strict=True)
        ]
        return {**state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of all parts; rows and their state are in the module's state."""
        self._share_new_groups()
        names = [group.get("name") for group in self.param_groups]
        groups = with_anchors(state_dict["param_groups"], self.param_groups)
        super().load_state_dict({**state_dict, "param_groups": groups})
        for name, group in zip(names, self.param_groups, strict=True):
            if name is not None:
                group["name"] = name  # that of another version may be there twice
        self._share()
        self.dense.__setstate__({"state": self.state, "param_groups": self.dense.param_groups})
        for optimizer in self.sparse:  # what an older state lacks
            optimizer.__setstate__({"param_groups": optimizer.param_groups})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to the dense optimizer.

        Args:
            param_group: As for any torch optimizer. Tables among its parameters that a sparse part
                has already, as those of a module that Lightning unfreezes, stay there.

        Raises:
            ValueError: No sparse part has a table; nothing was added.
        """
        if not hasattr(self, "_shared_groups"):  # the parts' groups, at construction
            super().add_param_group(param_group)
            return
        params = param_group["params"]
        given = [params] if isinstance(params, torch.Tensor) else list(params)
        known = {
            anchor for part in self.sparse for table in part.tables for anchor in [table.anchor]
        }
        named = [entry if isinstance(entry, tuple) else ("", entry) for entry in given]
        anchors = {parameter for _, parameter in named if isinstance(parameter, Anchor)}
        if not anchors <= known:
            raise ValueError(
                "param_group: has a table that no sparse optimizer has; give it to one, as in "
                "SparseAdamW(hash_tables(module)), when the optimizers are made"
            )
        kept = [
            entry
            for entry, (_, parameter) in zip(given, named, strict=True)
            if parameter not in known
        ]
        if not kept:
            return  # a group of nothing would only confuse a scheduler
        self._share_new_groups()
        # The dense part fills in its own defaults and checks; the group is the same object.
        group = {**param_group, "params": kept}
        self.dense.add_param_group(group)
        self.param_groups.append(self.dense.param_groups[-1])
        self._share()


def _needs_closure(optimizer: Optimizer) -> bool:
    closure = signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is Parameter.empty


def _name_apart(groups: Sequence[dict[str, Any]], num_dense: int) -> None:
    """Give groups of tables names that no other group has; Lightning calls the nameless pg1, ..."""
    taken = [group.get("name", f"pg{number}") for number, group in enumerate(groups, start=1)]
    for index in range(num_dense, len(groups)):
        others = taken[:index] + [f"pg{number + 1}" for number in range(len(groups))]
        groups[index]["name"] = taken[index] = different(taken[index], others)


__all__ = ["SparseDenseOptimizer"]
