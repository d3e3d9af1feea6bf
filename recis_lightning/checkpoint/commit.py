"""Commit of a checkpoint: the record, written last, that names every shard file."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

FORMAT = 1
COMMIT_FILE = "checkpoint.json"  # the commit in a folder of ``save``
COMMIT_KEY = "recis_lightning"  # the commit in Lightning's checkpoint
FOLDER_SUFFIX = ".tables"  # of the folder beside Lightning's checkpoint
SHARD_SUFFIX = ".safetensors"
SLOT_PREFIX = "slots."  # of optimizer state among the tensors of a shard
_MAX_NAME = 100


@dataclass(frozen=True)
class Shard:
    """Shard file with one rank's rows of one table.

    Attributes:
        file: Its name in the checkpoint's folder.
        rows: Number of rows.
        size: In bytes.
        checksum: Checksum of its ``FileDigest``.
    """

    file: str
    rows: int
    size: int
    checksum: int


@dataclass(frozen=True)
class Commit:
    """Record that makes shard files a checkpoint.

    Attributes:
        save_id: Random; part of the names and headers of the files.
        world_size: Number of ranks that saved.
        folder: Path of the files, relative to the commit.
        location: Absolute path of the files when they were written.
        tables: Shards by rank, by the name of the table.
    """

    save_id: str
    world_size: int
    folder: str
    location: str
    tables: dict[str, list[Shard]]

    def to_state(self) -> dict[str, Any]:
        """Return the commit as primitives."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_state(cls, state: Any, where: str) -> Commit:
        """Return the commit of primitives; ValueError, with ``where``, if they are damaged."""
        version = state.get("format") if isinstance(state, dict) else None
        if version != FORMAT:
            raise ValueError(f"{where}: expected format {FORMAT} of tables, got {version!r}")
        try:
            fields = {key: state[key] for key in ("save_id", "world_size", "folder", "location")}
            tables = {
                name: [Shard(**shard) for shard in shards]
                for name, shards in state["tables"].items()
            }
            if any(len(shards) != fields["world_size"] for shards in tables.values()):
                raise ValueError
            return cls(**fields, tables=tables)
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"{where}: its list of tables is damaged") from None

    @classmethod
    def read(cls, file: Path) -> Commit:
        """Read the commit of a folder; ValueError if the file is damaged."""
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError):
            raise ValueError(f"{file}: damaged") from None
        return cls.from_state(state, str(file.parent))

    def write(self, folder: Path) -> None:
        """Make the shards of a folder its checkpoint, and remove those of earlier saves."""
        text = json.dumps(self.to_state(), indent=1)
        temporary = folder / f"{COMMIT_FILE}.{self.save_id}"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / COMMIT_FILE)
        sync_folder(folder)
        remove_shards(folder, kept=[self.save_id])
        for unfinished in folder.glob(f"{COMMIT_FILE}.*"):
            unfinished.unlink(missing_ok=True)

    def find_folder(self, file: Path | None) -> Path:
        """Return the folder of the shards: beside the commit, or else where they were written.

        Args:
            file: File that holds the commit, or a link to it; None if it is not known.

        Raises:
            ValueError: Neither folder exists.
        """
        parents = () if file is None else (file.parent, file.resolve().parent)
        folders = [*(parent / self.folder for parent in parents), Path(self.location)]
        for folder in folders:
            if folder.is_dir():
                return folder
        raise ValueError(
            f"{folders[0]}: this folder with the rows of the checkpoint's tables is missing; if it "
            "was moved with the checkpoint, resume with CheckpointHook, or call "
            "recis_lightning.checkpoint.load(checkpoint, model)"
        )


def new_save_id() -> str:
    """Return a random name for one save."""
    return secrets.token_hex(8)


def file_name(table: str, rank: int, world_size: int, save_id: str) -> str:
    """Return the name of a shard file.

    Example:
        >>> file_name("item", 0, 2, "1f")
        'item.0-of-2.1f.safetensors'
    """
    stem = quote(table, safe=" ")
    if len(stem) > _MAX_NAME:
        digest = hashlib.blake2b(table.encode(), digest_size=8).hexdigest()
        stem = f"{stem[:_MAX_NAME]}-{digest}"
    return f"{stem}.{rank}-of-{world_size}.{save_id}{SHARD_SUFFIX}"


def remove_shards(folder: Path, kept: Iterable[str] = (), only: str = "") -> None:
    """Remove shard files of a folder, finished or not.

    Args:
        folder: Folder of the files.
        kept: ``save_id`` of each save whose files stay.
        only: ``save_id`` of the one save whose files go; "" removes those of all other saves.
    """
    stay = [f".{save_id}{SHARD_SUFFIX}" for save_id in kept]
    for file in folder.glob(f"*.{only}{SHARD_SUFFIX}*" if only else f"*{SHARD_SUFFIX}*"):
        if not any(part in file.name for part in stay):
            file.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


__all__ = [
    "COMMIT_FILE",
    "COMMIT_KEY",
    "FOLDER_SUFFIX",
    "FORMAT",
    "SHARD_SUFFIX",
    "SLOT_PREFIX",
    "Commit",
    "Shard",
    "file_name",
    "new_save_id",
    "remove_shards",
    "sync_folder",
]
