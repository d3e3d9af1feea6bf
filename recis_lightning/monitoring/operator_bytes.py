"""Bytes that an operator of torch reads and writes, by its arguments and results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["bytes_of"]

_aten = torch.ops.aten
# They read some elements of their first tensor, as many as they return.
_PICKING = {
    _aten.embedding,
    _aten.gather,
    _aten.index,
    _aten.index_select,
    _aten.take,
}
# They change some elements of it, as many as their last tensor has.
_SCATTERING = {_aten.index_put_, _aten.index_add_, _aten.scatter_, _aten.scatter_add_}
# They move nothing.
_FREE = {
    _aten.alias,
    _aten.detach,
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten._unsafe_view,
    _aten.new_empty,
    _aten.new_empty_strided,
    _aten.resize_,
    _aten.set_,
}


def bytes_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the bytes of a call of an operator: each tensor read once, each result written once.

    Views move nothing, a dimension that is expanded counts once, and of a tensor changed in place
    all is read and written. What caches save is not known here.

    Args:
        func: The ``OpOverload``.
        args: Its arguments.
        kwargs: Those given by name.
        out: What it returned.

    Example:
        >>> x = torch.ones(10)
        >>> bytes_of(torch.ops.aten.add.Tensor, (x, x), {}, x + x)
        80
        >>> bytes_of(torch.ops.aten.view.default, (x, (5, 2)), {}, x.view(5, 2))
        0
    """
    packet = func.overloadpacket
    if packet in _FREE or func.is_view:
        return 0
    given, results = [*_tensors((args, kwargs))], [*_tensors(out)]
    if packet in _PICKING and given:
        return sum(map(_size, given[1:])) + 2 * sum(map(_size, results))
    if packet in _SCATTERING and given:
        return sum(map(_size, given[1:])) + 2 * _size(given[-1])
    read = {id(tensor): _size(tensor) for tensor in given}
    written = {id(tensor): _size(tensor) for tensor in (*results, *_changed(func, args, kwargs))}
    return sum(read.values()) + sum(written.values())


def _changed(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Yield the tensors that a call changes."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from _tensors(value)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in pytree.tree_leaves(values):
        if isinstance(value, Tensor):
            yield value


def _size(tensor: Tensor) -> int:
    """Return the bytes of a tensor's distinct elements; 0 where it has no strides."""
    if tensor.is_nested or tensor.layout is not torch.strided:
        return 0
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else min(length, 1)
    return int(size)
