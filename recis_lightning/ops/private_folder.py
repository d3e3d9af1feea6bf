"""Folders for compiled kernels that nobody else can write to.

Loading a kernel runs what is in its file. So a folder that another user owns or can write to is
refused, and a new one is made for its user alone.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


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
    if status.st_uid != os.geteuid():
        return f"{folder} belongs to user {status.st_uid}, and this is user {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{folder} can be written to by others (mode {stat.S_IMODE(status.st_mode):o})"
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return f"{folder} cannot be written to"
    return None


__all__ = ["open_private"]
