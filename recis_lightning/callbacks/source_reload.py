"""Sources of a run: loaded when it starts, and again when a newer one is there."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from recis_lightning.arguments import check_int
from recis_lightning.callbacks.trainer_progress import trainer_progress
from recis_lightning.checkpoint.name_patterns import dense_tensors
from recis_lightning.checkpoint.source import Source
from recis_lightning.checkpoint.source_loader import OwnCheckpoint, SourceLoader
from recis_lightning.distributed import collectives

__all__ = ["SourceReload"]

_log = logging.getLogger(__name__)


class SourceReload:
    """Loads of a hook's sources at the right moments of a run.

    Args:
        sources: The sources; None or an empty list for none.
        reload_every: Optimizer steps between two looks for newer ones; None for no look.

    Raises:
        TypeError, ValueError: An argument is not what it should be.
    """

    def __init__(self, sources: list[Source] | None, reload_every: int | None) -> None:
        self._loader = SourceLoader([] if sources is None else sources)
        if reload_every is not None:
            check_int("reload_every", reload_every, 1, " or None")
            if not self._loader.sources:
                raise ValueError("reload_every: expected sources=[...] to reload, got none")
        self._every = reload_every
        self._done: weakref.ref[LightningModule] | None = None  # module that got the sources
        self._looked_at = 0  # global step
        self._resumed: dict[str, str] | None = None  # versions that the resumed run had loaded

    @property
    def is_used(self) -> bool:
        """Whether there are sources."""
        return bool(self._loader.sources)

    def setup(self) -> None:
        """Forget what another run had loaded; before a checkpoint is read."""
        self._resumed = None

    def load_before(
        self,
        module: LightningModule,
        path: Path,
        checkpoint: dict[str, Any],
        tables: Iterable[str],
        load_own: Callable[[], None],
    ) -> None:
        """Load the parts that a run's own checkpoint lacks, and then the tables of that one.

        Args:
            module: The module.
            path: The run's checkpoint.
            checkpoint: Its content.
            tables: Names of its tables.
            load_own: Loads these.
        """
        trainer = module.trainer
        if not self.is_used or trainer.state.fn is not TrainerFn.FITTING:
            load_own()
            return
        states = checkpoint.get("state_dict")
        dense = set(states) & dense_tensors(module).keys() if isinstance(states, dict) else set()
        own = OwnCheckpoint(path, {*tables, *dense}, load_own)
        self._loader.load(module, trainer_progress(trainer), own)
        self._done = weakref.ref(module)

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Load the sources unless the module has them; where a run resumes, the newer ones."""
        if not self.is_used:
            return
        if self._done is None or self._done() is not module:
            self._loader.load(module, trainer_progress(trainer))
            self._done = weakref.ref(module)
        if self._resumed is not None:
            self._loader.versions, self._resumed = self._resumed, None
            if self._every is not None:
                self._loader.load(module, trainer_progress(trainer), only_newer=True)

    def on_train_start(self, trainer: Trainer) -> None:
        """Count steps from here."""
        self._looked_at = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Load newer sources if it is time to look; what cannot be loaded waits for the next time.

        Only after an optimizer step: before it, tables hold gradients of rows.
        """
        step = trainer.global_step
        if self._every is None or step - self._looked_at < self._every:
            return
        self._looked_at = step
        try:
            self._loader.load(module, trainer_progress(trainer), only_newer=True)
        except (ValueError, OSError, RuntimeError) as error:
            if collectives.rank() == 0:
                _log.warning(
                    "Newer sources were not loaded at step %d, and nothing has changed; the next "
                    "look is at step %d: %s",
                    *(step, step + self._every, error),
                )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know: nothing without ``reload_every``."""
        return {} if self._every is None else {"versions": dict(self._loader.versions)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` returned."""
        versions = state.get("versions")
        if isinstance(versions, dict):
            self._resumed = {str(key): str(value) for key, value in versions.items()}
