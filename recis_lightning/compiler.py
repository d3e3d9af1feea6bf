"""``torch.compiler.disable``, without the second that importing torch._dynamo takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch._C._dynamo import eval_frame
from typing_extensions import ParamSpec

_P = ParamSpec("_P")
_R = TypeVar("_R")


def disable(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return a function that Dynamo neither traces nor inlines, nor any function that it calls.

    A traced caller breaks its graph there. Whether Dynamo is imported makes no difference to how
    often arguments are referred to within.

    Args:
        function: Function or method to be called as it is.

    Example:
        >>> @disable
        ... def answer():
        ...     return 42
        >>> answer()
        42

    Source: ``torch._dynamo.eval_frame.DisableContext``, whose marks a disabled function has.
    """

    @functools.wraps(function)
    def call_disabled(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        callback = eval_frame.set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            eval_frame.set_eval_frame(callback)

    _skip(call_disabled)
    marks: dict[str, Any] = {
        "_torchdynamo_disable": True,
        "_torchdynamo_disable_msg": None,
        "_torchdynamo_disable_recursive": True,
        "_torchdynamo_orig_callable": function,
        "_torchdynamo_wrapper_id": id(call_disabled),
    }
    call_disabled.__dict__.update(marks)
    return call_disabled


def _skip(function: Any) -> None:
    """Have frames of a function run as they are; those that they call are looked at."""
    code = function.__code__
    skip_code: Callable[[Any], None] | None = getattr(eval_frame, "skip_code", None)
    if skip_code is not None:  # torch 2.6
        skip_code(code)
        return
    action = eval_frame._FrameAction
    strategy = eval_frame._FrameExecStrategy(action.SKIP, action.DEFAULT)
    eval_frame.set_code_exec_strategy(code, strategy)


__all__ = ["disable"]
