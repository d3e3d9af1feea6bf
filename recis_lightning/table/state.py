"""What the saved state of a table looks like: a dict of tensors and primitives, ids by row."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recis_lightning.arguments import check_dtype

SCHEMA = 1
REFERENCE = "shards"  # of a state whose rows are in files of their own: what names these
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "name": (str, type(None)),
    "embedding_dim": int,
    "dtype": str,
    "seed": int,
    "step": int,
    "num_updates": int,
    "state_fill": float,
    "ids": Tensor,
    "weights": Tensor,
    "slots": dict,
}
# What only some policies keep: ints, and tensors whose items belong to ids, with the field that
# holds these ids. When a state is spread over another number of ranks, an id takes its items with
# it; of ints the largest counts, and tensors that are not here are joined by their maximum.
_OPTIONAL_INTS = ("num_lookups", "num_sketched")
KEYED_BY = {
    "ids": "ids",
    "last_seen": "ids",
    "counts": "ids",
    "ages_us": "ids",
    "pinned_ids": "pinned_ids",
    "pending_ids": "pending_ids",
    "pending_counts": "pending_ids",
    "pending_lookups": "pending_ids",
}


def row_columns(names: Container[str]) -> list[str]:
    """Pick the fields that hold one item a row, ``ids`` first, but not weights and slots."""
    return [key for key in KEYED_BY if KEYED_BY[key] == "ids" and key in names]


def check_state(state: dict[str, Any], table: str, embedding_dim: int) -> None:
    """Raise unless ``state`` is whole and of a table of ``embedding_dim``.

    Args:
        state: What a table saved.
        table: The name of the table that would load it, for errors.
        embedding_dim: Its dim.

    Raises:
        ValueError: Names the table, the field, what was expected and what it is.
    """
    where = f"state of table {table!r}"
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        got = state.get("schema") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{where}: expected schema {SCHEMA}, got {got!r}")
    for key, kind in _FIELDS.items():
        if not isinstance(state.get(key), kind) or isinstance(state[key], bool):
            raise ValueError(f"{where}: {key} is missing or not what it should be")
    dim = embedding_dim
    if state["embedding_dim"] != dim:
        raise ValueError(
            f"{where}: the table has embedding_dim={dim}, it has {state['embedding_dim']}"
        )
    n, tensors = state["ids"].numel(), dict(state["slots"])
    wanted = {"ids": ((n,), torch.int64), "weights": ((n, dim), check_dtype(state["dtype"]))}
    wanted |= {key: ((n, *slot.shape[1:2]), torch.float32) for key, slot in tensors.items()}
    tensors |= {"ids": state["ids"], "weights": state["weights"]}
    for key, along in KEYED_BY.items():
        if key in state and key != "ids":
            if not isinstance(state[key], Tensor) or not isinstance(state.get(along), Tensor):
                raise ValueError(f"{where}: {key} or {along} is not what it should be")
            tensors[key], wanted[key] = state[key], ((state[along].numel(),), torch.int64)
    if "pending_ids" in state and not {"pending_counts", "pending_lookups"} <= state.keys():
        raise ValueError(f"{where}: pending_counts or pending_lookups is missing")
    if "sketch" in state:
        sketch = state["sketch"]
        if not isinstance(sketch, Tensor) or sketch.dim() != 2 or "num_sketched" not in state:
            raise ValueError(f"{where}: sketch is not what it should be")
        tensors["sketch"], wanted["sketch"] = sketch, (tuple(sketch.shape), torch.uint8)
    for key in _OPTIONAL_INTS:
        if key in state and (not isinstance(state[key], int) or isinstance(state[key], bool)):
            raise ValueError(f"{where}: {key} is not what it should be")
    for key, tensor in tensors.items():
        shape, dtype = wanted[key]
        if tuple(tensor.shape) != shape or tensor.dtype is not dtype:
            raise ValueError(
                f"{where}: expected {key} of shape {shape} and dtype {dtype}, "
                f"got {tuple(tensor.shape)} and {tensor.dtype}"
            )


def to_arrays(state: dict[str, Any]) -> dict[str, Any]:
    """Return ``state`` with NumPy arrays for tensors, as pickling takes it.

    Of a tensor a spawned process gets the place in shared memory, and these tensors are gone
    before it starts.
    """
    # NumPy has no bfloat16.
    return _converted({**state, "weights": state["weights"].float()}, Tensor, Tensor.numpy)


def from_arrays(state: dict[str, Any]) -> dict[str, Any]:
    """Return what ``to_arrays`` was given; weights are float32."""
    return _converted(state, np.ndarray, torch.from_numpy)


def _converted(state: dict[str, Any], kind: type, convert: Callable[[Any], Any]) -> dict[str, Any]:
    """Return ``state`` with every value of a kind converted, in dicts within it too."""
    return {
        key: _converted(value, kind, convert)
        if isinstance(value, dict)
        else convert(value)
        if isinstance(value, kind)
        else value
        for key, value in state.items()
    }


__all__ = [
    "KEYED_BY",
    "REFERENCE",
    "SCHEMA",
    "check_state",
    "from_arrays",
    "row_columns",
    "to_arrays",
]
