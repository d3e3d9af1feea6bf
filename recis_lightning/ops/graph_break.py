"""Functions that ``torch.compile`` calls and does not trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._compile import _disable_dynamo

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def graph_break(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Return a function that is called between the graphs of ``torch.compile``.

    As ``torch.compiler.disable``, but torch's compiler, whose import takes as long as torch's own,
    is imported by the first call and not by the decorator: a served model never calls one.
    """
    return _disable_dynamo(function)


__all__ = ["graph_break"]
