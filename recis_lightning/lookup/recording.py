"""Features of a lookup that ``torch.export`` or ``torch.compile`` records, read for the operator.

This code is traced, as a model's own is: shapes may be symbols, and values are not known.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from recis_lightning.jagged import Jagged
from recis_lightning.lookup.named_tables import key_of
from recis_lightning.lookup.operator import RecordedFeature
from recis_lightning.nested_jagged import NestedJagged
from recis_lightning.table.hash_table import HashTable

_INTEGERS = (torch.int64, torch.int32)
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def is_recordable(feature: Any) -> bool:
    """Return whether a feature is of a kind that a recorded program takes.

    The others (nested tensors, weights that ask for a gradient where no program is exported) are
    looked up outside of what ``torch.compile`` compiles.
    """
    if isinstance(feature, Tensor):
        return not feature.is_nested
    if isinstance(feature, NestedJagged):
        feature = (feature.values, feature.offsets, feature.weights)
    if not isinstance(feature, (tuple, list)) or len(feature) not in (2, 3):
        return False
    weights = feature[-1]
    if not isinstance(weights, Tensor) or (len(feature) == 2 and not weights.is_floating_point()):
        return weights is None
    return is_exporting() or not (torch.is_grad_enabled() and weights.requires_grad)


def read(
    feature: Any,
    name: str,
    table: HashTable,
    mode: str,
    padding_idx: int | None,
    tile_len: int = 0,
    use_weights: bool = True,
) -> tuple[RecordedFeature, tuple[Any, ...] | None]:
    """Read one feature, of which ``is_recordable`` is true.

    Args:
        feature: ids, (ids, weights), ``Jagged``, as a tuple too, or ``NestedJagged``.
        name: The feature's name, for errors.
        table: The table that has its rows.
        mode: As for ``lookup.features.Feature``, like all that follow.
        padding_idx: An id that reads as zeros, or None.
        tile_len: Rows of a bag for "tile".
        use_weights: Whether weights count.

    Returns:
        The feature, and the shape of its ids as given; None if it is ragged.

    Raises:
        TypeError, ValueError: Its dtypes or shapes do not fit.
    """
    offsets = weights = shape = None
    if isinstance(feature, NestedJagged):
        feature = (feature.values, feature.offsets, feature.weights)
    if isinstance(feature, Tensor):
        ids = _as_ids(feature, name)
    elif not isinstance(feature, (tuple, list)):
        raise TypeError(f"{name}: expected a Tensor or Jagged, got {type(feature).__name__}")
    elif len(feature) == 2:
        ids, weights = _as_ids(feature[0], name), feature[1]
    else:
        ids, offsets = _as_ids(feature[0], f"{name}.values"), feature[1]
        offsets, weights = _as_ids(offsets, f"{name}.offsets"), feature[2]
        if ids.dim() != 1 or offsets.dim() != 1:
            raise ValueError(f"{name}: expected values [N] and offsets [B + 1]")
    if weights is not None and use_weights:
        if not weights.is_floating_point():
            raise TypeError(f"{name}: expected weights of a floating-point dtype")
        weights = weights.detach().float().reshape(ids.shape)
    else:
        weights = None
    if offsets is None:
        shape = tuple(ids.shape)
        ids = _flat(ids, mode)
        weights = None if weights is None else _flat(weights, mode)
    dtype = _DTYPE_NAMES[table.dtype]
    key = key_of(table, is_exporting())
    recorded = RecordedFeature(
        *(ids, offsets, weights, key, table.embedding_dim, dtype, mode, tile_len, padding_idx)
    )
    return recorded, shape


def refuse(features: Any, names: Collection[str], made: Mapping[str, str]) -> NoReturn:
    """Raise because an exported program cannot have the lookup of an engine.

    Args:
        features: As they were given.
        names: The engine's.
        made: Feature -> what makes its output of its rows, of those where something does.

    Raises:
        TypeError, ValueError: Always; names the feature, and says what is wrong with it.
    """
    for name, what in made.items():
        refuse_output(name, what)
    if not isinstance(features, dict):
        kind = type(features).__name__
        raise TypeError(f"features: an exported program takes a dict of them, got {kind}")
    given = [name for name in names if name in features]
    for name in given:
        if not is_recordable(features[name]):
            value = features[name]
            is_nested = isinstance(value, Tensor) and value.is_nested
            kind = "a nested tensor" if is_nested else type(value).__name__
            raise TypeError(
                f"{name}: an exported program takes ids, (ids, weights), Jagged and NestedJagged, "
                f"got {kind}"
            )
    missing = [name for name in names if name not in features]
    unknown = [key for key in features if key not in names]
    raise ValueError(f"features: missing {missing}, unknown {unknown}")


def refuse_output(name: str, what: str) -> NoReturn:
    """Raise because an exported program cannot make a feature's output.

    Args:
        name: The feature's.
        what: Makes it, such as "mode 'unique'".
    """
    raise ValueError(
        f"{name}: {what} is not for an exported program, whose lookups have the modes 'none', "
        "'sum', 'mean' and 'tile'; use mode 'none', and have the model's forward do the rest"
    )


def shaped(rows: Tensor, feature: Any, shape: tuple[Any, ...] | None, mode: str) -> Any:
    """Return a feature's output in the shape that a lookup gives it.

    Args:
        rows: [n or B, width], from the operator.
        feature: The feature as given.
        shape: From ``read``.
        mode: The feature's.
    """
    if isinstance(feature, NestedJagged):
        outer = _as_ids(feature.outer_offsets, "outer_offsets")
        if mode == "none":
            return NestedJagged(rows, feature.offsets, outer)
        return Jagged(rows, outer)
    if mode != "none":
        if shape is None or len(shape) < 3:
            return rows
        return rows.reshape(*shape[:-1], rows.shape[1])
    if shape is None:
        return Jagged(rows, feature[1])
    return rows if len(shape) == 1 else rows.reshape(*shape, rows.shape[1])


def _as_ids(ids: Any, name: str) -> Tensor:
    if not isinstance(ids, Tensor) or ids.dtype not in _INTEGERS:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name}: expected a Tensor of int64 or int32, got {got}")
    return ids.long()


def _flat(values: Tensor, mode: str) -> Tensor:
    """Return ids or weights as the operator takes them: a value a row, or bags of one length."""
    if mode == "none" or values.dim() < 2:
        return values.reshape(-1)
    return values.reshape(-1, values.shape[-1])


def is_exporting() -> bool:
    """Return whether what runs is recorded for an exported program."""
    return torch.compiler.is_exporting()


__all__ = ["is_exporting", "is_recordable", "read", "refuse", "refuse_output", "shaped"]
