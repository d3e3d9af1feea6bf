"""Tables and history of a run, as a checkpoint holds them: what a report needs, and no module."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recis_lightning.checkpoint import inspect
from recis_lightning.checkpoint.reader import KEY, Source
from recis_lightning.monitoring.history import RunHistory
from recis_lightning.ops.hash_index import capacity_for
from recis_lightning.table.scan import RowChunk, RowSurvey, scan_chunks

__all__ = ["SavedTable", "SavedTables", "read_saved"]

_PIECE_ROWS = 1 << 16
_ENTRY_BYTES = 16
_COLUMNS = ("last_seen", "counts", "ages_us")  # of policies


class SavedTable(NamedTuple):
    """A table of a checkpoint.

    Attributes:
        name: Its name.
        embedding_dim: Weights in a row.
        dtype: Of the weights, "float32" or "bfloat16".
        figures: What ``TableWatch`` calls by the same names.
        survey: What its rows are like.
    """

    name: str
    embedding_dim: int
    dtype: str
    figures: dict[str, float]
    survey: RowSurvey


class SavedTables(NamedTuple):
    """What a checkpoint says of a run's tables.

    Attributes:
        path: The checkpoint.
        tables: Each once.
        history: That of its ``MetricReportHook``; without one, a single point.
    """

    path: Path
    tables: list[SavedTable]
    history: RunHistory


def read_saved(path: str | os.PathLike[str]) -> SavedTables:
    """Read tables and history from a checkpoint of Lightning.

    Args:
        path: Its file, or a folder: then the newest file ``*.ckpt`` in it, or below it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint of Lightning, or holds no tables.
    """
    file = _checkpoint_file(Path(path))
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"source: {file} is no checkpoint that can be read: {error}") from error
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise ValueError(f"source: {file} is no checkpoint of Lightning")
    tables = list(
        _tables_in_shards(file) if KEY in checkpoint else _tables(checkpoint["state_dict"])
    )
    if not tables:
        raise ValueError(f"source: {file} holds no tables")
    return SavedTables(file, tables, _history(checkpoint, tables))


def _checkpoint_file(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(path.rglob("*.ckpt"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"source: no checkpoint (*.ckpt) at {path}")
    return files[-1]


def _tables(state: Mapping[str, Any]) -> Iterator[SavedTable]:
    names = set()
    for key, value in state.items():
        if not key.endswith("_extra_state") or not _is_table(value):
            continue
        place = key.removesuffix("._extra_state").removesuffix(".table")
        name = value["name"] or place
        if name not in names:
            names.add(name)
            yield _table(name, value)


def _tables_in_shards(file: Path) -> Iterator[SavedTable]:
    """Read the tables that ``CheckpointHook`` wrote, whichever ranks had their rows."""
    source = Source(file)
    for name, told in inspect(file).items():
        num_columns = 0

        def pieces(name: str = name, step: int = told.step) -> Iterator[RowChunk]:
            nonlocal num_columns
            first = 0
            for piece in source.pieces(name, _PIECE_ROWS):
                count = piece.pop("ids").numel()
                columns = {key: piece.pop(key) for key in _COLUMNS if key in piece}
                weights, num_columns = piece.pop("weights"), len(columns)
                ages = (
                    (step - columns["last_seen"]).clamp_(min=0) if "last_seen" in columns else None
                )
                yield RowChunk(torch.arange(first, first + count), weights, [*piece.values()], ages)
                first += count

        found, num_rows = scan_chunks(pieces()), sum(told.rows)
        capacity = capacity_for(num_rows)
        figures: dict[str, float] = {
            "rows": num_rows,
            "capacity": capacity,
            "load": num_rows / capacity,
            "index_bytes": _ENTRY_BYTES * (capacity + 1),
            "weight_bytes": num_rows * told.embedding_dim * told.dtype.itemsize,
            "state_bytes": num_rows * 4 * sum(told.slots.values()),
            "column_bytes": num_rows * 8 * num_columns,
            "nonfinite_rows": found.nonfinite_rows.numel(),
        }
        dtype = str(told.dtype).removeprefix("torch.")
        yield SavedTable(name, told.embedding_dim, dtype, figures, found)


def _is_table(state: Any) -> bool:
    return isinstance(state, Mapping) and {"ids", "weights", "slots", "step"} <= state.keys()


def _table(name: str, state: Mapping[str, Any]) -> SavedTable:
    found = scan_chunks(_pieces(state))
    num_rows, capacity = state["ids"].numel(), capacity_for(state["ids"].numel())
    columns = [state[key] for key in _COLUMNS if key in state]
    figures: dict[str, float] = {
        "rows": num_rows,
        "capacity": capacity,
        "load": num_rows / capacity,
        "index_bytes": _ENTRY_BYTES * (capacity + 1),
        "weight_bytes": state["weights"].nbytes,
        "state_bytes": sum(slot.nbytes for slot in state["slots"].values()),
        "column_bytes": sum(column.nbytes for column in columns),
        "nonfinite_rows": found.nonfinite_rows.numel(),
    }
    return SavedTable(name, state["embedding_dim"], state["dtype"], figures, found)


def _pieces(state: Mapping[str, Any]) -> Iterator[RowChunk]:
    num_rows, last_seen = state["ids"].numel(), state.get("last_seen")
    for start in range(0, max(num_rows, 1), _PIECE_ROWS):
        part = slice(start, min(start + _PIECE_ROWS, num_rows))
        slots: list[Tensor] = [slot[part] for slot in state["slots"].values()]
        ages = None if last_seen is None else (state["step"] - last_seen[part]).clamp_(min=0)
        rows = torch.arange(part.start, part.stop)
        yield RowChunk(rows, state["weights"][part], slots, ages)


def _history(checkpoint: Mapping[str, Any], tables: list[SavedTable]) -> RunHistory:
    history = RunHistory()
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, Mapping) and isinstance(state.get("history"), Mapping):
            history.load_state_dict(dict(state["history"]))
    if not len(history):
        values = {f"table/{t.name}/{k}": v for t in tables for k, v in t.figures.items()}
        for figure in tables[0].figures:
            values[f"tables/{figure}"] = sum(table.figures[figure] for table in tables)
        values["tables/load"] = values["tables/rows"] / values["tables/capacity"]
        history.append(int(checkpoint.get("global_step", 0)), values)
    for table in tables:
        history.distributions[f"table/{table.name}/norms"] = table.survey.norms
        if table.survey.ages is not None:
            history.distributions[f"table/{table.name}/ages"] = table.survey.ages
    return history
