"""One optimizer for Lightning that joins a dense optimizer and sparse ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from recis_lightning.optim.sparse_optimizer import SparseOptimizer
from recis_lightning.optim.table_updater import different


class SparseDenseOptimizer(Optimizer):
    """A dense and a sparse optimizer as one, for Lightning's automatic optimization.

    ``param_groups`` are the dense optimizer's and then the sparse ones', the same objects: learning
    rate schedulers and ``LearningRateMonitor`` see and drive both. Clipping by the Trainer
    (``gradient_clip_val``) finds the dense parameters only; for tables give the sparse optimizer
    ``clip_grad_norm`` or ``clip_grad_value``.

    Args:
        dense: Any torch optimizer of the dense parameters.
        sparse: A sparse optimizer, or several.

    Raises:
        TypeError: An argument is no optimizer of its kind.

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

    def __init__(
        self, dense: Optimizer, sparse: SparseOptimizer | Sequence[SparseOptimizer]
    ) -> None:
        if not isinstance(dense, Optimizer) or isinstance(dense, SparseOptimizer):
            raise TypeError(
                f"dense: expected a torch.optim.Optimizer of parameters, got {type(dense).__name__}"
            )
        self.dense = dense
        self.sparse = [sparse] if isinstance(sparse, SparseOptimizer) else list(sparse)
        for optimizer in self.sparse:
            if not isinstance(optimizer, SparseOptimizer):
                raise TypeError(
                    f"sparse: expected a sparse optimizer, got {type(optimizer).__name__}"
                )
        groups = [group for optimizer in self._parts for group in optimizer.param_groups]
        _name_apart(groups, len(dense.param_groups))
        # The dense optimizer's defaults are not those of tables. Lightning's monitors read these
        # two of every group, if one has them: tables without have none of either.
        for group in groups[len(dense.param_groups) :]:
            for name, none in (("betas", (0.0, 0.0)), ("weight_decay", 0.0)):
                if name in dense.defaults:
                    group.setdefault(name, none)
        super().__init__(groups, {})
        self.defaults = dict(dense.defaults)
        self._share()

    @property
    def _parts(self) -> list[Optimizer]:
        return [self.dense, *self.sparse]

    def _share(self) -> None:
        """Make the parts use this optimizer's groups and state: the same objects."""
        start = 0
        for optimizer in self._parts:
            end = start + len(optimizer.param_groups)
            optimizer.param_groups = self.param_groups[start:end]
            start = end
        if self.dense.state and not self.state:
            self.state.update(self.dense.state)
        self.dense.state = self.state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "dense": self.dense, "sparse": self.sparse}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "dense" in state:  # unpickled or copied: share what the parts have
            self._share()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the dense gradients and forget the sparse ones."""
        for optimizer in self._parts:
            optimizer.zero_grad(set_to_none)

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
        for optimizer in self._parts:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of all parts; rows and their state are in the module's state."""
        names = [group.get("name") for group in self.param_groups]
        super().load_state_dict(state_dict)
        for name, group in zip(names, self.param_groups, strict=True):
            if name is not None:
                group["name"] = name  # that of another version may be there twice
        self._share()
        self.dense.__setstate__({"state": self.state, "param_groups": self.dense.param_groups})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the parts' groups at construction; refuse more, which no part would step."""
        if len(self.param_groups) == sum(len(part.param_groups) for part in self._parts):
            raise RuntimeError("add the group to the dense or sparse optimizer before joining them")
        super().add_param_group(param_group)


def _name_apart(groups: Sequence[dict[str, Any]], num_dense: int) -> None:
    """Give groups of tables names that no other group has; Lightning calls the nameless pg1, ..."""
    taken = [group.get("name", f"pg{number}") for number, group in enumerate(groups, start=1)]
    for index in range(num_dense, len(groups)):
        others = taken[:index] + [f"pg{number + 1}" for number in range(len(groups))]
        groups[index]["name"] = taken[index] = different(taken[index], others)


__all__ = ["SparseDenseOptimizer"]
