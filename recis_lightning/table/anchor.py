"""Anchor of a table: the parameter by which torch freezes a table and drops its gradients.

Rows are no parameters, so what goes through a module's parameters would pass tables by:
``requires_grad_``, Lightning's freezing and ``toggle_optimizer``, ``zero_grad``. An anchor has no
elements and stands for the rows of its table there. It is kept out of where it would do harm:
state dicts, optimizers of dense parameters, and the gradients that DDP reduces.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from itertools import compress
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from recis_lightning import compiler

_REQUIRES_GRAD: Any = torch._C.TensorBase.requires_grad  # torch's own descriptor
_BETWEEN = {__file__, compiler.__file__}  # frames between who reads a gradient and who is asked


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
        if pending and _is_asked_by_zero_grad():
            return PendingMark.of(pending, self)
        return None

    @grad.setter
    def grad(self, gradient: Tensor | None) -> None:
        if gradient is None and getattr(self, "pending", None):
            self.pending.clear()


@compiler.disable  # Dynamo cannot trace frames
def _is_asked_by_zero_grad() -> bool:
    """Return whether a function of that name, or what Dynamo made of it, reads ``grad``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename in _BETWEEN:
        frame = frame.f_back
    return frame is not None and "zero_grad" in frame.f_code.co_name


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


def keep_anchors_out() -> None:
    """From now on, keep anchors out of optimizers of dense parameters, and out of DDP.

    ``AdamW(model.parameters())`` must not drop the gradients of tables in its ``zero_grad``, let
    ``toggle_optimizer`` unfreeze them, or save groups of another size than before there were
    anchors. DDP would refuse a step whose loss leaves a table out; only where tables are all that
    a model has, it is given anchors, for it needs a parameter.
    """
    register_module_module_registration_hook(_leave_out_of_ddp)
    init, add_param_group = Optimizer.__init__, Optimizer.add_param_group

    @functools.wraps(init)
    def init_without_anchors(self: Optimizer, params: Any, *args: Any, **kwargs: Any) -> None:
        if not getattr(self, "holds_anchors", False):
            params = _without_anchors(params, type(self).__name__)
        init(self, params, *args, **kwargs)

    @functools.wraps(add_param_group)
    def add_without_anchors(self: Optimizer, param_group: dict[str, Any]) -> None:
        if not getattr(self, "holds_anchors", False):
            _drop_anchors(param_group)
        add_param_group(self, param_group)

    Optimizer.__init__ = init_without_anchors  # type: ignore[method-assign]
    Optimizer.add_param_group = add_without_anchors  # type: ignore[method-assign]


def _without_anchors(params: Any, optimizer: str) -> Any:
    """Return what an optimizer is given, without anchors; groups stay the same objects.

    Args:
        params: Of any form that torch takes.
        optimizer: Its name, for the error.

    Raises:
        ValueError: There are anchors alone.
    """
    if isinstance(params, Tensor):
        return params  # torch says what is wrong
    given = list(params)
    has_groups = bool(given) and isinstance(given[0], dict)
    groups = given if has_groups else [{"params": given}]
    entries = [entry for group in groups for entry in _entries_of(group)]
    if entries and all(map(_is_anchor, entries)):
        raise ValueError(
            f"params: expected parameters, got those of tables alone; {optimizer} cannot train "
            "rows, which are no parameters: use an optimizer of recis_lightning.optim, such as "
            "SparseAdamW(hash_tables(module), lr=...)"
        )
    for group in groups:
        _drop_anchors(group)
    return given if has_groups else groups[0]["params"]


def _drop_anchors(group: Any) -> None:
    entries = _entries_of(group)
    kept = [not _is_anchor(entry) for entry in entries]
    if all(kept):
        return
    group["params"] = list(compress(entries, kept))
    if "param_names" in group:
        group["param_names"] = list(compress(group["param_names"], kept))
    elif isinstance(entries[0], tuple):
        group["param_names"] = []  # torch wants all groups named, and reads the names of the rest


def _entries_of(group: Any) -> list[Any]:
    """Return the parameters of a group, or its pairs of name and parameter; none if torch raises.

    Those of an iterator are put in its place.
    """
    params = group.get("params") if isinstance(group, dict) else None
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, set) or not isinstance(params, Iterable):
        return []
    group["params"] = list(params)
    return list(group["params"])


def _is_anchor(entry: Any) -> bool:
    return isinstance(entry[-1] if isinstance(entry, tuple) and entry else entry, Anchor)


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


__all__ = ["Anchor", "PendingMark", "keep_anchors_out"]
