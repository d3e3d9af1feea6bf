"""Hooks and profiler's region of an optimizer's step, at no cost where there are none.

torch wraps the ``step`` of every optimizer: the region that it opens for profilers takes tens of
microseconds, whether or not one runs, which is a good part of what a step of many tables takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer, optimizer

_Step = TypeVar("_Step", bound=Callable[..., Any])


def hooked(step: _Step) -> _Step:
    """Return the ``step`` of an optimizer's class as torch wraps it, by less where that does less.

    Args:
        step: The method. Its hooks are called before and after it, and a profiler that runs sees
            its region.
    """
    whole = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapped(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if torch._C._autograd._profiler_enabled() or _has_hooks(self):
            return whole(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    wrapped.hooked = True  # type: ignore[attr-defined] # torch wraps it no more
    return wrapped  # type: ignore[return-value]


def _has_hooks(self: Optimizer) -> bool:
    return bool(
        self._optimizer_step_pre_hooks
        or self._optimizer_step_post_hooks
        or optimizer._global_optimizer_pre_hooks
        or optimizer._global_optimizer_post_hooks
    )


__all__ = ["hooked"]
