"""Content of a source, whatever wrote it: tables to read, and dense tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from recis_lightning.checkpoint.array_files import read_npz, read_parquet
from recis_lightning.checkpoint.array_tables import ArrayTables
from recis_lightning.checkpoint.commit import COMMIT_FILE, COMMIT_KEY, FOLDER_SUFFIX
from recis_lightning.checkpoint.reader import (
    CheckpointReader,
    NoCheckpointError,
    read_lightning_file,
)
from recis_lightning.checkpoint.recis_folder import (
    is_recis_folder,
    newest_recis_folder,
    read_recis_folder,
)
from recis_lightning.checkpoint.state_tables import StateTables

_LIGHTNING = (".ckpt", ".pt", ".pth")
_DENSE_OF_RECIS = "model.pt"


@dataclass(frozen=True)
class SourceContent:
    """Content of a source.

    Attributes:
        path: File or folder that it is in.
        tables: Reader of its tables; of none, if it has none.
        dense: Its dense tensors, by name.
    """

    path: Path
    tables: CheckpointReader
    dense: dict[str, Tensor]


def newest(path: str | os.PathLike[str]) -> Path:
    """Return the file or folder that a source stands for now: the newest checkpoint of a folder.

    Raises:
        NoCheckpointError: There is nothing to load.
    """
    place = Path(path)
    if not place.is_dir() or _is_checkpoint(place):
        if not os.path.lexists(place):
            raise NoCheckpointError(f"{place}: no such file or folder")
        return place
    listed = newest_recis_folder(place)
    if listed is not None:
        return listed
    # Rows beside Lightning's file are none by themselves: it may not be written yet.
    found = [
        entry
        for entry in place.iterdir()
        if _is_checkpoint(entry) and not entry.name.endswith(FOLDER_SUFFIX)
    ]
    if not found:
        raise NoCheckpointError(f"{place}: no checkpoint, and no folder with checkpoints")
    return max(found, key=lambda entry: (_changed(entry), entry.name))


def version_of(path: Path) -> str:
    """Return a text that is another one as soon as other content is at a path."""
    marks = [path, *(path / name for name in (COMMIT_FILE, "index", "tensorkey.json"))]
    if path.is_dir() and not any(mark.is_file() for mark in marks):
        marks += sorted(path.iterdir())  # a folder of Parquet files
    found = []
    for mark in marks:
        try:
            stat = mark.stat()
        except OSError:
            continue
        # Of a folder with a commit, files come and go: the commit alone counts.
        if mark.is_file():
            found.append(f"{mark.name}:{stat.st_mtime_ns}:{stat.st_size}:{stat.st_ino}")
    return f"{path}|{'|'.join(found)}"


def read_source(path: Path) -> SourceContent:
    """Read what a source holds; rows of large tables only when they are loaded.

    Args:
        path: From ``newest``.

    Raises:
        ValueError: It is no checkpoint, or damaged.
    """
    if path.is_dir() and is_recis_folder(path):
        dense: dict[str, Tensor] = {}
        if (path / _DENSE_OF_RECIS).is_file():
            dense = _dense(read_lightning_file(path / _DENSE_OF_RECIS))
        return SourceContent(path, CheckpointReader(path, read_recis_folder(path)), dense)
    if path.suffix == ".npz":
        return SourceContent(path, CheckpointReader(path, read_npz(path)), {})
    if path.suffix == ".parquet":
        return SourceContent(path, CheckpointReader(path, read_parquet(path)), {})
    if path.is_dir():
        main = path.with_name(path.name.removesuffix(FOLDER_SUFFIX))
        if (path / COMMIT_FILE).is_file() or main == path or not main.is_file():
            return SourceContent(path, CheckpointReader.open(path), {})
        path = main
    saved = read_lightning_file(path)
    states = saved.get("state_dict", saved)
    dense = _dense(states) if isinstance(states, Mapping) else {}
    if saved.get(COMMIT_KEY) is not None or StateTables(states, path).names():
        return SourceContent(path, CheckpointReader.of_lightning(path, saved), dense)
    return SourceContent(path, CheckpointReader(path, ArrayTables({}, path)), dense)


def _dense(states: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in states.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }


def _is_checkpoint(path: Path) -> bool:
    if path.is_dir():
        return (
            path.suffix == ".parquet"
            or (path / COMMIT_FILE).is_file()
            or is_recis_folder(path)
            or path.name.endswith(FOLDER_SUFFIX)
        )
    return path.suffix in (*_LIGHTNING, ".npz", ".parquet") and path.is_file()


def _changed(path: Path) -> int:
    mark = path / COMMIT_FILE
    try:
        return (mark if mark.is_file() else path).stat().st_mtime_ns
    except OSError:  # gone since it was listed
        return -1


__all__ = ["SourceContent", "newest", "read_source", "version_of"]
