"""Schema of a table's saved state: its fields, their checks, and a checksum over all of them."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from recis_lightning.arguments import check_dtype

try:  # the same checksum, several times as fast, and of parts in threads
    from isal.isal_zlib import crc32, crc32_combine
except ImportError:
    from zlib import crc32

    crc32_combine = None  # type: ignore[assignment]

SCHEMA = 1
REFERENCE = "shards"  # in a state whose rows are in files of their own: the key of their names
CHECKSUM = "checksum"  # over all other fields; states of 0.1.0 have none
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "name": (str, type(None)),
    "embedding_dim": int,
    "dtype": str,
    "seed": int,
    "step": int,
    "num_updates": int,
    "state_fill": float,
}
_ROWS: dict[str, type | tuple[type, ...]] = {"weights": Tensor, "slots": dict}
# Fields that only some policies keep: ints, and tensors whose items belong to ids, with the field
# that holds these ids. When a state is spread over another number of ranks, an id takes its items
# with it; of ints the largest counts, and tensors that are not here are joined by their maximum.
_OPTIONAL_INTS = ("num_lookups",)
BEGUN_AS = "begun_as"  # name by which new rows begin, of a table that was named after it had some
SKETCH = ("sketch", "num_sketched")  # tensors of a sketch; not of single ids
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
_KNOWN = {
    "schema",
    "ids",
    CHECKSUM,
    BEGUN_AS,
    *_FIELDS,
    *_ROWS,
    *_OPTIONAL_INTS,
    *SKETCH,
    *KEYED_BY,
}
# Smallest and largest values; counters keep half of int64 to grow.
_RANGES = {
    "seed": (-(1 << 63), (1 << 64) - 1),
    "step": (-(1 << 62), 1 << 62),
    "num_updates": (0, 1 << 62),
    "num_lookups": (0, 1 << 62),
    "num_sketched": (0, 1 << 62),
    "counts": (0, (1 << 63) - 1),
    "pending_counts": (0, (1 << 32) - 1),
    "pending_lookups": (-(1 << 31), (1 << 31) - 1),
}
_PART_BYTES = 1 << 23  # of a checksum, on one thread
_SLOT_WORDS = 64  # the most float32 words of optimizer state for each weight of a row
DISTINCT = ("ids", "pending_ids")  # fields in which no id may occur twice

Shape = tuple[int, ...]


def row_columns(names: Container[str]) -> list[str]:
    """Pick the fields that hold one item a row, ``ids`` first, but not weights and slots."""
    return [key for key in KEYED_BY if KEYED_BY[key] == "ids" and key in names]


def is_field(key: str) -> bool:
    """Tell whether a state may have this field."""
    return key in _KNOWN


def check_state(
    state: Any, table: str, embedding_dim: int, distinct: Iterable[str] = DISTINCT
) -> None:
    """Raise unless ``state`` is whole, valid, undamaged, and of a table of ``embedding_dim``.

    Args:
        state: Of a saved table.
        table: The name of the table that would load it, for errors.
        embedding_dim: Its dim.
        distinct: Fields whose ids to compare with each other.

    Raises:
        ValueError: Names the table, the field, what was expected and what it is.
    """
    where = f"state of table {table!r}"
    check_structure(state, where, embedding_dim)
    check_checksum(state, where)
    check_distinct(state, where, distinct)


def check_structure(state: Any, where: str, embedding_dim: int) -> None:
    """Raise ValueError unless a state has all its fields, each of its type, shape and range."""
    _check_kinds(state, where, {**_FIELDS, **_ROWS, "ids": Tensor}, embedding_dim)
    check_fields(state, where, embedding_dim)
    slots = state["slots"]
    for key, tensor in {"weights": state["weights"], **slots}.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{where}: slots is not what it should be")
        _check_storage(where, key, tensor)
    shapes = {key: (tuple(slot.shape), slot.dtype) for key, slot in slots.items()}
    weights = tuple(state["weights"].shape), state["weights"].dtype
    check_rows(where, state["ids"].numel(), embedding_dim, state["dtype"], weights, shapes)


def check_primitives(state: Any, where: str, embedding_dim: int) -> None:
    """Raise ValueError unless the fields of a state that are no tensors are valid."""
    _check_kinds(state, where, _FIELDS, embedding_dim)
    _check_dtype(state["dtype"], where)
    if not math.isfinite(state["state_fill"]) or abs(state["state_fill"]) > 3.4e38:
        raise ValueError(f"{where}: expected a float32 state_fill, got {state['state_fill']}")
    for key in _OPTIONAL_INTS:
        if key in state and (not isinstance(state[key], int) or isinstance(state[key], bool)):
            raise ValueError(f"{where}: {key} is not what it should be")
    if not isinstance(state.get(BEGUN_AS, ""), str):
        raise ValueError(f"{where}: {BEGUN_AS} is not what it should be")
    for key, (low, high) in _RANGES.items():
        if isinstance(state.get(key), int) and not low <= state[key] <= high:
            raise ValueError(f"{where}: expected {key} from {low} to {high}, got {state[key]}")


def check_fields(state: Any, where: str, embedding_dim: int) -> None:
    """Raise ValueError unless all fields of a state but weights and slots are valid."""
    _check_kinds(state, where, {**_FIELDS, "ids": Tensor}, embedding_dim)
    check_primitives(state, where, embedding_dim)
    for key, along in KEYED_BY.items():
        if key in state:
            if not isinstance(state[key], Tensor) or not isinstance(state.get(along), Tensor):
                raise ValueError(f"{where}: {key} or {along} is not what it should be")
            _check_shape(where, key, _of(state[key]), ((state[along].numel(),), torch.int64))
            _check_storage(where, key, state[key])
    if "pending_ids" in state and not {"pending_counts", "pending_lookups"} <= state.keys():
        raise ValueError(f"{where}: pending_counts or pending_lookups is missing")
    if "sketch" in state:
        sketch = state["sketch"]
        if not isinstance(sketch, Tensor) or sketch.dim() != 2 or "num_sketched" not in state:
            raise ValueError(f"{where}: sketch is not what it should be")
        _check_shape(where, "sketch", _of(sketch), (tuple(sketch.shape), torch.uint8))
        _check_storage(where, "sketch", sketch)
        added = state["num_sketched"]
        if isinstance(added, Tensor):
            _check_shape(where, "num_sketched", _of(added), ((sketch.shape[0],), torch.int64))
            _check_storage(where, "num_sketched", added)
        elif not isinstance(added, int) or isinstance(added, bool):  # up to 0.1.0 an int
            raise ValueError(f"{where}: num_sketched is not what it should be")
    for key, (low, high) in _RANGES.items():
        if isinstance(state.get(key), Tensor) and state[key].numel():
            least, most = (int(end) for end in state[key].aminmax())
            if not low <= least <= most <= high:
                raise ValueError(
                    f"{where}: expected {key} from {low} to {high}, got {least} to {most}"
                )


def check_rows(
    where: str,
    num_rows: int,
    embedding_dim: int,
    dtype: str,
    weights: tuple[Shape, torch.dtype],
    slots: Mapping[str, tuple[Shape, torch.dtype]],
) -> None:
    """Raise ValueError unless weights and slots, by shape and dtype, are those of such rows."""
    _check_shape(where, "weights", weights, ((num_rows, embedding_dim), _check_dtype(dtype, where)))
    words = 0
    for key, (shape, kind) in slots.items():
        wanted = (num_rows, *(shape[1:2] or (embedding_dim,)))
        _check_shape(where, key, (shape, kind), (wanted, torch.float32))
        words += max(shape[1], 1)
    if words > _SLOT_WORDS * embedding_dim or any(shape[1] < 1 for shape, _ in slots.values()):
        raise ValueError(
            f"{where}: expected 1 to {_SLOT_WORDS * embedding_dim} words of optimizer state a row, "
            f"got { {key: shape[1] for key, (shape, _) in slots.items()} }"
        )


def check_distinct(state: Mapping[str, Any], where: str, fields: Iterable[str] = DISTINCT) -> None:
    """Raise ValueError if an id occurs twice in one of the fields."""
    for key in fields:
        if key in state:
            ids = np.sort(state[key].detach().cpu().numpy())
            if twice := int((ids[1:] == ids[:-1]).sum()):
                raise ValueError(f"{where}: of {len(ids)} {key}, {twice} occur twice")


def _check_kinds(
    state: Any, where: str, kinds: Mapping[str, type | tuple[type, ...]], embedding_dim: int
) -> None:
    """Raise ValueError unless required fields are there, of their types, and no unknown ones."""
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        got = state.get("schema") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{where}: expected schema {SCHEMA}, got {got!r}")
    for key, kind in kinds.items():
        value = state.get(key)
        if key not in state or not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{where}: {key} is missing or not what it should be")
    if state["embedding_dim"] != embedding_dim:
        raise ValueError(
            f"{where}: the table has embedding_dim={embedding_dim}, it has {state['embedding_dim']}"
        )
    if unknown := [key for key in state if key not in _KNOWN]:
        raise ValueError(
            f"{where}: it has unknown fields {unknown}: damaged, or of a later version"
        )


def _check_dtype(name: str, where: str) -> torch.dtype:
    """Return the dtype of a name; ValueError if it is none that weights may have."""
    try:
        return check_dtype(name)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _of(tensor: Tensor) -> tuple[Shape, torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def _check_shape(
    where: str, key: str, found: tuple[Shape, torch.dtype], wanted: tuple[Shape, torch.dtype]
) -> None:
    if found != wanted:
        raise ValueError(
            f"{where}: expected {key} of shape {wanted[0]} and dtype {wanted[1]}, "
            f"got {found[0]} and {found[1]}"
        )


def _check_storage(where: str, key: str, tensor: Tensor) -> None:
    """Raise ValueError unless a tensor has its items in memory, each once."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        kind = f"{type(tensor).__name__} of layout {tensor.layout}"
        raise ValueError(f"{where}: expected {key} as a dense tensor, got a {kind}")
    if tensor.device.type == "meta":
        raise ValueError(f"{where}: expected {key} with its items, got it on meta")
    if tensor.is_neg() or tensor.untyped_storage().nbytes() < tensor.nbytes:
        raise ValueError(f"{where}: expected {key} as plain items, got a view that has fewer")


# ---- checksum


def with_checksum(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with a checksum over all of its fields."""
    return {**state, CHECKSUM: _checksum(state)}


def check_checksum(state: Mapping[str, Any], where: str) -> None:
    """Raise ValueError if a state has a checksum, and it is not that of its fields."""
    if CHECKSUM in state and state[CHECKSUM] != (found := _checksum(state)):
        raise ValueError(
            f"{where}: it is damaged: its checksum is {found}, expected {state[CHECKSUM]!r} (a "
            f"state that was changed on purpose loads without its field {CHECKSUM!r})"
        )


def _checksum(state: Mapping[str, Any]) -> int:
    """Return the CRC-32 of a state's fields in the order of their names."""
    value = 0
    for key, field in sorted(_leaves(state), key=itemgetter(0)):
        if not isinstance(field, Tensor):
            value = crc32(f"{key}={field!r};".encode(), value)
            continue
        value = crc32(f"{key}:{field.dtype}{tuple(field.shape)};".encode(), value)
        if field.numel():
            # A dimension of one item may have any stride, and is contiguous all the same.
            flat = field.detach().cpu().contiguous().as_strided((field.numel(),), (1,))
            value = _crc32_of(flat.view(torch.uint8).numpy(), value)
    return value


def _crc32_of(data: npt.NDArray[np.uint8], value: int) -> int:
    """Return the CRC-32 of what has ``value``, and ``data`` behind it."""
    num_threads = torch.get_num_threads()
    if crc32_combine is None or num_threads == 1 or data.size < 2 * _PART_BYTES:
        return crc32(data, value)
    parts = [data[start : start + _PART_BYTES] for start in range(0, data.size, _PART_BYTES)]
    with ThreadPoolExecutor(num_threads, "recis_lightning") as threads:
        for part, of_part in zip(parts, threads.map(crc32, parts), strict=True):
            value = crc32_combine(value, of_part, part.size)
    return value


def _leaves(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, field in state.items():
        if isinstance(field, dict):
            yield from _leaves(field, f"{prefix}{key}.")
        elif key != CHECKSUM:
            yield prefix + key, field


__all__ = [
    "CHECKSUM",
    "DISTINCT",
    "KEYED_BY",
    "REFERENCE",
    "SCHEMA",
    "check_checksum",
    "check_distinct",
    "check_fields",
    "check_primitives",
    "check_rows",
    "check_state",
    "check_structure",
    "crc32",
    "is_field",
    "row_columns",
    "with_checksum",
]
