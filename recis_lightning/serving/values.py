"""Inputs and outputs of a served model, flat and as its forward takes and returns them.

A *spec* is a value in primitives: a tensor, a dict, a tuple or list, a ``Jagged`` or
``NestedJagged``, or None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recis_lightning.jagged import Jagged
from recis_lightning.nested_jagged import NestedJagged

DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8")
} | {"uint8": torch.uint8, "bool": torch.bool}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
RAGGED: dict[str, Any] = {"jagged": Jagged, "nested_jagged": NestedJagged}
_EDGES = {"jagged": "offsets", "nested_jagged": "outer_offsets"}  # one more than samples
_MAX_DEPTH = 16


def flatten(value: Any, where: str, tensors: list[Tensor]) -> dict[str, Any]:
    """Append the tensors of a value to a list, and return its spec.

    Args:
        value: Of tensors, dicts with str keys, tuples, lists, ``Jagged``, ``NestedJagged``
            and None.
        where: Its name, for errors.
        tensors: Get those of the value.

    Raises:
        TypeError: It holds something else (names where).

    Example:
        >>> tensors = []
        >>> flatten({"user": torch.zeros(3, 2)}, "batch", tensors), len(tensors)
        ({'dict': {'user': {'tensor': 0}}}, 1)
    """
    if value is None:
        return {"none": True}
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.dtype not in _NAMES:
            raise TypeError(
                f"{where}: expected a dense tensor of a usual dtype, got one of {value.layout} and "
                f"{value.dtype}"
            )
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    for kind, of_kind in RAGGED.items():
        if isinstance(value, of_kind):
            parts = zip(of_kind._fields, value, strict=True)
            return {kind: [flatten(part, f"{where}.{name}", tensors) for name, part in parts]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        items = {key: flatten(v, f"{where}[{key!r}]", tensors) for key, v in value.items()}
        return {"dict": items}
    if type(value) in (tuple, list):
        kind = type(value).__name__
        return {kind: [flatten(v, f"{where}[{i}]", tensors) for i, v in enumerate(value)]}
    raise TypeError(
        f"{where}: a served model takes and returns tensors, dicts of them, tuples, lists, Jagged, "
        f"NestedJagged and None, got {type(value).__name__}"
    )


def unflatten(spec: dict[str, Any], tensors: Sequence[Tensor]) -> Any:
    """Return the value of a spec and its tensors."""
    ((kind, content),) = spec.items()
    if kind == "none":
        return None
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unflatten(part, tensors) for key, part in content.items()}
    parts = [unflatten(part, tensors) for part in content]
    if kind in RAGGED:
        return RAGGED[kind](*parts)
    return tuple(parts) if kind == "tuple" else parts


def collect(value: Any, spec: dict[str, Any], where: str, tensors: dict[int, Any]) -> None:
    """Find the tensors of a value that a spec asks for, each by its number.

    Entries of a dict that the spec does not name are passed over.

    Raises:
        TypeError, ValueError: The value does not have what the spec asks for (names where).
    """
    ((kind, content),) = spec.items()
    if kind == "unused":
        return
    if kind == "none":
        if value is not None:
            raise ValueError(f"{where}: expected None, as in the example of the export")
    elif kind == "tensor":
        tensors[content] = value
    elif kind == "dict":
        if not isinstance(value, Mapping):
            raise TypeError(
                f"{where}: expected a dict with a value for each column, got {type(value).__name__}"
            )
        if missing := [key for key in content if key not in value and "unused" not in content[key]]:
            raise ValueError(f"{where}: missing {missing}")
        for key, part in content.items():
            collect(value.get(key), part, f"{where}[{key!r}]", tensors)
    else:
        if not isinstance(value, (tuple, list)) or len(value) != len(content):
            raise TypeError(
                f"{where}: expected a {kind} of {len(content)}, got {type(value).__name__}"
            )
        for i, part in enumerate(content):
            collect(value[i], part, f"{where}[{i}]", tensors)


def num_samples(named: Iterable[Sequence[Any]], tensors: Sequence[Tensor]) -> dict[str, int]:
    """Return the number of samples of each entry of some values, by its name.

    Args:
        named: Pairs of a name and the spec of its value.
        tensors: Of the specs.

    Example:
        >>> batch, found = {"user": torch.zeros(3, 2), "price": torch.zeros(2)}, []
        >>> spec = flatten(batch, "batch", found)
        >>> num_samples([("batch", spec)], found)
        {"batch['user']": 3, "batch['price']": 2}
    """
    sizes: dict[str, int] = {}
    for name, spec in named:
        ((kind, content),) = spec.items()
        if kind == "tensor" and tensors[content].dim():
            sizes[name] = tensors[content].shape[0]
        elif kind in RAGGED:
            edges = content[RAGGED[kind]._fields.index(_EDGES[kind])]
            if "tensor" in edges:
                sizes[name] = tensors[edges["tensor"]].shape[0] - 1
        elif isinstance(content, (dict, list)):
            items = content.items() if isinstance(content, dict) else enumerate(content)
            parts = ((f"{name}[{key!r}]", part) for key, part in items)
            sizes.update(num_samples(parts, tensors))
    return sizes


def is_of_sizes(error: RuntimeError, sizes: Mapping[str, int]) -> bool:
    """Return whether an error of torch is one of sizes, and entries differ in theirs."""
    return "size" in str(error).lower() and len(set(sizes.values())) > 1


def unequal(sizes: Mapping[str, int]) -> str:
    """Return what to say of entries whose sizes torch did not take together."""
    return f"entries of one batch have as many samples each, got {dict(sizes)}"


def without_unused(spec: dict[str, Any], used: Mapping[int, int]) -> dict[str, Any]:
    """Return a spec with the tensors that are used, numbered anew; the others are "unused".

    Example:
        >>> without_unused({"tuple": [{"tensor": 0}, {"tensor": 1}]}, {1: 0})
        {'tuple': [{'unused': True}, {'tensor': 0}]}
    """
    ((kind, content),) = spec.items()
    if kind == "tensor":
        return {"tensor": used[content]} if content in used else {"unused": True}
    if kind == "dict":
        return {"dict": {key: without_unused(part, used) for key, part in content.items()}}
    if isinstance(content, list):
        return {kind: [without_unused(part, used) for part in content]}
    return spec


def check_spec(spec: Any, num_tensors: int, depth: int = 0) -> None:
    """Raise ValueError unless a spec that was read is one, of that many tensors at most."""
    if depth > _MAX_DEPTH or not isinstance(spec, dict) or len(spec) != 1:
        raise ValueError("a value's description is damaged")
    ((kind, content),) = spec.items()
    if kind == "tensor":
        is_valid = type(content) is int and 0 <= content < num_tensors
    elif kind in ("none", "unused"):
        is_valid = content is True
    elif kind == "dict":
        is_valid = isinstance(content, dict)
    else:
        is_valid = kind in ("tuple", "list", *RAGGED) and isinstance(content, list)
        is_valid = is_valid and (kind not in RAGGED or len(content) == len(RAGGED[kind]._fields))
    if not is_valid:
        raise ValueError("a value's description is damaged")
    if isinstance(content, (dict, list)):
        for part in content.values() if isinstance(content, dict) else content:
            check_spec(part, num_tensors, depth + 1)


class TensorSpec:
    """Description of a tensor that a served model takes.

    Args:
        name: For errors.
        dtype: By name.
        shape: Size of each dimension; None for any.
    """

    def __init__(self, name: str, dtype: str, shape: Sequence[int | None]) -> None:
        self.name, self.dtype, self.shape = name, DTYPES[dtype], tuple(shape)

    @classmethod
    def from_state(cls, state: Any) -> TensorSpec:
        """Return the description of primitives; ValueError if they are damaged."""
        if not isinstance(state, dict) or set(state) != {"name", "dtype", "shape"}:
            raise ValueError("a tensor's description is damaged")
        name, dtype, shape = state["name"], state["dtype"], state["shape"]
        if not isinstance(name, str) or dtype not in DTYPES or not isinstance(shape, list):
            raise ValueError("a tensor's description is damaged")
        if not all(size is None or (type(size) is int and size >= 0) for size in shape):
            raise ValueError("a tensor's description is damaged")
        return cls(name, dtype, shape)

    def to_state(self) -> dict[str, Any]:
        """Return the description as primitives."""
        return {"name": self.name, "dtype": _NAMES[self.dtype], "shape": list(self.shape)}

    def take(self, tensor: Any) -> Tensor:
        """Return a tensor as the program takes it; int32 where it takes int64 is widened.

        Raises:
            TypeError, ValueError: It is no such tensor (names it).
        """
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{self.name}: expected a Tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{self.name}: expected a dense tensor, got one of {tensor.layout}")
        if tensor.dtype is not self.dtype:
            integers = {tensor.dtype, self.dtype}
            if integers != {torch.int32, torch.int64}:
                raise TypeError(f"{self.name}: expected {self.dtype}, got {tensor.dtype}")
            tensor = tensor.long()
        sizes = tuple(tensor.shape)
        if len(sizes) != len(self.shape) or any(
            wanted not in (None, size) for wanted, size in zip(self.shape, sizes, strict=True)
        ):
            shape = ["any" if size is None else size for size in self.shape]
            raise ValueError(f"{self.name}: expected the shape {shape}, got {list(sizes)}")
        # Each call of torch releases the interpreter's lock, for which other requests wait.
        taken: Tensor = tensor.detach() if tensor.requires_grad else tensor
        return taken


__all__ = [
    "DTYPES",
    "RAGGED",
    "TensorSpec",
    "check_spec",
    "collect",
    "flatten",
    "is_of_sizes",
    "num_samples",
    "unequal",
    "unflatten",
    "without_unused",
]
