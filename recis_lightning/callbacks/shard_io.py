"""``CheckpointIO`` that makes shards a checkpoint when Lightning's file is written."""

from __future__ import annotations

import glob
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import Strategy
from typing_extensions import override

from recis_lightning.checkpoint.commit import (
    COMMIT_KEY,
    FOLDER_SUFFIX,
    remove_shards,
    sync_folder,
)
from recis_lightning.distributed import collectives
from recis_lightning.table import state as table_state

__all__ = ["PendingSaves", "local_path", "shard_folder", "wrap_io"]

# Takes the path of Lightning's file and its content.
Load = Callable[[Path, dict[str, Any]], None]


def wrap_io(strategy: Strategy, load: Load, pending: PendingSaves) -> None:
    """Put a ``_ShardIO`` around the ``CheckpointIO`` that writes files, within those that wrap it.

    Args:
        strategy: Of the Trainer; where it has a ``_ShardIO``, that one is used.
        load: Called when a checkpoint was read.
        pending: Saves whose main file is not written yet.
    """
    outer: _WrappingCheckpointIO | None = None
    io: Any = strategy.checkpoint_io
    while isinstance(io, _WrappingCheckpointIO):
        outer, io = io, io.checkpoint_io
    if isinstance(io, _ShardIO):
        io.load, io.pending = load, pending
    elif outer is None:
        strategy.checkpoint_io = _ShardIO(io, load, pending)
    else:
        outer._checkpoint_io = _ShardIO(io, load, pending)


def shard_folder(main: Path) -> Path:
    """Return the folder of the shards beside Lightning's file."""
    return main.with_name(main.name + FOLDER_SUFFIX)


def local_path(path: str | Path) -> Path:
    """Return an absolute path; ValueError unless it is one of the local file system."""
    text = os.fspath(path)
    if "://" in text and not text.startswith("file://"):
        raise ValueError(
            f"filepath: with CheckpointHook expected a local file, got {text!r}: every rank writes "
            "files beside it"
        )
    return Path(os.path.abspath(text.removeprefix("file://")))


class PendingSaves:
    """Saves on rank 0 with shards that no main file names yet.

    The main file may be written later, on another thread. Until then other saves leave the shards
    alone; the main file of an abandoned save is not written.
    """

    def __init__(self) -> None:
        self._mains: dict[str, Path] = {}  # by save_id
        self._abandoned: set[str] = set()  # by save_id
        self._lock = threading.Lock()

    def begin(self, save_id: str, main: Path) -> None:
        """Add a save that will write the file ``main``."""
        with self._lock:
            self._mains[save_id] = main

    def finish(self, save_id: str, temporary: Path, main: Path) -> bool:
        """Rename a written main file; if the save was abandoned, remove it and return False."""
        with self._lock:
            if save_id in self._abandoned:
                temporary.unlink()
                return False
            temporary.replace(main)
            self._mains.pop(save_id, None)
            return True

    def abandon(self, save_id: str) -> None:
        """Remove the shards of a save, unless its main file is there: then it is a checkpoint."""
        with self._lock:
            main = self._mains.pop(save_id, None)
            if main is not None:
                self._abandoned.add(save_id)
                remove_shards(shard_folder(main), only=save_id)

    def abandon_main(self, main: Path) -> None:
        """Abandon the saves that would still write the file ``main``."""
        with self._lock:
            late = [save_id for save_id, file in self._mains.items() if file == main]
        for save_id in late:
            self.abandon(save_id)

    def remove_others(self, folder: Path, *kept: str) -> None:
        """Remove the shards of a folder, except those of pending saves and of saves to keep."""
        with self._lock:  # or a save could begin between the list of pending saves and the removal
            remove_shards(folder, kept=(*kept, *self._mains))


class _ShardIO(CheckpointIO):
    """Innermost ``CheckpointIO``: adds the commit to Lightning's file, and removes old shards.

    Attributes:
        io: The ``CheckpointIO`` that writes files.
        load: Called when a checkpoint was read.
        pending: Saves whose main file is not written yet.
    """

    def __init__(self, io: CheckpointIO, load: Load, pending: PendingSaves) -> None:
        self.io, self.load, self.pending = io, load, pending

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        commit = _commit_of(checkpoint)
        if commit is None:
            self.io.save_checkpoint(checkpoint, path, storage_options=storage_options)
            return
        target, save_id = local_path(path), commit["save_id"]
        # Lightning may copy its file into place, and so leave half of one: rename ours instead.
        temporary = target.with_name(f"{target.name}.{save_id}.part")
        try:
            self.io.save_checkpoint(
                {**checkpoint, COMMIT_KEY: commit}, str(temporary), storage_options=storage_options
            )
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            if not self.pending.finish(save_id, temporary, target):
                return
        except BaseException:
            temporary.unlink(missing_ok=True)
            self.pending.abandon(save_id)
            raise
        sync_folder(target.parent)
        for unfinished in target.parent.glob(f"{glob.escape(target.name)}.*.part"):
            unfinished.unlink(missing_ok=True)
        self.pending.remove_others(shard_folder(target), save_id)

    @override
    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint: dict[str, Any] = collectives.run_on_all_ranks(
            lambda: self.io.load_checkpoint(path, *args, **kwargs)
        )
        self.load(Path(path), checkpoint)
        return checkpoint

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        main = local_path(path)
        self.pending.abandon_main(main)
        self.io.remove_checkpoint(path)
        folder = shard_folder(main)
        if folder.is_dir():
            self.pending.remove_others(folder)
            if not any(folder.iterdir()):
                folder.rmdir()

    @override
    def teardown(self) -> None:
        self.io.teardown()


def _commit_of(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """Return the commit that states of tables refer to; let all refer to one object."""
    commit: dict[str, Any] | None = None
    for states in checkpoint.values():
        for state in states.values() if isinstance(states, dict) else ():
            if isinstance(state, dict) and table_state.REFERENCE in state:
                commit = commit or state[table_state.REFERENCE]
                state[table_state.REFERENCE] = commit
    return commit
