"""Optimizers of tables, and one for Lightning out of a dense and a sparse one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from recis_lightning.arguments import check_bound
from recis_lightning.hash_table import HashTable
from recis_lightning.ops import row_update
from recis_lightning.sparse_optimizer import SparseOptimizer


class SparseSGD(SparseOptimizer):
    """``w = w - lr * g`` on the rows with a gradient, as ``torch.optim.SGD``.

    Args:
        tables: ``hash_tables(module)``, or dicts with their own ``lr``.
        lr: Learning rate.
        clip_grad_norm: See ``SparseOptimizer``.
        clip_grad_value: See ``SparseOptimizer``.
    """

    rule = row_update.SGD

    def __init__(
        self,
        tables: Iterable[HashTable] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
    ) -> None:
        super().__init__(tables, {"lr": lr}, clip_grad_norm, clip_grad_value)

    def slots(self, embedding_dim: int) -> dict[str, int]:
        """See ``SparseOptimizer``."""
        return {}

    def hyperparameters(self, group: dict[str, Any], num_updates: int) -> dict[int, float]:
        """See ``SparseOptimizer``."""
        return {row_update.LR: group["lr"]}


class SparseAdagrad(SparseOptimizer):
    """Adagrad on the rows with a gradient, as ``torch.optim.Adagrad`` on sparse gradients.

    Args:
        tables: ``hash_tables(module)``, or dicts with their own hyperparameters.
        lr: Learning rate.
        lr_decay: The rate of update number n is ``lr / (1 + (n - 1) * lr_decay)``.
        initial_accumulator_value: What the sum of squares starts from.
        eps: Added to its root.
        clip_grad_norm: See ``SparseOptimizer``.
        clip_grad_value: See ``SparseOptimizer``.

    Source: Duchi, Hazan and Singer, 2011.
    """

    rule = row_update.ADAGRAD

    def __init__(
        self,
        tables: Iterable[HashTable] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
    ) -> None:
        check_bound("lr_decay", lr_decay)
        check_bound("initial_accumulator_value", initial_accumulator_value)
        check_bound("eps", eps)
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        super().__init__(tables, defaults, clip_grad_norm, clip_grad_value)

    def slots(self, embedding_dim: int) -> dict[str, int]:
        """See ``SparseOptimizer``."""
        return {"sum": embedding_dim}

    def state_fill(self) -> float:
        """See ``SparseOptimizer``."""
        return float(self.defaults["initial_accumulator_value"])

    def hyperparameters(self, group: dict[str, Any], num_updates: int) -> dict[int, float]:
        """See ``SparseOptimizer``."""
        lr = group["lr"] / (1 + (num_updates - 1) * group["lr_decay"])
        return {row_update.LR: lr, row_update.EPS: group["eps"]}


class SparseRowwiseAdagrad(SparseAdagrad):
    """Adagrad with one sum a row: it adds up the mean square of the row's gradient.

    Arguments are those of ``SparseAdagrad``. Its state is 4 bytes a row, whatever the dim.

    Source: FBGEMM's ``EXACT_ROWWISE_ADAGRAD``.
    """

    rule = row_update.ROWWISE_ADAGRAD

    def slots(self, embedding_dim: int) -> dict[str, int]:
        """See ``SparseOptimizer``."""
        return {"sum": 1}


class SparseAdam(SparseOptimizer):
    """Adam on the rows with a gradient, as ``torch.optim.SparseAdam``.

    Rows without a gradient keep weights and moments. The bias correction counts the table's
    updates, and ``eps`` is added before it, as torch has it.

    Args:
        tables: ``hash_tables(module)``, or dicts with their own hyperparameters.
        lr: Learning rate.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        clip_grad_norm: See ``SparseOptimizer``.
        clip_grad_value: See ``SparseOptimizer``.

    Source: Kingma and Ba, 2015.
    """

    rule = row_update.ADAM

    def __init__(
        self,
        tables: Iterable[HashTable] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
    ) -> None:
        defaults = _adam_defaults(lr, betas, eps)
        super().__init__(tables, defaults, clip_grad_norm, clip_grad_value)

    def slots(self, embedding_dim: int) -> dict[str, int]:
        """See ``SparseOptimizer``."""
        return {"exp_avg": embedding_dim, "exp_avg_sq": embedding_dim}

    def hyperparameters(self, group: dict[str, Any], num_updates: int) -> dict[int, float]:
        """See ``SparseOptimizer``."""
        bias1, root = _bias_corrections(group, num_updates)
        return {
            row_update.LR: group["lr"] / bias1,
            row_update.EPS: group["eps"] / root,
            row_update.NEW_SHARE1: 1 - group["betas"][0],
            row_update.NEW_SHARE2: 1 - group["betas"][1],
            row_update.INV_SQRT_BIAS2: 1 / root,
        }


class SparseAdamW(SparseAdam):
    """AdamW on the rows with a gradient, as ``torch.optim.AdamW`` where every row has one.

    Weight decay touches the rows of the step only; ``eps`` is added after the bias correction.

    Args:
        tables: ``hash_tables(module)``, or dicts with their own hyperparameters.
        lr: Learning rate.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Weights are multiplied by ``1 - lr * weight_decay`` first.
        clip_grad_norm: See ``SparseOptimizer``.
        clip_grad_value: See ``SparseOptimizer``.

    Source: Loshchilov and Hutter, 2019.
    """

    def __init__(
        self,
        tables: Iterable[HashTable] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
    ) -> None:
        check_bound("weight_decay", weight_decay)
        defaults = {**_adam_defaults(lr, betas, eps), "weight_decay": weight_decay}
        SparseOptimizer.__init__(self, tables, defaults, clip_grad_norm, clip_grad_value)

    def hyperparameters(self, group: dict[str, Any], num_updates: int) -> dict[int, float]:
        """See ``SparseOptimizer``."""
        fields = super().hyperparameters(group, num_updates)
        fields[row_update.EPS] = group["eps"]
        fields[row_update.DECAY] = 1 - group["lr"] * group["weight_decay"]
        return fields


def _adam_defaults(lr: float, betas: Sequence[float], eps: float) -> dict[str, Any]:
    check_bound("betas[0]", betas[0], high=1.0)
    check_bound("betas[1]", betas[1], high=1.0)
    check_bound("eps", eps)
    return {"lr": lr, "betas": (betas[0], betas[1]), "eps": eps}


def _bias_corrections(group: dict[str, Any], num_updates: int) -> tuple[float, float]:
    """Return ``1 - beta1 ** n`` and the root of ``1 - beta2 ** n``."""
    beta1, beta2 = group["betas"]
    return 1 - beta1**num_updates, math.sqrt(1 - beta2**num_updates)


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
        super().__init__(groups, dict(dense.defaults))
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
            What ``closure`` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self._parts:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of all parts; rows and their state come with the module's state."""
        super().load_state_dict(state_dict)
        self._share()
        self.dense.__setstate__({"state": self.state, "param_groups": self.dense.param_groups})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the parts' groups at construction; refuse more, which no part would step."""
        if len(self.param_groups) == sum(len(part.param_groups) for part in self._parts):
            raise RuntimeError("add the group to the dense or sparse optimizer before joining them")
        super().add_param_group(param_group)


__all__ = [
    "SparseAdagrad",
    "SparseAdam",
    "SparseAdamW",
    "SparseDenseOptimizer",
    "SparseOptimizer",
    "SparseRowwiseAdagrad",
    "SparseSGD",
]
