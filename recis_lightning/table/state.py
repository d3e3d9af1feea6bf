"""State of a table, and its way out of and into a table.

A saved table is a dict of tensors and primitives, ids by row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from recis_lightning.distributed import collectives
from recis_lightning.distributed.process_group import ProcessGroup
from recis_lightning.ops import hash_index
from recis_lightning.ops.layout import NUM_UPDATES, STEP
from recis_lightning.table.evictor import Evictor
from recis_lightning.table.state_schema import (
    BEGUN_AS,
    KEYED_BY,
    REFERENCE,
    SCHEMA,
    check_state,
    row_columns,
    with_checksum,
)
from recis_lightning.table.storage import Storage

_log = logging.getLogger(__name__)


class StatefulTable(Protocol):
    """A table as its state knows it; ``HashTable`` is the only one.

    Attributes:
        storage: Ids, rows and columns.
        evictor: Pins.
        given_name: The table's name, None as long as it has none.
        default_name: Name by which new rows begin as long as it has none, None before they do.
        begun_as: Name by which new rows begin, if not by the table's.
        seed: Of new rows.
        needs_reshard: Whether rows came that no lookup brought: other ranks may own them.
    """

    storage: Storage
    evictor: Evictor
    given_name: str | None
    default_name: str | None
    begun_as: str | None
    seed: int
    needs_reshard: bool

    @property
    def name(self) -> str:
        """Name for errors."""

    @property
    def process_group(self) -> ProcessGroup | None:
        """Ranks that share the table; None for all."""

    @property
    def has_optimizer(self) -> bool:
        """Whether an optimizer has laid out the rows."""

    def ids_map(self) -> tuple[Tensor, Tensor]:
        """Return all ids and their rows, int64 [len] each, by row."""

    def clear(self) -> None:
        """Remove all ids, admission counts and pending gradients."""

    def undo(self) -> AbstractContextManager[object]:
        """Return a context in which a change of the table is undone if it does not succeed."""

    def set_key(self, name: str | None, seed: int, begun_as: str | None = None) -> None:
        """Name the table, and let new rows depend on name and seed, or on another name."""


ShardLoader = Callable[[Any, dict[str, Any]], None]

_shard_loader: ShardLoader | None = None


def set_shard_loader(loader: ShardLoader) -> None:
    """Register how a table loads its rank's part of a state, or the shards that it refers to.

    Args:
        loader: Called with a ``HashTable`` and the state.
    """
    global _shard_loader
    _shard_loader = loader


# ---- out of a table


def export(table: StatefulTable) -> dict[str, Any]:
    """Return everything a table holds, as tensors on the CPU and primitives, ids by row."""
    ids, rows = table.ids_map()
    weights, slots = table.storage.rows.read(rows)
    fields = saved_fields(table, rows)
    return {**fields, "ids": ids.cpu(), "weights": weights, "slots": slots}


def saved_fields(table: StatefulTable, rows: Tensor) -> dict[str, Any]:
    """Return all of a table's state but ids, weights and slots.

    Args:
        table: The table.
        rows: int64 [n], those whose columns to return.
    """
    storage, columns = table.storage, table.storage.columns
    state: dict[str, Any] = {
        "schema": SCHEMA,
        "name": table.default_name if table.given_name is None else table.given_name,
        "embedding_dim": storage.embedding_dim,
        "dtype": str(storage.dtype).removeprefix("torch."),
        "seed": table.seed,
        "step": storage.step,
        "num_updates": int(storage.header.fields[NUM_UPDATES]),
        "state_fill": storage.rows.state_fill,
    }
    if table.begun_as is not None:
        state[BEGUN_AS] = table.begun_as
    for name in ("last_seen", "counts"):
        if name in columns:
            state[name] = columns[name][rows].cpu()
    if "last_time" in columns:
        state["ages_us"] = storage.ages(rows).cpu()
    if table.evictor.pinned is not None:
        state["pinned_ids"] = table.evictor.pinned
    if storage.admission_counter is not None:
        group = table.process_group
        part = collectives.rank(group), collectives.world_size(group)
        state |= storage.admission_counter.state(*part)
    return state


def refuse_many_ranks(what: str) -> None:
    """Raise if several ranks run, each with a shard of every table."""
    if collectives.world_size() > 1:
        raise RuntimeError(
            f"{what} on {collectives.world_size()} ranks: each has a shard of the table, "
            "and this would keep rank 0's alone; Trainer(callbacks=[CheckpointHook()]) or "
            "recis_lightning.checkpoint.save keeps all"
        )


# ---- into a table


def check_and_load(table: StatefulTable, state: Any) -> None:
    """Replace everything a table holds by a state of whatever origin.

    Raises:
        ValueError: ``state`` is of another kind of table; the table is as it was.
    """
    if isinstance(state, dict) and (REFERENCE in state or collectives.world_size() > 1):
        assert _shard_loader is not None
        _shard_loader(table, state)
        return
    # Inserting finds ids that occur twice; sorting 2M of them takes 112 ms.
    check_state(state, table.name, table.storage.embedding_dim, distinct=("pending_ids",))
    load(table, state)


def load(table: StatefulTable, state: dict[str, Any]) -> None:
    """Replace everything a table holds by a whole state that was checked."""
    _replace(table, state, lambda storage: fill(storage, state))


def restore(
    table: StatefulTable,
    state: dict[str, Any],
    slots: dict[str, int],
    write: Callable[[Tensor], None],
) -> None:
    """Replace everything a table holds; if that fails on the way, the table is as it was.

    Until it succeeds, memory holds what there was and what comes.

    Args:
        table: The table.
        state: As ``saved_fields`` returned it, and the ``ids``, int64 [n], none twice.
        slots: Optimizer state of the rows: name -> float32 words.
        write: Called with the ids' rows, int64 [n]; writes weights and all slots to them.
    """
    _replace(table, state, lambda storage: _fill(storage, state, slots, write))


def _replace(
    table: StatefulTable, state: dict[str, Any], fill_storage: Callable[[Storage], None]
) -> None:
    storage, given = table.storage, table.given_name
    layout = (storage.rows.slots, storage.rows.state_fill) if table.has_optimizer else None
    with table.undo():
        begun_as = state.get(BEGUN_AS) if given in (None, state["name"]) else None
        table.set_key(state["name"] if given is None else given, state["seed"], begun_as)
        table.clear()
        fill_storage(storage)
        table.needs_reshard = True
        if "pinned_ids" in state:  # a state that knows of no pins leaves those there are
            table.evictor.pinned = state["pinned_ids"].unique()
        if layout is not None:  # the state's slots may not be those of this table's optimizer
            warn_of_other_slots(storage, layout[0], "the loaded state was")
            storage.set_slots(*layout)


def warn_of_other_slots(storage: Storage, wanted: Mapping[str, int], whose: str) -> None:
    """Say which optimizer state of a filled storage is about to be lost.

    Args:
        storage: The storage.
        wanted: State of the optimizer that comes: name -> float32 words.
        whose: What is another optimizer's, as "its state is".
    """
    held = storage.rows.slots
    lost = [name for name, words in held.items() if wanted.get(name) != words]
    if lost and len(storage):
        _log.warning(
            "Table %r: %s another optimizer's; %s is dropped, and %s starts anew",
            storage.name,
            whose,
            ", ".join(lost),
            ", ".join(wanted) or "nothing",
        )


def fill(storage: Storage, state: dict[str, Any]) -> None:
    """Fill an empty storage with a whole state; weights are converted to its dtype."""
    weights = state["weights"].to(storage.dtype).resolve_neg()
    slots = {name: slot.resolve_neg() for name, slot in state["slots"].items()}
    words = {name: slot.shape[1] for name, slot in slots.items()}
    _fill(storage, state, words, lambda rows: storage.rows.write(rows, weights, slots))


def _fill(
    storage: Storage,
    state: dict[str, Any],
    slots: dict[str, int],
    write: Callable[[Tensor], None],
) -> None:
    storage.set_slots(slots, state["state_fill"])
    fields, device = storage.header.fields, storage.device
    fields[STEP], fields[NUM_UPDATES] = state["step"], state["num_updates"]
    ids = state["ids"].to(device).contiguous().resolve_neg()
    segments = storage.segments(ids, insert=True)
    # No initial rows: all of each is written.
    rows, _ = hash_index.find_or_insert(segments, ids.numel(), [storage], [0], device)
    storage.num_loaded += len(storage)
    if len(storage) != ids.numel():
        raise ValueError(
            f"state of table {storage.name!r}: of {ids.numel()} ids, "
            f"{ids.numel() - len(storage)} occur twice"
        )
    write(rows)
    for name in ("last_seen", "counts"):
        if name in storage.columns and name in state:
            storage.columns[name][rows] = state[name].to(device)
    if "last_time" in storage.columns and "ages_us" in state:
        storage.set_ages(rows, state["ages_us"].to(device))
    if storage.admission_counter is not None:
        storage.admission_counter.load_state(state, storage.name)


# ---- pickling


def to_arrays(state: dict[str, Any]) -> dict[str, Any]:
    """Return ``state`` with NumPy arrays for tensors, as pickling takes it.

    A spawned process gets a tensor's place in shared memory, and these tensors are gone before it
    starts.
    """
    # NumPy has no bfloat16.
    return _converted({**state, "weights": state["weights"].float()}, Tensor, Tensor.numpy)


def from_arrays(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state that ``to_arrays`` was given; weights are float32."""
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
    "ShardLoader",
    "StatefulTable",
    "check_and_load",
    "check_state",
    "export",
    "fill",
    "from_arrays",
    "load",
    "refuse_many_ranks",
    "restore",
    "row_columns",
    "saved_fields",
    "set_shard_loader",
    "to_arrays",
    "warn_of_other_slots",
    "with_checksum",
]
