"""``CheckpointIO`` that makes shards a checkpoint when Lightning's file is written."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import Strategy
from typing_extensions import override

from recis_lightning.callbacks.left_out import without_left_out
from recis_lightning.checkpoint.commit import (
    COMMIT_KEY,
    FOLDER_SUFFIX,
    FORMAT,
    Commit,
    remove_files,
    remove_unfinished,
    saved_by,
    sync_folder,
    unfinished_main,
)
from recis_lightning.checkpoint.reader import read_lightning_file
from recis_lightning.checkpoint.save_lock import (
    begin_save,
    clear_killed_saves,
    end_save,
    fail_save,
    note_replaced,
    removing,
)
from recis_lightning.checkpoint.shard_file import ShardFile
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

    The main file may be written later, on another thread. Until then this Trainer holds the lock of
    their folder; the main file of an abandoned save is not written.
    """

    def __init__(self) -> None:
        self._mains: dict[str, Path] = {}  # by save_id
        self._abandoned: set[str] = set()  # by save_id
        self._lock = threading.Lock()

    def begin(self, save_id: str, main: Path) -> None:
        """Add a save that will write the file ``main``; clear what killed saves left beside it.

        Raises:
            RuntimeError: Another process or Trainer saves to that path.
        """
        for folder in main.parent.glob(f"*{FOLDER_SUFFIX}") if main.parent.is_dir() else ():
            if folder != shard_folder(main):
                other = folder.with_name(folder.name.removesuffix(FOLDER_SUFFIX))
                clear_killed_saves(folder, partial(_current_commit, other))
        with self._lock:
            self._mains[save_id] = main  # first: whatever interrupts, it can be abandoned
        begin_save(shard_folder(main), save_id, self, partial(_current_commit, main))

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
            if main is None:
                return
            self._abandoned.add(save_id)
        folder = shard_folder(main)
        remove_unfinished(folder, [save_id])
        fail_save(folder, save_id, partial(_current_commit, main))
        with contextlib.suppress(OSError):  # of saves before it
            folder.rmdir()

    def abandon_main(self, main: Path) -> None:
        """Abandon the saves that would still write the file ``main``."""
        with self._lock:
            late = [save_id for save_id, file in self._mains.items() if file == main]
        for save_id in late:
            self.abandon(save_id)


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
        folder = shard_folder(target)
        # Lightning may copy its file into place, and so leave half of one: rename ours instead.
        temporary = unfinished_main(folder, save_id)
        try:
            self.io.save_checkpoint(
                {**without_left_out(checkpoint, commit), COMMIT_KEY: commit},
                str(temporary),
                storage_options=storage_options,
            )
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            replaced = _files_to_replace(target, save_id)
            note_replaced(folder, replaced)
            if not self.pending.finish(save_id, temporary, target):
                return
            sync_folder(target.parent)
            remove_files(folder, replaced)
        except BaseException:
            temporary.unlink(missing_ok=True)
            self.pending.abandon(save_id)
            fail_save(folder, save_id, partial(_current_commit, target))
            raise
        finally:
            end_save(folder, save_id)

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
        folder, current = shard_folder(main), partial(_current_commit, main)
        with removing(folder, _files_to_replace(main), current):
            self.io.remove_checkpoint(path)
        clear_killed_saves(folder, current)

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


def _current_commit(main: Path) -> Commit | None:
    """Return the commit in Lightning's file; None without one; ValueError if it is not readable."""
    if not os.path.lexists(main):
        return None
    state = read_lightning_file(main).get(COMMIT_KEY)
    return None if state is None else Commit.from_state(state, str(main))


def _files_to_replace(main: Path, save_id: str | None = None) -> set[str]:
    """Return the names of the shards of a file that is about to go.

    Args:
        main: Lightning's file.
        save_id: That of the save that replaces it, whose shards are there already.
    """
    try:
        commit = None if main.is_symlink() else _current_commit(main)
    except ValueError:
        # It holds objects that are not loaded unless one trusts it. The shards' own headers tell
        # which of the files beside it we wrote.
        return {file.name for file in shard_folder(main).glob("*") if _is_shard(file, save_id)}
    return set() if commit is None else commit.files()


def _is_shard(file: Path, other_than: str | None) -> bool:
    save_id = saved_by(file.name)
    if save_id is None or save_id == other_than:
        return False
    try:
        metadata = ShardFile(file).metadata
    except ValueError:
        return False
    return (metadata.get("format"), metadata.get("save_id")) == (FORMAT, save_id)
