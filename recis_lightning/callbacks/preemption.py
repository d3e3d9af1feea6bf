"""Preemption: a run that is told to end by a signal saves between two batches, and leaves.

Lightning acts within the handler of a signal: it broadcasts, or saves, wherever this rank is then,
which is another place on each rank. Here a handler only notes the signal.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from recis_lightning.callbacks.save_interception import intercept_saves, release_saves
from recis_lightning.distributed import collectives
from recis_lightning.distributed.stop_request import STOP_REQUEST

__all__ = ["Preemption"]

_log = logging.getLogger(__name__)

# Lightning's handlers, by the names under which its signal connector has them.
_ON_TERMINATION, _ON_REQUEUE = "_sigterm_notifier_fn", "_slurm_sigusr_handler_fn"
_USER_SIGNAL = getattr(signal, "SIGUSR1", None)  # which Windows lacks
_EXIT = 128  # and the signal's number: the status by which a launcher knows a signal
_REQUEUE = 256  # and the signal's number: SLURM is to be asked to start the job again


class Preemption(Checkpoint):
    """Save once after a batch when any rank is told to end, and leave on all ranks together.

    ``CheckpointHook`` adds it to a Trainer that fits. Lightning registers its handlers for SIGTERM
    and, under SLURM, for the requeue signal, as ever; in their place this one notes the signal.
    Without SLURM SIGUSR1 is taken too, if nothing else takes it.

    Attributes:
        best_model_path: None is known; Lightning asks each checkpoint callback.
        leaving: Whether all ranks leave, at the same place.
    """

    best_model_path = ""

    def __init__(self) -> None:
        super().__init__()
        self.leaving = False

    @classmethod
    def attach(cls, trainer: Trainer) -> None:
        """Add the callback, as the last that acts after a batch; before handlers are registered."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        found = next((part for part in callbacks if isinstance(part, cls)), None) or cls()
        # Another list: Lightning may go through this one. Last, it saves what all others did.
        others = [part for part in callbacks if part is not found]
        trainer.callbacks = [*others, found]  # type: ignore[attr-defined]
        found._take_signals(trainer)

    @classmethod
    def leads(cls, trainer: Trainer) -> bool:
        """Return whether all ranks leave the run at the same place, and may still save."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        return any(isinstance(part, cls) and part.leaving for part in callbacks)

    def _take_signals(self, trainer: Any) -> None:
        STOP_REQUEST.clear()
        self.leaving = False
        connector = trainer._signal_connector
        vars(connector)[_ON_TERMINATION] = _note
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            vars(connector)[_ON_REQUEUE] = _note_requeue

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning has noted what takes each signal, and restores that when the run ends.
        if (
            _USER_SIGNAL is not None
            and threading.current_thread() is threading.main_thread()
            and signal.getsignal(_USER_SIGNAL) is signal.SIG_DFL
        ):
            signal.signal(_USER_SIGNAL, _note)

    @override
    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if STOP_REQUEST.agreed() and not self._ends(trainer) and not self._validates(trainer):
            self._leave(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if STOP_REQUEST.agreed() and not trainer.sanity_checking and not self._ends(trainer):
            self._leave(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if STOP_REQUEST.agreed():
            self._leave(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._give_back(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._give_back(trainer)

    def _give_back(self, trainer: Any) -> None:
        """Let Lightning's own handlers stand again, in runs that this callback is not told of."""
        connector = trainer._signal_connector
        for name in (_ON_TERMINATION, _ON_REQUEUE):
            vars(connector).pop(name, None)
        # A signal that came after the last batch: the program may ask for it.
        connector.received_sigterm = connector.received_sigterm or bool(STOP_REQUEST.own)

    def _ends(self, trainer: Any) -> bool:
        """Return whether the epoch ends with this batch: what follows it belongs to it."""
        loop = trainer.fit_loop.epoch_loop
        stops = trainer.should_stop and trainer.fit_loop._can_stop_early
        return bool(loop.batch_progress.is_last_batch or loop._is_training_done or stops)

    def _validates(self, trainer: Any) -> bool:
        """Return whether a validation follows this batch, which a resumed run would skip."""
        loop = trainer.fit_loop
        if trainer._val_check_time_interval is not None or loop.epoch_loop.val_loop.skip:
            return False  # clocks of ranks differ
        return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))

    def _leave(self, trainer: Any) -> None:
        """Save, and end the run on this rank as on the others."""
        requeue, signum = divmod(STOP_REQUEST.agreed(), _REQUEUE)
        self.leaving = True
        if not trainer.fast_dev_run:
            path = collectives.gather(_path(trainer))[0]
            if requeue:
                with _saves_to(trainer, path):
                    connector = trainer._signal_connector
                    getattr(type(connector), _ON_REQUEUE)(connector, signum, None)
            else:
                trainer.save_checkpoint(path)
            _log.info("Saved after signal %d, before leaving: %s", signum, path)
        trainer._signal_connector.received_sigterm = True
        raise SIGTERMException(0 if _is_child_of_rank_0(trainer) else _EXIT + signum)


def _note(signum: int, frame: Any) -> None:
    """Note a signal; a handler."""
    STOP_REQUEST.note(int(signum))


def _note_requeue(signum: int, frame: Any) -> None:
    """Note a signal after which SLURM is to start the job again; a handler."""
    STOP_REQUEST.note(_REQUEUE + signum)


def _path(trainer: Any) -> str:
    """Return where to save: beside other checkpoints, where ``ckpt_path="last"`` looks."""
    folder, name = trainer.default_root_dir, ModelCheckpoint.CHECKPOINT_NAME_LAST
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            folder = callback.dirpath
            break
    return os.path.join(folder, f"{name}-preempted{ModelCheckpoint.FILE_EXTENSION}")


@contextmanager
def _saves_to(trainer: Trainer, path: str) -> Iterator[None]:
    """Save to ``path`` whatever is saved, with a link where it was to be.

    SLURM's next run takes the name of the greatest number that Lightning's rule finds, also if a
    save was killed that had begun it. A link is there only when the checkpoint is whole.
    """

    def save_and_link(save: Callable[..., None], filepath: str, *args: Any, **kwargs: Any) -> None:
        save(path, *args, **kwargs)
        if trainer.is_global_zero:
            link = Path(filepath)
            link.parent.mkdir(parents=True, exist_ok=True)
            unfinished = link.with_name(f".{secrets.token_hex(4)}")
            unfinished.symlink_to(os.path.relpath(path, link.parent))
            unfinished.replace(link)

    intercept_saves(trainer, save_and_link)
    try:
        yield
    finally:
        release_saves(trainer, save_and_link)


def _is_child_of_rank_0(trainer: Any) -> bool:
    """Return whether Lightning on rank 0 started this process, and kills itself if it fails."""
    environment = trainer._accelerator_connector.cluster_environment
    return isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
