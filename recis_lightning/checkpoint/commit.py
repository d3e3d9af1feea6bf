"""Commit of a checkpoint: the record, written last, that names every shard file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from recis_lightning import system_calls
from recis_lightning.checkpoint.regular_file import read_text

FORMAT = 1
COMMIT_FILE = "checkpoint.json"  # the commit in a folder of ``save``
COMMIT_KEY = "recis_lightning"  # the commit in Lightning's checkpoint
FOLDER_SUFFIX = ".tables"  # of the folder beside Lightning's checkpoint
SHARD_SUFFIX = ".safetensors"
UNFINISHED_SUFFIX = ".part"
SLOT_PREFIX = "slots."  # of optimizer state among the tensors of a shard
_MAX_NAME = 100  # of a table, in the names of its files
_MAX_FILE_NAME = 255  # bytes of a name, which file systems take
_SHARD_FILE = re.compile(
    rf".+\.\d+-of-\d+\.([0-9a-f]{{16}}){re.escape(SHARD_SUFFIX)}(?:{re.escape(UNFINISHED_SUFFIX)})?"
)


@dataclass(frozen=True)
class Shard:
    """Rows of one table and one rank in a shard file.

    Attributes:
        file: Its name in the checkpoint's folder; small tables of one rank may share it.
        rows: Number of rows.
        size: Of the file, in bytes.
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
        location: Absolute path of the files when they were written, for a state whose file is not
            known.
        tables: Shards by rank, by the name of the table.
        excluded: Names of tables, of their optimizer state ("user.exp_avg") and of dense tensors
            that were left out on purpose.
        without_state: Tables whose optimizer state was left out, or a part of it.
    """

    save_id: str
    world_size: int
    folder: str
    location: str
    tables: dict[str, list[Shard]]
    excluded: list[str] = field(default_factory=list)
    without_state: list[str] = field(default_factory=list)

    def to_state(self) -> dict[str, Any]:
        """Return the commit as primitives."""
        state = {"format": FORMAT, **asdict(self)}
        for key in ("excluded", "without_state"):
            if not state[key]:
                del state[key]
        return state

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
            excluded = list(state.get("excluded", ()))
            without_state = list(state.get("without_state", ()))
            commit = cls(**fields, tables=tables, excluded=excluded, without_state=without_state)
            commit._check()
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"{where}: its list of tables is damaged") from None
        return commit

    def _check(self) -> None:
        """Raise ValueError unless every field is of its type, and every file in the folder."""
        texts = [self.save_id, self.folder, self.location, *self.tables]
        texts += [*self.excluded, *self.without_state]
        if not all(isinstance(text, str) for text in texts) or not _is_count(self.world_size):
            raise ValueError
        if self.folder != "." and not _is_file_name(self.folder):
            raise ValueError
        for shards in self.tables.values():
            if len(shards) != self.world_size:
                raise ValueError
            for shard in shards:
                numbers = (shard.rows, shard.size, shard.checksum)
                if not _is_file_name(shard.file) or not all(map(_is_count, numbers)):
                    raise ValueError

    @classmethod
    def read(cls, file: Path) -> Commit:
        """Read the commit of a folder; ValueError if the file is damaged."""
        text = read_text(file)
        try:
            state = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"{file}: damaged") from None
        return cls.from_state(state, str(file.parent))

    def write(self, folder: Path) -> None:
        """Make the shards of a folder its checkpoint."""
        text = json.dumps(self.to_state(), indent=1)
        temporary = folder / f"{COMMIT_FILE}.{self.save_id}"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(folder / COMMIT_FILE)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(folder)

    def files(self) -> set[str]:
        """Return the names of its files."""
        return {shard.file for shards in self.tables.values() for shard in shards}

    def find_folder(self, file: Path | None) -> Path:
        """Return the folder of the shards, beside the file that holds the commit.

        Args:
            file: That file, or a link to it; None if it is not known: then the folder is where
                the shards were written.

        Raises:
            ValueError: There is no such folder.
        """
        if file is None:
            folders = [Path(self.location)]
        else:
            # A file may have been renamed together with its folder.
            places = dict.fromkeys((file, file.resolve()))  # it may be a link
            names = [*(place.name + FOLDER_SUFFIX for place in places), self.folder]
            names = list(dict.fromkeys(names)) if self.folder != "." else ["."]
            folders = [place.parent / name for place in places for name in names]
        found = [folder for folder in folders if _is_folder(folder)]
        one = next(iter(self.files()), None)
        for folder in found:
            if one is None or (folder / one).exists():
                return folder
        if found:
            return found[0]  # its files are missed one by one, by name
        hint = (
            "copy or move it together with the checkpoint"
            if file is not None
            else "if it was moved, call recis_lightning.checkpoint.load(checkpoint, model)"
        )
        raise ValueError(
            f"{folders[-1]}: this folder with the rows of the tables is missing: {hint}"
        )


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # as of a name that is too long
        return False


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_file_name(name: Any) -> bool:
    """Tell whether a name stays in the folder that it is looked up in."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(part in name for part in ("/", "\\", "\0"))
        and len(os.fsencode(name)) <= _MAX_FILE_NAME
    )


def new_save_id() -> str:
    """Return a random name for one save."""
    return secrets.token_hex(8)


def file_name(stem: str, rank: int, world_size: int, save_id: str) -> str:
    """Return the name of a shard file.

    Example:
        >>> file_name("item", 0, 2, "1f")
        'item.0-of-2.1f.safetensors'
    """
    return f"{stem}.{rank}-of-{world_size}.{save_id}{SHARD_SUFFIX}"


def slot_name(table: str, slot: str) -> str:
    """Return the name of a table's optimizer state, as patterns match it.

    Example:
        >>> slot_name("user", "exp_avg")
        'user.exp_avg'
    """
    return f"{table}.{slot}"


def file_stems(tables: Iterable[str]) -> dict[str, str]:
    """Return the part of file names that stands for each table, different on every disk.

    Example:
        >>> file_stems(["item/a", "x"])
        {'item/a': 'item%2Fa', 'x': 'x'}
        >>> file_stems(["User", "user"])
        {'User': 'User-924c93c98823979a', 'user': 'user-afdf5c9a7bd48d63'}
    """
    quoted = {table: quote(table, safe=" ") for table in tables}
    folded = [stem.casefold() for stem in quoted.values()]
    stems = {}
    for table, stem in quoted.items():
        # A disk may hold "User" and "user" for one name.
        if len(stem) > _MAX_NAME or folded.count(stem.casefold()) > 1:
            digest = hashlib.blake2b(table.encode(), digest_size=8).hexdigest()
            stem = f"{stem[:_MAX_NAME]}-{digest}"
        stems[table] = stem
    return stems


def saved_by(file: str) -> str | None:
    """Return the ``save_id`` in the name of a shard file, finished or not; None if it is none."""
    found = _SHARD_FILE.fullmatch(file)
    return None if found is None else found[1]


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove shard files that a commit names; never a file whose name is not one of ours."""
    for name in names:
        if saved_by(name) is not None:
            (folder / name).unlink(missing_ok=True)


def remove_unfinished(folder: Path, save_ids: Iterable[str]) -> None:
    """Remove the files of saves that did not become checkpoints.

    Args:
        folder: Folder of the shard files.
        save_ids: Random names that we gave these saves.
    """
    save_ids = set(save_ids)
    if folder.is_dir():
        for name in os.listdir(folder):
            if saved_by(name) in save_ids:
                (folder / name).unlink(missing_ok=True)
    for save_id in save_ids:
        (folder / f"{COMMIT_FILE}.{save_id}").unlink(missing_ok=True)
        if folder.name.endswith(FOLDER_SUFFIX):
            unfinished_main(folder, save_id).unlink(missing_ok=True)


def unfinished_main(folder: Path, save_id: str) -> Path:
    """Return the temporary name of Lightning's file, beside the folder of its shards."""
    main = folder.name.removesuffix(FOLDER_SUFFIX)
    return folder.with_name(f"{main}.{save_id}{UNFINISHED_SUFFIX}")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    system_calls.sync_folder(folder)


__all__ = [
    "COMMIT_FILE",
    "COMMIT_KEY",
    "FOLDER_SUFFIX",
    "FORMAT",
    "SHARD_SUFFIX",
    "SLOT_PREFIX",
    "UNFINISHED_SUFFIX",
    "Commit",
    "Shard",
    "file_name",
    "file_stems",
    "new_save_id",
    "remove_files",
    "remove_unfinished",
    "saved_by",
    "slot_name",
    "sync_folder",
    "unfinished_main",
]
