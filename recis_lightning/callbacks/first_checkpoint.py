"""Link to a run's first checkpoint while its ``ModelCheckpoint`` has not saved a last one.

With ``save_last=True`` Lightning saves twice, another checkpoint first, and ``ckpt_path="last"``
looks for the last one alone. If a run is killed between its first two saves, or in the second, it
would begin again though a whole checkpoint is there.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

_SUFFIX = "-whole"  # a name that begins as the last one's is found, too


def link_first(trainer: Any, path: Path) -> None:
    """Link to a saved checkpoint where ``ckpt_path="last"`` looks, until there is a last one.

    Does nothing where the file system has no links, and off rank 0.

    Args:
        trainer: Its callbacks of ``save_last=True`` that save beside ``path`` are looked after.
        path: A checkpoint that has just been saved, with all that a run resumes from.
    """
    if not trainer.is_global_zero:
        return
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.save_last is not True:
            continue
        if callback.dirpath is None or Path(callback.dirpath) != path.parent:
            continue
        link = path.with_name(f"{callback.CHECKPOINT_NAME_LAST}{_SUFFIX}{callback.FILE_EXTENSION}")
        last = {Path(found) for found in callback._find_last_checkpoints(trainer)} - {link}
        with suppress(OSError):
            if last or path.name.startswith(callback.CHECKPOINT_NAME_LAST):
                if link.is_symlink():
                    link.unlink()
            elif not os.path.lexists(link):
                link.symlink_to(path.name)


__all__ = ["link_first"]
