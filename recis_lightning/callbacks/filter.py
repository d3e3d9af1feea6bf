"""``HashTableFilterHook``: count tables' training steps, and evict ids not seen recently."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from recis_lightning.arguments import check_int, explain_arguments
from recis_lightning.callbacks.finished_batches import FinishedBatches
from recis_lightning.callbacks.hook import Hook, batches_done, is_new_trainer
from recis_lightning.distributed import collectives
from recis_lightning.distributed.process_group import ProcessGroup
from recis_lightning.table.hash_table import HashTable, live_hash_tables
from recis_lightning.table.listing import hash_tables

__all__ = ["HashTableFilterHook"]

_log = logging.getLogger(__name__)


@explain_arguments()
class HashTableFilterHook(Hook):
    """Evict rows by the tables' eviction policies, every ``filter_interval`` batches.

    Under a ``Trainer``, after each training batch, the step of every table of the module grows
    by one; when ``filter_interval`` batches have passed since the last filtering, each table
    with an eviction policy evicts. If rows went, one line names the tables they went from, with the
    numbers of rows of all ranks before and after (logger ``recis_lightning.callbacks.filter``,
    INFO, rank 0): "Filtered 2 tables at step 501: item 1548 -> 1503, user 90 -> 88". The first
    batch anchors the interval, so filtering happens after batches ``1 + filter_interval``, ``1 + 2
    * filter_interval``... Validation, test and prediction count and evict nothing. With gradient
    accumulation a batch is a micro-batch.

    A table in ``eval()``, as in a frozen part of a module, neither counts nor evicts: its lookups
    stamp no row, so each would soon be old. A table that modules share follows the last ``eval()``
    or ``train()`` of any of them; call ``table.train()`` if one of them goes on training it.

    In a loop written by hand, call ``after_step(None, global_step)`` after each step; it works
    on every table alive in the process that has an eviction policy, except deep copies of tables
    that are alive: a copy kept as the best model stays as it is. Without such a table it says so
    once.

    The position (number of batches, last filtering) is part of Lightning's checkpoints; in
    another Trainer the hook starts anew. A checkpoint that is made after a batch's step but before
    this hook had its turn (Ctrl-C, an exception of another callback, a callback that saves) has the
    batch counted and filtered, as the run that resumes goes on with the next one. One
    hook per Trainer: two would count each batch twice, so Lightning rejects them.

    Args:
        filter_interval: Batches between filterings, at least 1; None filters nothing, and
            steps still count.

    Raises:
        TypeError: ``filter_interval`` is neither an int nor None.
        ValueError: ``filter_interval`` is below 1.

    Example:
        >>> hook = HashTableFilterHook(filter_interval=200)
        >>> for global_step in range(3):
        ...     hook.after_step(None, global_step)  # after the work of the step
        >>> hook.last_filter_step
        0
    """

    # on_train_batch_end calls after_step itself, with the number of batches.
    _self_called = frozenset({"after_step"})

    def __init__(self, filter_interval: int | None = 100) -> None:
        super().__init__()
        self.filter_interval = _check_interval("filter_interval", filter_interval)
        self.last_filter_step: int | None = None
        self._num_batches = 0
        self._tables: list[HashTable] | None = None  # the module's, during training
        self._said_idle = False
        self._targets = _NO_TARGETS
        self._ended: int | None = None  # batches done when this hook was last; None: no training
        self._batches: FinishedBatches | None = None
        self._has_failed = False

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: all but the run that this takes part in."""
        return {**vars(self), "_batches": None, "_targets": _NO_TARGETS}

    def reset_filter_interval(self, interval: int | None = 100) -> None:
        """Change the interval; the last filtering stays the anchor.

        Args:
            interval: As ``filter_interval``.

        Raises:
            TypeError: ``interval`` is neither an int nor None.
            ValueError: ``interval`` is below 1.
        """
        self.filter_interval = _check_interval("interval", interval)

    @override
    def after_step(self, _: Any, gstep: int | Tensor) -> None:
        """Count one training step, and filter when the interval has passed.

        Args:
            _: Ignored.
            gstep: The global step, an int or a tensor of one element.
        """
        step = int(gstep)
        if self.last_filter_step is None:
            self.last_filter_step = step
        tables = self._tables
        if tables is None:
            tables = self._live_tables()
        # A table in eval() stamps no row: counted on, it would lose all of them.
        tables = [table for table in tables if table.training]
        self._count(step, tables)
        if self.filter_interval is None or step - self.last_filter_step < self.filter_interval:
            return
        _evict([table for table in tables if table.eviction is not None], step)
        self.last_filter_step = step

    def _count(self, step: int, tables: Sequence[HashTable]) -> None:
        """Let the step of each table grow by one; once, if this is interrupted and done again.

        Only under a Trainer: in a loop by hand two calls for a step are two batches.
        """
        if self._tables is None:
            for table in tables:
                table.update_step()
            return
        if self._targets.step == step:  # this was interrupted
            for table, target in self._targets.tables:
                if table.step < target:
                    table.update_step()
            return
        self._targets = _Targets(step, [(table, table.step + 1) for table in tables])
        for table in tables:
            table.update_step()

    @property
    def runs_eviction(self) -> bool:
        """Whether this hook has tables evict."""
        return self.filter_interval is not None

    def idle_reason(self, tables: Sequence[HashTable]) -> str | None:
        """Return why there is nothing to do for a module's tables; None if there is something."""
        if self.filter_interval is None or any(table.eviction is not None for table in tables):
            return None
        return "no table of the module has an eviction policy"

    def _live_tables(self) -> list[HashTable]:
        """Return the tables of a loop written by hand."""
        with_policy = [table for table in live_hash_tables() if table.eviction is not None]
        tables = [table for table in with_policy if table.original is None]
        if not tables and not self._said_idle:
            self._said_idle = True
            why = "deep copies of live tables" if with_policy else "none"
            _log.warning("HashTableFilterHook has nothing to do: of tables with a policy %s", why)
        return tables

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start anew in another Trainer."""
        if stage == "fit" and is_new_trainer(self, trainer):
            self._num_batches, self.last_filter_step, self._tables = 0, None, None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tables = hash_tables(pl_module)
        self._targets, self._ended = _NO_TARGETS, batches_done(trainer)
        self._batches, self._has_failed = FinishedBatches.attach(trainer), False

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tables = hash_tables(pl_module)  # the module may have new ones

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batches_done(trainer)
        if self._ended != done:
            self._end_batch(pl_module, done)

    def finish_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the batch that Lightning counts as trained, unless that is done; before a save."""
        done = batches_done(trainer)
        if self._ended is not None and self._ended != done:
            self._end_batch(pl_module, done)

    def _end_batch(self, pl_module: LightningModule, done: int) -> None:
        """Count a batch, and filter; if this is interrupted, it can be done again."""
        if self._tables is None:
            self._tables = hash_tables(pl_module)
        # Not trainer.global_step: it does not change while gradients accumulate, and grows by
        # several when several optimizers step.
        step = self._num_batches + 1
        self.after_step(None, step)
        vars(self).update(_num_batches=step, _ended=done)  # both or neither
        self._targets = _NO_TARGETS
        if self._batches is not None:
            self._batches.note_end()
        if self._has_failed:
            self._tables = None

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tables, self._ended, self._targets = None, None, _NO_TARGETS
        self._batches = None
        FinishedBatches.detach(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._tables, self._has_failed = None, True  # what a checkpoint needs yet stays

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"num_batches": self._num_batches, "last_filter_step": self.last_filter_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._num_batches = state_dict["num_batches"]
        self.last_filter_step = state_dict["last_filter_step"]


class _Targets(NamedTuple):
    """Tables that a step is counted for, and the step that each is to reach by it."""

    step: int
    tables: list[tuple[HashTable, int]]


_NO_TARGETS = _Targets(-1, [])


def _check_interval(argument: str, interval: int | None) -> int | None:
    if interval is None:
        return None
    return check_int(argument, interval, least=1, alternative=" or None")


def _evict(tables: Sequence[HashTable], step: int) -> None:
    """Have tables evict, and log what went on all ranks in one line of rank 0."""
    counts: dict[ProcessGroup | None, list[tuple[str, int, int]]] = {}
    for table in tables:
        before = len(table)
        after = before - int(table.evict())
        counts.setdefault(table.process_group, []).append((table.name, before, after))
    changes = [
        change
        for process_group, own in counts.items()
        for change in _changes(own, collectives.gather(own, process_group))
    ]
    if changes and collectives.rank() == 0:
        number = f"{len(changes)} table{'s' if len(changes) > 1 else ''}"
        _log.info("Filtered %s at step %d: %s", number, step, ", ".join(changes))


def _changes(
    counts: Sequence[tuple[str, int, int]], ranks: Sequence[Sequence[tuple[str, int, int]]]
) -> list[str]:
    """Return what went, for each table of which something did: "item 1548 -> 1503".

    Args:
        counts: Of each table its name, and its rows on this rank before and after.
        ranks: Those of all ranks.
    """
    changes = []
    for index, (name, *_) in enumerate(counts):
        # By hand, a rank may have other tables.
        parts = [
            rank[index] for rank in ranks if rank[index : index + 1] and rank[index][0] == name
        ]
        before, after = sum(part[1] for part in parts), sum(part[2] for part in parts)
        if before != after:
            changes.append(f"{name} {before} -> {after}")
    return changes
