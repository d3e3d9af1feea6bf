"""``CheckpointHook``: every rank saves and restores its rows beside Lightning's checkpoint."""

from __future__ import annotations

import glob
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import Strategy

from recis_lightning.callbacks.hook import Hook
from recis_lightning.checkpoint import new_save_id, remove_shards, sync_folder, write_shards
from recis_lightning.checkpoint.chunks import Advance
from recis_lightning.checkpoint.progress import (
    SHOWN_AFTER_SECONDS,
    Progress,
    no_progress,
    progress_bar,
)
from recis_lightning.checkpoint.reader import FOLDER_SUFFIX, KEY, Source, note_loaded
from recis_lightning.distributed import collectives
from recis_lightning.table import state as table_state
from recis_lightning.table.hash_table import HashTable, hash_tables

__all__ = ["CheckpointHook"]

_log = logging.getLogger(__name__)


class CheckpointHook(Hook):
    """Let every rank save its rows in files of its own, and load its part of what any ranks saved.

    Beside ``model.ckpt`` there is then a folder ``model.ckpt.tables`` with one safetensors file a
    table and rank. Lightning's file is written last and names them: a save that was cut short
    leaves the checkpoint before it as it was. Removing a checkpoint removes its folder too. A
    checkpoint of one number of ranks can be resumed on any other, with this hook; one process can
    load it without, as long as the folder is where it was written.

    Works with ``ModelCheckpoint`` in all its forms, ``trainer.save_checkpoint``,
    ``save_weights_only`` (rows are weights, and bring their optimizer state along) and
    ``AsyncCheckpointIO`` (rows are written at once, the rest in the background). While ranks fail,
    nothing is saved: they could no longer agree.

    Raises:
        MisconfigurationException: The strategy writes checkpoints in its own way.
        ValueError: On saving, two tables of one name, or a path that is no local file. On loading,
            other tables, another dim, dtype or optimizer, or files that are missing, damaged or of
            another save; no table has changed then.
    """

    def __init__(self) -> None:
        super().__init__()
        self._module: LightningModule | None = None
        self._loaded: Source | None = None
        self._failing = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take part in the Trainer's saving, loading and removing, from now on."""
        strategy = trainer.strategy
        if type(strategy).save_checkpoint is not Strategy.save_checkpoint:
            raise MisconfigurationException(
                f"CheckpointHook: {type(strategy).__name__} writes checkpoints in its own way, and "
                "tables would not be in them; use strategy='ddp' (or one device)"
            )
        self._module, self._loaded, self._failing = pl_module, None, False
        saving = vars(trainer).get(_OURS)
        if saving is None:
            saving = vars(trainer)[_OURS] = _ShardedSave(trainer)
            vars(trainer)["save_checkpoint"] = saving
        saving.hook = self
        _insert(strategy, self, saving)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that the optimizers, made since, go on with the state that was loaded."""
        source, self._loaded = self._loaded, None
        if source is not None:
            source.check_tables(_named(pl_module, source), strict=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save nothing more: other ranks may be elsewhere."""
        self._failing = True

    def load(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Let the module's tables take up their rows, before Lightning restores the rest.

        Args:
            path: Of Lightning's checkpoint.
            checkpoint: What it holds.
        """
        commit = checkpoint.get(KEY)
        if commit is None or self._module is None:
            return
        source = collectives.run_on_all_ranks(lambda: Source.of_commit(path, commit))
        own = _named(self._module, source)
        source.load(own, strict=False, progress=_progress(self._module.trainer))
        note_loaded(commit, own.values())
        self._loaded = source


_OURS = "_recis_lightning_save"


class _ShardedSave:
    """Stands in for ``trainer.save_checkpoint``: rows go to files first, states refer to them.

    Lightning calls no callback when it saves weights only, and tells none the path.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.hook: CheckpointHook
        self.unfinished = _Unfinished()
        self._trainer, self._save = trainer, trainer.save_checkpoint

    def __call__(self, filepath: str | Path, *args: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        tables = [] if trainer.lightning_module is None else hash_tables(trainer.lightning_module)
        if not tables:
            self._save(filepath, *args, **kwargs)
            return
        if self.hook._failing and trainer.world_size > 1:
            _log.warning("Not saved, because a rank failed: %s", filepath)
            return
        path = _local(filepath)
        folder = _folder(path)
        save_id = new_save_id()
        if trainer.is_global_zero:
            self.unfinished.begin(save_id, path)
        try:
            commit = write_shards(folder, tables, folder.name, _progress(trainer), save_id)
            self._write_main(tables, commit.to_state(), filepath, *args, **kwargs)
        except BaseException:
            self.unfinished.give_up(save_id)
            raise

    def _write_main(
        self,
        tables: list[HashTable],
        commit: dict[str, Any],
        filepath: str | Path,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Let Lightning write its file, with tables' states that refer to the shards."""
        for table in tables:
            table.shard_reference = {
                "schema": table_state.SCHEMA,
                "name": table.name,
                "embedding_dim": table.embedding_dim,
                table_state.REFERENCE: commit,
            }
        try:
            with _failing_together(self._trainer.strategy):
                self._save(filepath, *args, **kwargs)
        finally:
            for table in tables:
                table.shard_reference = None


@contextmanager
def _failing_together(strategy: Strategy) -> Iterator[None]:
    """Tell all ranks if one could not save; they would wait for it until they time out.

    What Lightning does first, asking callbacks and module what they have to save, may fail too.
    """
    write, told = strategy.save_checkpoint, False

    def save_checkpoint(*args: Any, **kwargs: Any) -> None:
        nonlocal told
        told = True
        collectives.run_on_all_ranks(lambda: write(*args, **kwargs))

    vars(strategy)["save_checkpoint"] = save_checkpoint
    try:
        yield
    except Exception as error:
        if not told:
            collectives.run_on_all_ranks(partial(_raise, error))
        raise
    finally:
        del vars(strategy)["save_checkpoint"]


def _raise(error: Exception) -> None:
    raise error


class _Unfinished:
    """Saves of whose shards no main file knows yet; rank 0's, which writes these files.

    The main file may be written on another thread, and later: until then other saves leave the
    shards alone, and what was given up meanwhile is not written any more.
    """

    def __init__(self) -> None:
        self._mains: dict[str, Path] = {}  # by save_id
        self._given_up: set[str] = set()
        self._lock = threading.Lock()

    def begin(self, save_id: str, main: Path) -> None:
        """Note a save that will write the file ``main``."""
        with self._lock:
            self._mains[save_id] = main

    def finish(self, save_id: str, temporary: Path, main: Path) -> bool:
        """Give a main file its name; return False if the save was given up, and the file goes."""
        with self._lock:
            if save_id in self._given_up:
                temporary.unlink()
                return False
            temporary.replace(main)
            self._mains.pop(save_id, None)
            return True

    def give_up(self, save_id: str) -> None:
        """Remove the shards of a save, unless its main file is there: then it is a checkpoint."""
        with self._lock:
            main = self._mains.pop(save_id, None)
            if main is not None:
                self._given_up.add(save_id)
                remove_shards(_folder(main), only=save_id)

    def give_up_main(self, main: Path) -> None:
        """Give up the saves that would still write the file ``main``."""
        with self._lock:
            late = [save_id for save_id, file in self._mains.items() if file == main]
        for save_id in late:
            self.give_up(save_id)

    def remove_others(self, folder: Path, *kept: str) -> None:
        """Remove a folder's shards, but for those of unfinished saves, and of saves to keep."""
        with self._lock:  # no save begins meanwhile, of which there are files
            remove_shards(folder, kept=(*kept, *self._mains))


class _ShardIO(CheckpointIO):
    """The innermost ``CheckpointIO``: knows when Lightning's file is whole, is read, and goes."""

    def __init__(self, io: CheckpointIO, hook: CheckpointHook, saving: _ShardedSave) -> None:
        self.io, self.hook, self.saving = io, hook, saving

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write the file that makes the shards a checkpoint; then those it replaces go."""
        state = _referred(checkpoint)
        if state is None:
            self.io.save_checkpoint(checkpoint, path, storage_options=storage_options)
            return
        target, save_id, saves = _local(path), state["save_id"], self.saving.unfinished
        # A file of its own first: Lightning's is copied here from elsewhere.
        temporary = target.with_name(f"{target.name}.{save_id}.part")
        try:
            self.io.save_checkpoint(
                {**checkpoint, KEY: state}, str(temporary), storage_options=storage_options
            )
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            if not saves.finish(save_id, temporary, target):
                return
        except BaseException:
            temporary.unlink(missing_ok=True)
            saves.give_up(save_id)
            raise
        sync_folder(target.parent)
        for unfinished in target.parent.glob(f"{glob.escape(target.name)}.*.part"):
            unfinished.unlink(missing_ok=True)
        saves.remove_others(_folder(target), save_id)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read the file, and let tables take up their rows."""
        checkpoint: dict[str, Any] = collectives.run_on_all_ranks(
            lambda: self.io.load_checkpoint(path, *args, **kwargs)
        )
        self.hook.load(Path(path), checkpoint)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the file, then its shards; what would be written there later is not."""
        main, saves = _local(path), self.saving.unfinished
        saves.give_up_main(main)
        self.io.remove_checkpoint(path)
        folder = _folder(main)
        if folder.is_dir():
            saves.remove_others(folder)
            if not any(folder.iterdir()):
                folder.rmdir()

    def teardown(self) -> None:
        """See ``CheckpointIO``."""
        self.io.teardown()


def _insert(strategy: Strategy, hook: CheckpointHook, saving: _ShardedSave) -> None:
    """Put a ``_ShardIO`` around what writes files; plugins that wrap it stay outside."""
    outer: _WrappingCheckpointIO | None = None
    io: Any = strategy.checkpoint_io
    while isinstance(io, _WrappingCheckpointIO):
        outer, io = io, io.checkpoint_io
    if isinstance(io, _ShardIO):
        io.hook, io.saving = hook, saving
    elif outer is None:
        strategy.checkpoint_io = _ShardIO(io, hook, saving)
    else:
        outer._checkpoint_io = _ShardIO(io, hook, saving)


def _referred(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """Return the commit that tables' states refer to, and let all refer to one object."""
    found: dict[str, Any] | None = None
    for states in checkpoint.values():
        for state in states.values() if isinstance(states, dict) else ():
            if isinstance(state, dict) and table_state.REFERENCE in state:
                found = found or state[table_state.REFERENCE]
                state[table_state.REFERENCE] = found
    return found


def _named(module: LightningModule, source: Source) -> dict[str, HashTable]:
    """Return the tables to load, by name."""
    own = {table.name: table for table in hash_tables(module)}
    if module.strict_loading:
        return own
    return {name: table for name, table in own.items() if name in source.names()}


def _folder(path: Path) -> Path:
    return path.with_name(path.name + FOLDER_SUFFIX)


def _local(path: str | Path) -> Path:
    text = os.fspath(path)
    if "://" in text and not text.startswith("file://"):
        raise ValueError(
            f"filepath: with CheckpointHook expected a local file, got {text!r}: every rank writes "
            "files beside it"
        )
    return Path(os.path.abspath(text.removeprefix("file://")))


def _progress(trainer: Trainer) -> Progress:
    """Return what shows progress beside the Trainer's own bar."""
    bar = trainer.progress_bar_callback
    if not isinstance(bar, RichProgressBar | TQDMProgressBar) or bar.is_disabled:
        return no_progress
    if isinstance(bar, RichProgressBar) and bar.progress is not None:
        return _RichTask(bar).show
    return progress_bar


class _RichTask:
    """A line more in Lightning's rich display, in MB."""

    def __init__(self, bar: RichProgressBar) -> None:
        self._display: Any = bar.progress

    @contextmanager
    def show(self, description: str, total_bytes: int) -> Iterator[Advance]:
        """See ``progress.Progress``."""
        display, since, done, task = self._display, time.monotonic(), 0, None

        def advance(more: int) -> None:
            nonlocal done, task
            done += more
            if task is None and time.monotonic() - since >= SHOWN_AFTER_SECONDS:
                task = display.add_task(f"{description} (MB)", total=total_bytes // 10**6)
            if task is not None:
                display.update(task, completed=done // 10**6)
                display.refresh()  # Lightning's display does not by itself

        try:
            yield advance
        finally:
            if task is not None:
                display.remove_task(task)
                display.refresh()
