"""``WindowCheckpoint``: a checkpoint after every so many windows of data."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from recis_lightning.arguments import check_int, explain_arguments
from recis_lightning.callbacks.windows import current_window

__all__ = ["WindowCheckpoint"]

_log = logging.getLogger(__name__)


@explain_arguments()
class WindowCheckpoint(Checkpoint):
    """Save a checkpoint after every so many windows, named as the window that was learned last.

    Beside ``CheckpointHook`` the rows of all ranks are in it. A run that resumes from it goes on
    with the next window. Windows are those of ``ProgressiveValidation``, which must be there too;
    without windows, nothing is saved, and a warning says so.

    Args:
        dirpath: Folder of the checkpoints; made if it is not there.
        every_n_windows: Windows from one checkpoint to the next.
        keep: How many to keep, the newest; None keeps all.

    Raises:
        TypeError, ValueError: An argument is not what it should be.

    Example:
        >>> WindowCheckpoint("checkpoints", every_n_windows=24, keep=7).paths
        []
    """

    def __init__(
        self, dirpath: str | os.PathLike[str], every_n_windows: int = 1, keep: int | None = None
    ) -> None:
        super().__init__()
        if not isinstance(dirpath, (str, os.PathLike)):
            raise TypeError(f"dirpath: expected the path of a folder, got {dirpath!r}")
        self._folder = Path(dirpath)
        self._every = check_int("every_n_windows", every_n_windows, 1)
        self._keep = None if keep is None else check_int("keep", keep, 1, " or None")
        self.paths: list[str] = []  # of the checkpoints that are kept, the oldest first

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if nothing will be saved."""
        if current_window(trainer) is None and trainer.is_global_zero:
            _log.warning(
                "WindowCheckpoint saves nothing: this run has no windows; add "
                "ProgressiveValidation() to its callbacks"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, if it is time."""
        window = current_window(trainer)
        if window is None or (trainer.current_epoch + 1) % self._every:
            return
        path = str(self._folder / f"{quote(window, safe=' :+')}.ckpt")
        self.paths = [kept for kept in self.paths if kept != path] + [path]
        gone = [] if self._keep is None else self.paths[: -self._keep]
        self.paths = self.paths[len(gone) :]  # before it is saved, with this list
        trainer.save_checkpoint(path)
        for old in gone:
            trainer.strategy.remove_checkpoint(old)

    def state_dict(self) -> dict[str, Any]:
        """Return the paths that are kept."""
        return {"paths": list(self.paths)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the paths that were kept, if they are in the same folder."""
        paths = [str(path) for path in state_dict.get("paths", ())]
        self.paths = [path for path in paths if Path(path).parent == self._folder]
