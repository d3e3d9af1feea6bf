"""History of a run and figures of its tables, read from a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from recis_lightning.checkpoint.commit import COMMIT_FILE
from recis_lightning.checkpoint.folder_listing import checkpoints_in
from recis_lightning.checkpoint.reader import (
    CheckpointReader,
    NoCheckpointError,
    read_lightning_file,
)
from recis_lightning.checkpoint.saved_tables import TableContents
from recis_lightning.monitoring.history import RunHistory
from recis_lightning.table.scan import RowChunk, RowSurvey, scan_chunks
from recis_lightning.table.sizing import index_capacity

__all__ = ["SavedRun", "read_run"]

_CHUNK_ROWS = 1 << 16
_ENTRY_BYTES = 16
_POLICY_COLUMNS = ("last_seen", "counts", "ages_us")


class SavedRun(NamedTuple):
    """Tables and history of a run.

    Attributes:
        path: The checkpoint.
        tables: Layout of each table, by name.
        history: That of its ``MetricReportHook``; without one, a single point.
    """

    path: Path
    tables: dict[str, TableContents]
    history: RunHistory


def read_run(path: str | os.PathLike[str]) -> SavedRun:
    """Read a checkpoint, and all rows of its tables.

    Args:
        path: Lightning's file; a folder that ``checkpoint.save`` wrote to; or another folder: then
            the newest checkpoint in it, or below it.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: It is no checkpoint with tables, or is damaged.
    """
    file = _checkpoint_at(Path(path))
    reader, checkpoint = _open(file)
    tables = {name: reader.contents(name) for name in reader.names()}
    history, figures = _history(checkpoint), {}
    for name, contents in tables.items():
        found, num_columns = _survey(reader, name, contents.step)
        figures[name] = _figures(contents, num_columns, found)
        history.distributions[f"table/{name}/norms"] = found.norms
        if found.ages is not None:
            history.distributions[f"table/{name}/ages"] = found.ages
    if not len(history):
        step = checkpoint.get("global_step", max(t.step for t in tables.values()))
        history.append(int(step), _values(figures))
    return SavedRun(file, tables, history)


def _checkpoint_at(path: Path) -> Path:
    """Return Lightning's file, or the folder that ``checkpoint.save`` wrote to."""
    if not os.path.lexists(path):
        raise NoCheckpointError(f"source: {path}: no such checkpoint")
    if not path.is_dir():
        return path
    if os.path.lexists(path / COMMIT_FILE):
        return path.absolute()
    files = checkpoints_in(path)
    if not files:
        raise NoCheckpointError(
            f"source: {path}: no checkpoint: it has no {COMMIT_FILE}, and no *.ckpt in it or below"
        )
    return files[0]


def _open(file: Path) -> tuple[CheckpointReader, Mapping[str, Any]]:
    """Return the reader of a checkpoint, and the content of Lightning's file; {} of a folder."""
    try:
        if file.is_dir():
            return CheckpointReader.open(file), {}
        checkpoint = read_lightning_file(file)
    except Exception as error:
        raise ValueError(f"source: {file} is no checkpoint that can be read: {error}") from error
    if "state_dict" not in checkpoint:
        raise ValueError(f"source: {file} is no checkpoint of Lightning")
    return CheckpointReader.of_lightning(file, checkpoint), checkpoint


def _history(checkpoint: Mapping[str, Any]) -> RunHistory:
    """Return the history that a callback saved; empty if none did."""
    history = RunHistory()
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, Mapping) and isinstance(state.get("history"), Mapping):
            history.load_state_dict(dict(state["history"]))
    return history


def _survey(reader: CheckpointReader, name: str, step: int) -> tuple[RowSurvey, int]:
    """Return the survey of a table's rows, and the number of its policies' columns."""
    num_columns = 0

    def chunks() -> Iterator[RowChunk]:
        nonlocal num_columns
        first = 0
        for chunk in reader.chunks(name, _CHUNK_ROWS):
            count = chunk.pop("ids").numel()
            columns = {key: chunk.pop(key) for key in _POLICY_COLUMNS if key in chunk}
            weights, num_columns = chunk.pop("weights"), len(columns)
            ages = (step - columns["last_seen"]).clamp_(min=0) if "last_seen" in columns else None
            yield RowChunk(
                torch.arange(first, first + count, device="cpu"), weights, [*chunk.values()], ages
            )
            first += count

    return scan_chunks(chunks()), num_columns


def _figures(contents: TableContents, num_columns: int, found: RowSurvey) -> dict[str, float]:
    """Return the figures that ``TableWatch`` records under the same names."""
    num_rows = sum(contents.rows)
    num_words = -(-contents.embedding_dim * contents.dtype.itemsize // 4)
    row_bytes = 4 * (num_words + sum(contents.slots.values())) + 8 * num_columns
    capacity = index_capacity(num_rows, row_bytes)
    return {
        "rows": num_rows,
        "capacity": capacity,
        "load": num_rows / capacity,
        "index_bytes": _ENTRY_BYTES * (capacity + 1),
        "weight_bytes": num_rows * contents.embedding_dim * contents.dtype.itemsize,
        "state_bytes": num_rows * 4 * sum(contents.slots.values()),
        "column_bytes": num_rows * 8 * num_columns,
        "nonfinite_rows": found.nonfinite_rows.numel(),
    }


def _values(figures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the figures of each table and of all tables, under the names of a history."""
    values = {f"table/{name}/{key}": v for name in figures for key, v in figures[name].items()}
    for key in next(iter(figures.values())):
        values[f"tables/{key}"] = sum(of_table[key] for of_table in figures.values())
    values["tables/load"] = values["tables/rows"] / values["tables/capacity"]
    return values
