"""Checks of a shard file's header: every tensor and field is what a table can hold.

A checksum tells that a file is as it was written, not who wrote it.
"""

from __future__ import annotations

from typing import Any

import torch

from recis_lightning.checkpoint.commit import SLOT_PREFIX
from recis_lightning.checkpoint.shard_file import ShardFile, TensorSpec
from recis_lightning.table.state_schema import (
    KEYED_BY,
    SKETCH,
    check_primitives,
    check_rows,
    is_field,
)

_SAVE_FIELDS = {"format", "save_id", "table", "rank", "world_size", "rows"}
_OF_ONE_RANK = {"pinned_ids"}  # there are ranks without pins


def check_file(file: ShardFile) -> None:
    """Raise ValueError, with the file's path, unless its header is that of a table's rows."""
    where, metadata, specs = str(file.path), file.metadata, file.specs
    unknown = [key for key in metadata if not is_field(key) and key not in _SAVE_FIELDS]
    if unknown:
        raise ValueError(f"{where}: it has unknown fields {unknown}: of a later version?")
    dim = metadata.get("embedding_dim")
    if not isinstance(dim, int) or dim < 1:
        raise ValueError(f"{where}: expected embedding_dim >= 1, got {dim!r}")
    check_primitives({key: metadata[key] for key in metadata if is_field(key)}, where, dim)
    for key in ("ids", "weights"):
        if key not in specs:
            raise ValueError(f"{where}: it has no tensor {key!r}")
    rows = metadata["rows"]
    slots = {key: _of(specs[key]) for key in specs if key.startswith(SLOT_PREFIX)}
    check_rows(where, rows, dim, metadata["dtype"], _of(specs["weights"]), slots)
    for key, spec in specs.items():
        if key in KEYED_BY:
            length = rows if KEYED_BY[key] == "ids" else _length(file, KEYED_BY[key])
            if spec != TensorSpec(torch.int64, (length,)):
                raise ValueError(
                    f"{where}: expected {key} of shape {(length,)} and dtype torch.int64, got "
                    f"{spec.shape} and {spec.dtype}"
                )
        elif key == "sketch":
            if spec.dtype is not torch.uint8 or len(spec.shape) != 2:
                raise ValueError(f"{where}: sketch is not what it should be")
        elif key == "num_sketched":
            if spec != TensorSpec(torch.int64, (_length(file, "sketch"),)):
                raise ValueError(f"{where}: num_sketched is not what it should be")
        elif key != "weights" and key not in slots:
            raise ValueError(f"{where}: it has an unknown tensor {key!r}: of a later version?")
    rows_of = [key for key in specs if KEYED_BY.get(key, "ids") == "ids"]
    read_together = [key for key in rows_of if key not in SKETCH]
    if len({file.chunk_rows[key] for key in read_together}) > 1:
        raise ValueError(f"{where}: its tensors are cut into chunks of different rows")


def check_same_layout(file: ShardFile, other: ShardFile) -> None:
    """Raise ValueError, with both paths, unless two ranks' files are of one table."""
    one, two = _layout(file), _layout(other)
    for key in one.keys() | two.keys():
        if one.get(key) != two.get(key):
            raise ValueError(
                f"{file.path}: {key} is {one.get(key)}, but {two.get(key)} in {other.path}"
            )


def slots_of(file: ShardFile) -> dict[str, int]:
    """Return the optimizer state of a row in a file: name -> float32 words."""
    return {
        key.removeprefix(SLOT_PREFIX): spec.shape[1]
        for key, spec in file.specs.items()
        if key.startswith(SLOT_PREFIX)
    }


def _layout(file: ShardFile) -> dict[str, Any]:
    """Return what the files of all ranks have in common."""
    layout: dict[str, Any] = {
        key: (spec.dtype, spec.shape if key in SKETCH else spec.shape[1:])
        for key, spec in file.specs.items()
        if key not in _OF_ONE_RANK
    }
    return layout | {key: file.metadata[key] for key in ("embedding_dim", "dtype")}


def _length(file: ShardFile, key: str) -> int:
    return file.specs[key].shape[0] if key in file.specs else -1


def _of(spec: TensorSpec) -> tuple[tuple[int, ...], torch.dtype]:
    return spec.shape, spec.dtype


__all__ = ["check_file", "check_same_layout", "slots_of"]
