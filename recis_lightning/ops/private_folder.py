"""Folders for compiled kernels that nobody else can write to.

Loading a kernel runs what is in its file. So a folder that another user owns or can write to is
refused, and a new one is made for its user alone.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from recis_lightning import system_calls


def open_private(folder: Path) -> str | None:
    """Make a folder with mode 0700 if it is missing, and check it.

    Returns:
        None if only this user (and root) can change what is in it; else why it is refused.

    Example:
        >>> import tempfile
        >>> open_private(Path(tempfile.mkdtemp()) / "kernels") is None
        True
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.lstat(folder)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    if not stat.S_ISDIR(status.st_mode):
        return f"{folder} is a link, or no folder"
    if (who := system_calls.others_may_write(status)) is not None:
        return f"{folder} {who}"
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return f"{folder} cannot be written to"
    return None


__all__ = ["open_private"]
