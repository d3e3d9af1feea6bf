"""``restore``: tables as they were behind the last delta of a chain."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recis_lightning.checkpoint.saved_tables import all_or_none
from recis_lightning.checkpoint.writer import tables_by_name
from recis_lightning.distributed import collectives
from recis_lightning.serving.chain import chain_folder, links_of, read_head
from recis_lightning.serving.delta import Delta, TableDelta, TableState, dense_tensors
from recis_lightning.serving.merging import merge
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.lock import distinct_locks, write
from recis_lightning.table.state import KEYED_BY, SCHEMA
from recis_lightning.table.state_schema import check_state


def restore(folder: str | os.PathLike[str], model: nn.Module | Iterable[HashTable]) -> int:
    """Load the state behind the last delta of a chain, all or nothing.

    Tables get everything that a checkpoint of that moment would give them: rows, optimizer state,
    columns of policies, pins and admission counts, row by row in the same order; on another number
    of ranks each takes the rows that it owns. A module's parameters and buffers are set too. The
    state of dense optimizers is not in a chain. All ranks call it together.

    Args:
        folder: That of ``DeltaHook`` or ``ChainSink``, with ``state=True``.
        model: A module with tables, or tables, of the names that the chain has.

    Returns:
        The step of the last delta.

    Raises:
        ValueError: There is no chain, a file of it is missing or damaged, its deltas have no state,
            or the model is another one (names what differs); nothing has changed. On a rank that
            found nothing wrong while another one did, a RuntimeError.

    Example:
        >>> import tempfile
        >>> from recis_lightning import serving
        >>> old, new = HashTable(2, name="user"), HashTable(2, name="user")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     mark, sink = serving.ModelMark([old], state=True), serving.ChainSink(folder)
        ...     sink.write(mark.take(step=0))
        ...     old.insert(torch.tensor([7]), torch.ones(1, 2))
        ...     sink.write(mark.take(step=1))
        ...     sink.close()
        ...     restore(folder, [new]), new.ids().tolist()
        (1, [7])
    """
    tables = collectives.run_on_all_ranks(lambda: tables_by_name(model))
    path = chain_folder(folder)

    def read() -> tuple[int, dict[str, dict[str, Any]], dict[str, Tensor]]:
        links = links_of(path, read_head(path))
        last = links[-1]
        if set(tables) != {table.name for table in last.tables}:
            raise ValueError(
                f"{path}: it has the tables {sorted(table.name for table in last.tables)}, the "
                f"model {sorted(tables)}"
            )
        parts = [merge(path, links, rank) for rank in range(len(last.files))]
        states = {name: _state_of([part.tables[name] for part in parts]) for name in tables}
        for name, table in tables.items():
            check_state(states[name], name, table.embedding_dim)
        dense = parts[0].dense if isinstance(model, nn.Module) else {}
        if isinstance(model, nn.Module):
            _check_dense(model, parts[0], str(path))
        return last.step, states, dense

    step, states, dense = collectives.run_on_all_ranks(read)
    named: dict[str, Tensor] = {}
    if isinstance(model, nn.Module):
        named = dense_tensors(model)
    targets = {name: named[name] for name in dense}

    def load() -> None:
        for name, table in tables.items():
            table.set_extra_state(states[name])
        for name, value in dense.items():
            targets[name].copy_(value)

    locks = distinct_locks(table.lock for table in tables.values())
    write(locks, _all_or_nothing, list(tables.values()), list(targets.values()), load)
    return step


@torch.no_grad()
def _all_or_nothing(
    tables: Sequence[HashTable], tensors: Sequence[Tensor], load: Callable[[], None]
) -> None:
    """Load on all ranks; if it fails on one, tables and tensors hold what they held on each."""
    before = [tensor.clone() for tensor in tensors]
    with all_or_none(tables):
        try:
            collectives.run_on_all_ranks(load)
        except BaseException:
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
            raise


def _check_dense(model: nn.Module, delta: Delta, where: str) -> None:
    """Raise ValueError unless a module has the parameters and buffers of a delta, and no others."""
    if not delta.dense:
        return  # of tables alone
    own = dense_tensors(model)
    if set(own) != set(delta.dense):
        differ = sorted(set(own) ^ set(delta.dense))
        raise ValueError(f"{where}: the model and the chain differ in the parameters {differ}")
    for name, value in delta.dense.items():
        if (own[name].shape, own[name].dtype) != (value.shape, value.dtype):
            raise ValueError(
                f"{where}: parameter {name!r} is {value.dtype} {tuple(value.shape)}, the model's "
                f"is {own[name].dtype} {tuple(own[name].shape)}"
            )


def _state_of(parts: Sequence[TableDelta]) -> dict[str, Any]:
    """Return what ranks have of a table as the state of a saved one."""
    states: list[TableState] = []
    for part in parts:
        if part.state is None:
            raise ValueError(
                f"table {part.name!r}: its deltas have no state; write them with state=True"
            )
        states.append(part.state)
    state = _joined_fields(states)
    state["schema"] = SCHEMA
    state["ids"] = torch.cat([part.ids for part in parts])
    state["weights"] = torch.cat([part.weights for part in parts])
    names = states[0].slots
    state["slots"] = {name: torch.cat([one.slots[name] for one in states]) for name in names}
    for name in states[0].by_id:
        columns = [one.by_id[name] for one in states]
        if name == "last_time":
            pairs = zip(columns, states, strict=True)
            state["ages_us"] = torch.cat([one.now_us - column for column, one in pairs])
        else:
            state[name] = torch.cat(columns)
    for name in states[0].others:
        values = [one.others[name] for one in states]
        if name in KEYED_BY:
            state[name] = torch.cat(values)
        else:  # not of single ids: as from a checkpoint, the maximum over ranks
            state[name] = torch.stack(values).amax(0)
    return state


def _joined_fields(states: Sequence[TableState]) -> dict[str, Any]:
    """Return the primitives of a table, of ints the largest of any rank."""
    fields = dict(states[0].fields)
    for other in states[1:]:
        for name, value in other.fields.items():
            if isinstance(value, int) and isinstance(fields.get(name), int):
                fields[name] = max(fields[name], value)
    return fields


__all__ = ["restore"]
