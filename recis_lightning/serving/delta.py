"""Delta: what changed in a model's tables since a mark, and the protocol of what takes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from recis_lightning.checkpoint.writer import tables_by_name
from recis_lightning.table.change_mark import ChangeMark, Changes
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.lock import distinct_locks, write
from recis_lightning.table.state import KEYED_BY, saved_fields


@dataclass(frozen=True)
class TableState:
    """State of a table beside its weights, as far as a delta has it.

    Attributes:
        fields: Step, number of updates and the like, which a saved table has.
        by_id: Columns of policies, int64 [n], in the order of the delta's ids: "last_seen",
            "counts", and "last_time" in microseconds of the table's clock.
        others: Pins and admission counts, all of them.
        slots: Optimizer state of the ids, float32 [n, words].
        now_us: The table's clock.
    """

    fields: dict[str, Any]
    by_id: dict[str, Tensor]
    others: dict[str, Tensor]
    slots: dict[str, Tensor]
    now_us: int


@dataclass(frozen=True)
class TableDelta:
    """Changes of one table; on several ranks, of this rank's shard. All tensors are on the CPU.

    Attributes:
        name: The table's.
        dtype: Of its weights, by name.
        is_whole: Whether these are all its rows: what was before counts no more.
        ids: int64 [n], new and changed ones.
        weights: [n, embedding_dim] in the table's dtype.
        rows: int64 [n], numbers of their rows, ascending.
        removed: int64 [m], ids that have gone (tombstones); none of them in ``ids``.
        state: Optimizer state and the like, if the mark asks for it.
    """

    name: str
    dtype: str
    is_whole: bool
    ids: Tensor
    weights: Tensor
    rows: Tensor
    removed: Tensor
    state: TableState | None


@dataclass(frozen=True)
class Delta:
    """Changes of a model since a mark.

    Attributes:
        step: Given by the caller, such as a number of batches.
        tables: Every table's changes, by name.
        dense: Parameters and buffers, all of them, by name; none if the mark is of tables alone.
    """

    step: int
    tables: dict[str, TableDelta]
    dense: dict[str, Tensor]

    @property
    def num_rows(self) -> int:
        """Rows in it, of all tables."""
        return sum(table.ids.numel() for table in self.tables.values())

    @property
    def num_removed(self) -> int:
        """Tombstones in it, of all tables."""
        return sum(table.removed.numel() for table in self.tables.values())


class DeltaSink(Protocol):
    """Taker of deltas: files, or a queue or store of your own.

    On several ranks each has one and gets its own shard's changes.
    """

    def write(self, delta: Delta) -> None:
        """Take a delta, all of it or, with an error, none; the first one has all rows.

        After an error the changes come again, with those since, if the caller goes on.
        """

    def close(self) -> None:
        """End, after the last delta; called once."""


class ModelMark:
    """Mark in the changes of a model's tables, for one consumer.

    Args:
        model: A module with tables, or tables of different names.
        state: Whether deltas have optimizer state, columns of policies, pins and admission counts.

    Example:
        >>> import torch
        >>> from recis_lightning import DynamicEmbedding
        >>> user = DynamicEmbedding(2, name="user")
        >>> mark = ModelMark(user)
        >>> rows = user(torch.tensor([7, 8]))
        >>> mark.take(step=1).tables["user"].ids.tolist()
        [7, 8]
        >>> mark.take(step=2).num_rows
        0
        >>> mark.close()
    """

    def __init__(self, model: nn.Module | Iterable[HashTable], state: bool = False) -> None:
        self._module = model if isinstance(model, nn.Module) else None
        self.tables = tables_by_name(model)
        self.state = state
        self._marks = {name: ChangeMark(table, state) for name, table in self.tables.items()}
        self._taken: dict[str, Changes] = {}

    def take(self, step: int) -> Delta:
        """Return the changes since the mark, all of one moment, and set it here.

        Raises:
            ValueError: A parameter of the model has no values yet (names its module).
        """
        return write(distinct_locks(t.lock for t in self.tables.values()), self._take, step)

    def _take(self, step: int) -> Delta:
        self._taken = {}
        try:
            tables = {name: self._take_table(name) for name in self._marks}
            return Delta(step, tables, self._dense())
        except BaseException:
            self.put_back()
            raise

    def _take_table(self, name: str) -> TableDelta:
        table = self.tables[name]
        changes = self._taken[name] = self._marks[name].take()
        weights, slots = table.storage.rows.read(changes.rows)
        state = None
        if self.state:
            saved = saved_fields(table, changes.rows)
            saved.pop("ages_us", None)
            columns = table.storage.columns
            names = [key for key in ("last_seen", "counts") if key in saved]
            by_id: dict[str, Tensor] = {key: saved.pop(key) for key in names}
            if "last_time" in columns:
                by_id["last_time"] = columns["last_time"][changes.rows].cpu()
            others = {key: value for key, value in saved.items() if isinstance(value, Tensor)}
            assert not any(KEYED_BY.get(key) == "ids" for key in others)
            fields = {key: value for key, value in saved.items() if key not in others}
            now_us = round(table.storage.now() * 1e6)
            state = TableState(fields, by_id, others, slots, now_us)
        dtype = str(table.dtype).removeprefix("torch.")
        return TableDelta(
            *(name, dtype, changes.is_whole, changes.ids, weights, changes.rows.cpu()),
            *(changes.removed, state),
        )

    def _dense(self) -> dict[str, Tensor]:
        if self._module is None:
            return {}
        dense = dense_tensors(self._module)
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in dense.items()}

    def put_back(self) -> None:
        """Let the next delta have the changes of the last one too: nobody has got them."""
        taken, self._taken = self._taken, {}
        for name, changes in taken.items():
            self._marks[name].put_back(changes)

    def close(self) -> None:
        """Forget the mark."""
        for mark in self._marks.values():
            mark.close()


def uninitialized(module: nn.Module) -> list[str]:
    """Return the place and kind of each module that waits for a batch, as ``LazyLinear`` does.

    Example:
        >>> uninitialized(nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(1)))
        ["'1' (LazyLinear)"]
    """
    return [
        f"{name!r} ({type(part).__name__})"
        for name, part in module.named_modules()
        if any(map(is_lazy, (*part._parameters.values(), *part._buffers.values())))
    ]


def dense_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters and buffers without those of its tables, by all their names.

    A served program may have a shared one by another name than the first.

    Raises:
        ValueError: One has no values yet (names its module).
    """
    if lazy := uninitialized(module):
        raise ValueError(
            f"model: its module {lazy[0]} has no values yet; call the model with a batch first, "
            "which gives it its shape"
        )
    anchors = {id(part.anchor) for part in module.modules() if isinstance(part, HashTable)}
    parameters = module.named_parameters(remove_duplicate=False)
    named = [*parameters, *module.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in named if id(tensor) not in anchors}


__all__ = [
    "Delta",
    "DeltaSink",
    "ModelMark",
    "TableDelta",
    "TableState",
    "dense_tensors",
    "uninitialized",
]
