"""Path of the file that Lightning loads, for states that know only its content."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

# Arguments of Lightning's functions that load a file, by where these functions are.
_ARGUMENTS = {
    "lightning.pytorch.": "checkpoint_path",
    "pytorch_lightning.": "checkpoint_path",
    "lightning.fabric.": "path",
    "lightning_fabric.": "path",
}


def loading_file() -> Path | None:
    """Return the file that Lightning is loading a module from; None if it loads none.

    ``load_from_checkpoint``, ``ckpt_path`` and ``Fabric.load`` give a module the content of a file
    and never its path, and without ``CheckpointHook`` nobody else knows it. So the path is read
    where Lightning keeps it: in the argument of the function that loads.
    """
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        for package, argument in _ARGUMENTS.items():
            if module.startswith(package) and argument in frame.f_locals:
                file = _local_file(frame.f_locals[argument])
                if file is not None:
                    return file
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _local_file(given: object) -> Path | None:
    """Return the file that a path, a URL or an open file stands for; None if there is none."""
    path = getattr(given, "name", None) if isinstance(given, io.IOBase) else given
    if not isinstance(path, (str, os.PathLike)):
        return None
    file = os.fspath(path).removeprefix("file://")
    return Path(file) if os.path.isfile(file) else None


__all__ = ["loading_file"]
