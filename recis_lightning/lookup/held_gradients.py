"""Gradients that the caller still holds, and may overwrite before the update reads them.

An update reads gradients where they lie. Those that autograd made are nobody else's, and most are
views of one joint gradient, as of ``torch.cat``: a copy would cost a pass over all of them. But
``out.backward(g)`` hands over ``g`` itself or a view of it, and a hook may keep what it saw. They
have Python objects with more references than a backward pass has on its own, and are copied.
If ``g`` itself is a view, nobody need hold the tensor that it is a view of; so ``backward`` is
asked what it was given. It cannot be where a GPU's gradients have a thread of their own.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from itertools import compress
from operator import attrgetter
from sys import getrefcount
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import function

from recis_lightning import compiler

_Backward = TypeVar("_Backward", bound=Callable[..., Any])
_base = attrgetter("_base")  # of a view, the tensor that it is a view of
_NO_BASE = {id(None)}
_BACKWARD = torch.autograd.backward.__code__


def copy_held_(gradients: list[Tensor]) -> None:
    """Replace gradients that somebody else holds by copies.

    Args:
        gradients: A list that ``backward`` of a Function made of what it was given.
    """
    given = _given_memory()
    if given:
        # A loop's variable would be one more reference to the last of them.
        held = [gradient.untyped_storage().data_ptr() in given for gradient in gradients]
        for index in compress(range(len(gradients)), held):
            gradients[index] = gradients[index].clone()
    most, most_of_base = expected_references()
    if len(gradients) == 1:  # as of one embedding: with the fewest instructions
        count, base_count = _count(gradients)
        if count > most or base_count > most_of_base:
            gradients[0] = gradients[0].clone()
        return
    if max(map(getrefcount, gradients), default=0) > most:
        held = [getrefcount(gradient) > most + 1 for gradient in gradients]
        for index in compress(range(len(gradients)), held):
            gradients[index] = gradients[index].clone()
    bases = list(map(_base, gradients))
    distinct = set(map(id, bases))
    if distinct <= _NO_BASE:
        return
    if len(distinct) == 1:  # as of one joint gradient
        base = bases[0]
        # Those of ``bases`` and ``base``, where there is one of ``base`` in ``_count``.
        held_bases = {id(base)} if getrefcount(base) - len(bases) > most_of_base else set()
        del base
    else:
        held_bases = _held_bases(bases, most_of_base)
    if held_bases:
        for index, of in enumerate(bases):
            if id(of) in held_bases:
                gradients[index] = gradients[index].clone()


def once_differentiable(backward: _Backward) -> _Backward:
    """Return a Function's ``backward`` as torch's decorator of that name does, with less to do.

    A pass whose gradients nobody differentiates has no graph to keep out. Its gradients then have
    as many references within as by torch's own; in one that makes a graph they have more, and are
    copied.

    Args:
        backward: Takes the context and a gradient for each output.
    """
    guarded = function.once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            return guarded(ctx, *gradients)
        return backward(ctx, *gradients)

    return wrapper  # type: ignore[return-value]


def _given_memory() -> set[int]:
    """Return the addresses of the gradients that the caller of ``backward`` gave to it."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not _BACKWARD:
        frame = frame.f_back
    given = None if frame is None else frame.f_locals["grad_tensors"]
    if given is None:
        return set()
    tensors = [given] if isinstance(given, Tensor) else given
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor is not None}


def _count(gradients: list[Tensor]) -> tuple[int, int]:
    """Return the references to the one gradient of a list, and to its base, 0 if it has none."""
    base = gradients[0]._base
    return getrefcount(gradients[0]), 0 if base is None else getrefcount(base)


def _held_bases(bases: list[Tensor | None], most: int) -> set[int]:
    """Return the ids of the bases to which there are more references than those of a pass."""
    num_views = Counter(map(id, bases))
    distinct = {id(base): base for base in bases if base is not None}
    held = set()
    for key in distinct:  # not its items: they would be one reference more
        base = distinct[key]
        if getrefcount(base) - num_views[key] - 1 > most:  # 1 of ``distinct``
            held.add(key)
    return held


class _Probe(torch.autograd.Function):
    """Counts references in a backward pass where nobody holds any, called as ``LookupFunction``."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, counted: list[int]) -> Tensor:
        ctx.counted = counted
        return anchor.clone()

    @staticmethod
    @compiler.disable  # it has references, too
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        tensors = list(gradients)
        ctx.counted.extend(_count(tensors))
        return None, None


@functools.cache
def expected_references() -> tuple[int, int]:
    """Return how many references a backward pass itself has to a gradient, and to a view's base.

    They differ between versions of torch and Python, so they are counted once.
    """
    counted: list[int] = []
    with torch.inference_mode(False), torch.enable_grad():
        anchor = torch.zeros(2, 2, requires_grad=True, device="cpu")
        out = _Probe.apply(anchor, counted)  # type: ignore[no-untyped-call]
        (out.view(4) * 2).sum().backward()  # its gradient is a view
    of_gradient, of_base = counted
    return of_gradient, of_base


__all__ = ["copy_held_", "expected_references", "once_differentiable"]
