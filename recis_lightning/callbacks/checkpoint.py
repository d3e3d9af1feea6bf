"""``CheckpointHook``: every rank saves and restores its rows beside Lightning's checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy

from recis_lightning.arguments import explain_arguments
from recis_lightning.callbacks.finished_batches import FinishedBatches
from recis_lightning.callbacks.first_checkpoint import link_first
from recis_lightning.callbacks.fit_checks import check_fit, check_table_names
from recis_lightning.callbacks.hook import Hook
from recis_lightning.callbacks.left_out import keep_left_out
from recis_lightning.callbacks.preemption import Preemption
from recis_lightning.callbacks.save_interception import intercept_saves
from recis_lightning.callbacks.shard_io import PendingSaves, local_path, shard_folder, wrap_io
from recis_lightning.callbacks.source_reload import SourceReload
from recis_lightning.callbacks.trainer_progress import trainer_progress
from recis_lightning.callbacks.uneven_batches import UnevenBatches
from recis_lightning.checkpoint.commit import COMMIT_KEY, Commit, new_save_id
from recis_lightning.checkpoint.name_patterns import table_parts
from recis_lightning.checkpoint.part_filter import PartFilter
from recis_lightning.checkpoint.reader import CheckpointReader
from recis_lightning.checkpoint.saved_tables import FitRules
from recis_lightning.checkpoint.shard_loader import SHARD_LOADER
from recis_lightning.checkpoint.source import Source
from recis_lightning.checkpoint.state_tables import StateTables
from recis_lightning.checkpoint.writer import write_shards
from recis_lightning.distributed import collectives
from recis_lightning.table import state as table_state
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.listing import hash_tables

__all__ = ["CheckpointHook"]

_log = logging.getLogger(__name__)

_KEY = "_recis_lightning_save"


@explain_arguments()
class CheckpointHook(Hook):
    """Let every rank save its rows in files of its own, and load its part of what any ranks saved.

    Beside ``model.ckpt`` there is then a folder ``model.ckpt.tables`` with one safetensors file a
    table and rank. Lightning's file is written last and names them: a save that was cut short
    leaves the checkpoint before it as it was, and the next save of that path, or beside it, clears
    what it left. Removing a checkpoint removes its folder too, but no file that it does not name. A
    checkpoint of one number of ranks can be resumed on any other, with this hook; one process can
    load it without. Copy or move file and folder together.

    Works with ``ModelCheckpoint`` in all its forms, ``trainer.save_checkpoint``,
    ``save_weights_only`` (rows are weights, and bring their optimizer state along) and
    ``AsyncCheckpointIO`` (rows are written at once, the rest in the background). While ranks fail,
    nothing is saved: they could no longer agree.

    A run that gets SIGTERM or SIGUSR1, on any rank, saves ``last-preempted.ckpt`` after a batch and
    leaves on all ranks by Lightning's ``SIGTERMException``; under SLURM it is queued again.

    Args:
        exclude: Names or patterns of parts that are not saved: "user" is a table, "*.exp_avg*"
            the optimizer state of tables, "tower.*" dense tensors of the ``state_dict``. A run that
            resumes keeps such a table or tensor as it is; the state of a table of which a part was
            left out starts afresh. Optimizer state of dense tensors is always saved. Of several
            hooks, each leaves out what it names.
        save_filter: Called at each save with the names of the parts that ``exclude`` left, by all
            ranks; returns those to save.
        sources: Files that tables and dense tensors come from when a run starts, each a
            ``Source(path, load, exclude, rename, clear, skip_missing)``. Later ones win, and the
            checkpoint that the run resumes from (``ckpt_path``) wins over all. Rank 0 prints the
            plan before anything changes; after an error everything is as it was. They are loaded
            once for each module, in ``fit`` alone. Optimizer state of dense tensors starts afresh.
        reload_every: Optimizer steps after which newer sources are looked for, and loaded as at the
            start; gradients are none then. One that cannot be loaded is logged and waits for
            the next look. None does not look.

    Raises:
        MisconfigurationException: The strategy writes checkpoints in its own way.
        RuntimeError: On saving, another process or Trainer saves to that path; names it.
        TypeError: An argument is not what it should be.
        ValueError: At the start of a run, two tables of one name. On saving, a path that is no
            local file. On loading, other tables, another dim, dtype or optimizer, or files that are
            missing, damaged or of another save; no table has changed then.
    """

    def __init__(
        self,
        exclude: list[str] | None = None,
        save_filter: Callable[[list[str]], Iterable[str]] | None = None,
        sources: list[Source] | None = None,
        reload_every: int | None = None,
    ) -> None:
        super().__init__()
        self._parts = PartFilter(exclude, save_filter)
        self._sources = SourceReload(sources, reload_every)
        own = type(self).on_train_batch_end is CheckpointHook.on_train_batch_end
        if reload_every is None and own:  # Lightning skips what cannot be called, at no cost
            vars(self)["on_train_batch_end"] = None
        if reload_every is None and type(self).state_dict is CheckpointHook.state_dict:
            # Of hooks with a state Lightning takes one; there may be two of those without.
            vars(self)["state_dict"] = super().state_dict
        self._module: LightningModule | None = None
        self._loaded: CheckpointReader | None = None
        self._save: _ShardedSave | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: all but the run that this takes part in."""
        return {**self.__dict__, "_module": None, "_loaded": None, "_save": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take part in the Trainer's saving, loading and removing of checkpoints, to its end."""
        strategy = trainer.strategy
        if type(strategy).save_checkpoint is not Strategy.save_checkpoint:
            raise MisconfigurationException(
                f"CheckpointHook: {type(strategy).__name__} writes checkpoints in its own way, and "
                "tables would not be in them; use strategy='ddp' (or one device)"
            )
        check_table_names("CheckpointHook", hash_tables(pl_module))
        self._module, self._loaded = pl_module, None
        self._sources.setup()
        self._save = vars(trainer).setdefault(_KEY, _ShardedSave(trainer))
        hooks = [self, *(one for one in trainer.callbacks if isinstance(one, CheckpointHook))]  # type: ignore[attr-defined]
        self._save.failing = False
        self._save.parts = list({id(hook): hook._parts for hook in hooks}.values())
        intercept_saves(trainer, self._save, innermost=True)
        wrap_io(strategy, self.load, self._save.pending)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the optimizers, made since, keep the state that was loaded."""
        check_table_names("CheckpointHook", hash_tables(pl_module))  # configure_model made some
        check_fit(trainer, pl_module)
        UnevenBatches.attach(trainer)
        if hash_tables(pl_module):
            Preemption.attach(trainer)
        self._tell_unused(pl_module)
        self._sources.on_fit_start(trainer, pl_module)
        reader, self._loaded = self._loaded, None
        if reader is not None:
            reader.check_tables(
                _tables_to_load(pl_module, reader), FitRules(), whole=pl_module.strict_loading
            )

    def _tell_unused(self, module: LightningModule) -> None:
        """Log, on rank 0, which patterns leave nothing out."""
        unused = self._parts.unused(hash_tables(module), module)
        if unused and collectives.rank() == 0:
            _log.warning(
                "CheckpointHook: exclude=%s leaves nothing out: the model has the tables and state "
                "%s",
                *(unused, table_parts(hash_tables(module))),
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the steps to the next look for newer sources."""
        FinishedBatches.attach(trainer)
        self._sources.on_train_start(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save from now on without a look at the batch."""
        FinishedBatches.detach(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Load newer sources, every ``reload_every`` steps."""
        self._sources.on_train_batch_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the versions of the sources that were loaded; nothing without ``reload_every``."""
        return self._sources.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the versions of sources of the run that goes on."""
        self._sources.load_state_dict(state_dict)

    def idle_reason(self, tables: Sequence[HashTable]) -> str | None:
        """Return why there is nothing to do for a module's tables; None if there is something."""
        return None if tables else "the module has no tables"

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save nothing more, unless all ranks leave together: others may be elsewhere."""
        if self._save is not None and not Preemption.leads(trainer):
            self._save.failing = True

    def load(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Load the module's tables, before Lightning restores the rest of a checkpoint.

        Args:
            path: Lightning's file.
            checkpoint: Its content.
        """
        commit = checkpoint.get(COMMIT_KEY)
        if self._module is None:
            return
        if commit is None:
            self._load_before(path, checkpoint)
            return
        reader = collectives.run_on_all_ranks(
            lambda: CheckpointReader.of_lightning(path, checkpoint)
        )
        tables = _tables_to_load(self._module, reader)
        strict = self._module.strict_loading
        progress = trainer_progress(self._module.trainer)
        work = partial(reader.load, tables, FitRules(strict=False), progress, whole=strict)
        self._sources.load_before(self._module, path, checkpoint, reader.names(), work)
        keep_left_out(path, self._module, checkpoint, reader)
        if not strict:
            _tell_what_is_left(path, self._module, reader)
        # Not by the place in the module, as states are loaded: other tables stay as they are.
        SHARD_LOADER.note_loaded(commit, hash_tables(self._module))
        self._loaded = reader

    def _load_before(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Load the sources before a checkpoint without shards, whose tables Lightning loads."""
        if self._module is not None and self._sources.is_used:
            states = StateTables(checkpoint.get("state_dict", {}), path)
            self._sources.load_before(self._module, path, checkpoint, states.names(), _nothing)


def _nothing() -> None:
    """Do nothing."""


def _tables_to_load(module: LightningModule, reader: CheckpointReader) -> dict[str, HashTable]:
    """Return the module's tables by name; unless it loads strictly, those that were saved."""
    tables = {table.name: table for table in hash_tables(module)}
    if module.strict_loading:
        return tables
    return {name: table for name, table in tables.items() if name in reader.names()}


def _tell_what_is_left(path: Path, module: LightningModule, reader: CheckpointReader) -> None:
    """Log, on rank 0, which tables were loaded and which were not, if not all were."""
    saved, own = set(reader.names()), {table.name for table in hash_tables(module)}
    if saved != own and collectives.rank() == 0:
        _log.warning(
            "strict_loading=False: loaded the tables %s of %s; it has no rows of %s, and the model "
            "has no tables %s",
            sorted(saved & own), path, sorted(own - saved), sorted(saved - own),
        )  # fmt: skip


class _ShardedSave:
    """Interceptor of saves: rows are written to shards first, and states refer to these.

    One for each Trainer, whatever number of hooks it has.

    Attributes:
        failing: Whether a rank failed, and nothing is to be saved.
        pending: Saves whose main file is not written yet.
        parts: What is not saved, by each hook.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.failing = False
        self.parts: list[PartFilter] = []
        self.pending = PendingSaves()
        self._trainer = trainer

    def __call__(
        self, save: Callable[..., None], filepath: str | Path, *args: Any, **kwargs: Any
    ) -> None:
        trainer = self._trainer
        tables = [] if trainer.lightning_module is None else hash_tables(trainer.lightning_module)
        if not tables:
            save(filepath, *args, **kwargs)
            return
        if self.failing and trainer.world_size > 1:
            _log.warning("Not saved, because a rank failed: %s", filepath)
            return
        path, save_id = local_path(filepath), new_save_id()
        folder = shard_folder(path)

        def begin() -> None:
            if trainer.is_global_zero:
                self.pending.begin(save_id, path)

        try:
            collectives.run_on_all_ranks(begin)
            excluded = collectives.run_on_all_ranks(lambda: self._excluded(tables))
            progress = trainer_progress(trainer)
            commit = write_shards(folder, tables, folder.name, progress, save_id, excluded)
            with _states_refer_to(commit, tables), _errors_on_all_ranks(trainer.strategy):
                save(filepath, *args, **kwargs)
        except BaseException:
            self.pending.abandon(save_id)
            raise
        if not (kwargs.get("weights_only") or any(args[:1])):
            link_first(trainer, path)

    def _excluded(self, tables: list[HashTable]) -> list[str]:
        """Return the names of the parts that any hook leaves out."""
        module = self._trainer.lightning_module
        found = [name for parts in self.parts for name in parts.excluded(tables, module)]
        return list(dict.fromkeys(found))


@contextmanager
def _states_refer_to(commit: Commit, tables: list[HashTable]) -> Iterator[None]:
    """Let the states of tables refer to shards, in place of rows."""
    state = commit.to_state()
    for table in tables:
        table.shard_reference = {
            "schema": table_state.SCHEMA,
            "name": table.name,
            "embedding_dim": table.embedding_dim,
            table_state.REFERENCE: state,
        }
    try:
        yield
    finally:
        for table in tables:
            table.shard_reference = None


@contextmanager
def _errors_on_all_ranks(strategy: Strategy) -> Iterator[None]:
    """Raise on all ranks if one cannot save; they would wait for it until they time out.

    Before Lightning writes, callbacks and module return their states: this may fail on one rank.
    """
    write, reached = strategy.save_checkpoint, False

    def save_checkpoint(*args: Any, **kwargs: Any) -> None:
        nonlocal reached
        reached = True
        collectives.run_on_all_ranks(lambda: write(*args, **kwargs))

    vars(strategy)["save_checkpoint"] = save_checkpoint
    try:
        yield
    except Exception as error:
        if not reached:
            collectives.run_on_all_ranks(partial(_raise, error))
        raise
    finally:
        del vars(strategy)["save_checkpoint"]


def _raise(error: Exception) -> None:
    raise error
