"""Path of the file that Lightning loads, for states that know only its content."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_ARGUMENT = "checkpoint_path"  # of Lightning's functions that load a file


def loading_file() -> Path | None:
    """Return the file that Lightning is loading a module from; None if it loads none.

    ``load_from_checkpoint`` and ``ckpt_path`` give a module the content of a file and never its
    path, and without ``CheckpointHook`` nobody else knows it. So the path is read where Lightning
    keeps it: in the argument of the function that loads.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(_PACKAGES):
            path = frame.f_locals.get(_ARGUMENT)
            if isinstance(path, (str, os.PathLike)) and os.path.isfile(path):
                return Path(path)
        frame = frame.f_back  # type: ignore[assignment]
    return None


_PACKAGES = ("lightning.", "pytorch_lightning.")

__all__ = ["loading_file"]
