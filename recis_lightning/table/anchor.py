"""Anchor of a table: the parameter by which torch freezes a table and drops its gradients.

Rows are no parameters, so what goes through a module's parameters would pass tables by:
``requires_grad_``, Lightning's freezing and ``toggle_optimizer``, ``zero_grad``. An anchor has no
elements and stands for the rows of its table there. It is kept out of where it would do harm:
state dicts, optimizers of dense parameters, and the gradients that DDP reduces.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

_REQUIRES_GRAD: Any = torch._C.TensorBase.requires_grad  # torch's own descriptor


class Anchor(nn.Parameter):
    """Parameter without elements that stands for a table's rows.

    Args:
        data: Float32 [0].
        requires_grad: Whether lookups leave gradients.

    Attributes:
        pending: The table's pending gradients, the list itself.
        is_reduced: Whether DDP waits for this anchor in each backward pass.
        any_reduced: Whether DDP waits for any.
        num_changes: How often some anchor was frozen or unfrozen, for who remembers which were.
    """

    pending: list[Any]
    is_reduced: bool
    any_reduced: ClassVar[bool] = False
    num_changes: ClassVar[int] = 0

    @classmethod
    def of(cls, pending: list[Any], device: torch.device, requires_grad: bool) -> Anchor:
        """Return the anchor of the table that has these pending gradients."""
        with torch.inference_mode(False):  # what is made in inference mode never gets a gradient
            anchor = cls(torch.empty(0, device=device), requires_grad)
        anchor.pending, anchor.is_reduced = pending, False
        return anchor

    @property
    def requires_grad(self) -> bool:
        """Whether lookups leave gradients."""
        return bool(_REQUIRES_GRAD.__get__(self))

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        _REQUIRES_GRAD.__set__(self, value)
        Anchor.num_changes += 1

    @override
    def requires_grad_(self, requires_grad: bool = True) -> Anchor:
        self.requires_grad = requires_grad
        return self

    @property
    def grad(self) -> Tensor | None:
        """None: norms, clipping and whoever else reads gradients pass tables by.

        A ``zero_grad`` alone is told while something is pending, for it skips what has none.
        """
        pending = getattr(self, "pending", None)
        if pending and sys._getframe(1).f_code.co_name == "zero_grad":
            return PendingMark.of(pending, self)
        return None

    @grad.setter
    def grad(self, gradient: Tensor | None) -> None:
        if gradient is None and getattr(self, "pending", None):
            self.pending.clear()


class PendingMark(Tensor):
    """Gradient of an anchor, without elements: ``zero_`` drops the gradients that it stands for."""

    pending: list[Any]

    @classmethod
    def of(cls, pending: list[Any], anchor: Tensor) -> PendingMark:
        """Return the mark of a table's pending gradients."""
        mark = torch.empty(0, dtype=anchor.dtype, device=anchor.device).as_subclass(cls)
        mark.pending = pending
        return mark

    @override
    def zero_(self) -> Tensor:
        self.pending.clear()
        return self


def leaves_of(anchors: Sequence[Anchor]) -> list[Anchor]:
    """Return the anchors that autograd must know of a lookup, so that it runs its backward pass.

    One will do, and each costs a microsecond or two; but DDP waits for each that it reduces.
    """
    if Anchor.any_reduced:
        leaves = [anchor for anchor in anchors if anchor.requires_grad and anchor.is_reduced]
        if leaves:
            return leaves
    return [next(anchor for anchor in anchors if anchor.requires_grad)]


def keep_anchors_out() -> None:
    """From now on, keep anchors out of optimizers of dense parameters, and out of DDP.

    ``AdamW(model.parameters())`` must not drop the gradients of tables in its ``zero_grad``, let
    ``toggle_optimizer`` unfreeze them, or save groups of another size than before there were
    anchors. DDP would refuse a step whose loss leaves a table out; only where tables are all that
    a model has, it is given anchors, for it needs a parameter.
    """
    register_module_module_registration_hook(_leave_out_of_ddp)
    add_param_group = Optimizer.add_param_group

    @functools.wraps(add_param_group)
    def without_anchors(self: Optimizer, param_group: dict[str, Any]) -> None:
        add_param_group(self, param_group)
        if not getattr(self, "holds_anchors", False):
            _drop_anchors(self.param_groups[-1])

    Optimizer.add_param_group = without_anchors  # type: ignore[method-assign]


def _drop_anchors(group: dict[str, Any]) -> None:
    kept = [not isinstance(parameter, Anchor) for parameter in group["params"]]
    if not all(kept):
        for key in {"params", "param_names"} & group.keys():
            group[key] = [item for item, keep in zip(group[key], kept, strict=True) if keep]


def _leave_out_of_ddp(module: nn.Module, name: str, child: Any) -> None:
    if not isinstance(module, DistributedDataParallel) or name != "module":
        return
    anchors = {key: p for key, p in child.named_parameters() if isinstance(p, Anchor)}
    if _any_learns(p for p in module._module_parameters if not isinstance(p, Anchor)):
        module.parameters_to_ignore.update(anchors)
        module._module_parameters = [
            parameter
            for parameter in module._module_parameters
            if not isinstance(parameter, Anchor)
        ]
        return
    for anchor in anchors.values():
        anchor.is_reduced = Anchor.any_reduced = True


def _any_learns(parameters: Iterable[nn.Parameter]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)


__all__ = ["Anchor", "PendingMark", "keep_anchors_out", "leaves_of"]
