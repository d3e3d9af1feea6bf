"""Gradients that the caller still holds, and may overwrite before the update reads them.

An update reads gradients where they lie. Those that autograd made are nobody else's, and most are
views of one joint gradient, as of ``torch.cat``: a copy would cost a pass over all of them. But
``out.backward(g)`` hands over ``g`` itself or a view of it, and a hook may keep what it saw. They
have Python objects with more references than a backward pass has on its own, and are copied.
"""

from __future__ import annotations

import functools
from collections import Counter
from operator import attrgetter
from sys import getrefcount
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_base = attrgetter("_base")  # of a view, the tensor that it is a view of


class References(NamedTuple):
    """References to the Python objects of gradients.

    Attributes:
        gradients: To each gradient.
        bases: id of what some gradients are views of -> references to it beside theirs.
    """

    gradients: list[int]
    bases: dict[int, int]


def copy_held_(gradients: list[Tensor]) -> None:
    """Replace gradients that somebody else holds by copies.

    Args:
        gradients: A list that ``backward`` of a Function made of what it was given.
    """
    most, most_of_base = expected_references()
    references, bases = _count(gradients)
    held_bases = [base for base, count in bases.items() if count > most_of_base]
    if max(references, default=0) > most or held_bases:
        for index, count in enumerate(references):
            if count > most or id(gradients[index]._base) in held_bases:
                gradients[index] = gradients[index].clone()


def _count(gradients: list[Tensor]) -> References:
    counts, bases = list(map(getrefcount, gradients)), list(map(_base, gradients))
    if set(map(type, bases)) <= {NoneType}:
        return References(counts, {})
    num_views = Counter(map(id, bases))
    distinct = {id(base): base for base in bases if base is not None}
    return References(
        counts, {key: getrefcount(base) - num_views[key] for key, base in distinct.items()}
    )


class _Probe(torch.autograd.Function):
    """Counts references in a backward pass where nobody holds any."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, counted: list[References]) -> Tensor:
        ctx.counted = counted
        return anchor.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        tensors = list(gradients)
        ctx.counted.append(_count(tensors))
        return None, None


@functools.cache
def expected_references() -> tuple[int, int]:
    """Return how many references a backward pass itself has to a gradient, and to a view's base.

    They differ between versions of torch and Python, so they are counted once.
    """
    counted: list[References] = []
    with torch.inference_mode(False), torch.enable_grad():
        anchor = torch.zeros(2, 2, requires_grad=True)
        out = _Probe.apply(anchor, counted)  # type: ignore[no-untyped-call]
        (out.view(4) * 2).sum().backward()  # its gradient is a view
    ((references,), bases) = counted[0]
    return references, *bases.values()  # type: ignore[return-value]


__all__ = ["copy_held_", "expected_references"]
