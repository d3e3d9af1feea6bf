"""Files of a checkpoint, opened only if they are regular files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from recis_lightning.system_calls import open_flags


def open_regular(path: Path) -> int:
    """Open a file for reading and return its descriptor.

    A pipe or a device in the place of a file is refused at once, where a plain ``open`` would wait
    for its other end.

    Raises:
        ValueError: It is missing, no regular file, or the system does not let us read it.
    """
    try:
        file = os.open(path, open_flags("O_RDONLY", "O_NONBLOCK"))
    except FileNotFoundError:
        raise ValueError(f"{path}: this file of the checkpoint is missing") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path}: cannot be opened ({reason})") from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ValueError(f"{path}: expected a regular file, found a folder, pipe or device")
    return file


def check_regular(path: Path) -> None:
    """Raise ValueError unless a path is a regular file that can be read."""
    os.close(open_regular(path))


def read_text(path: Path) -> str:
    """Read a file of UTF-8; ValueError if it is missing, no regular file, or no UTF-8."""
    with os.fdopen(open_regular(path), "rb") as file:
        content = file.read()
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: damaged") from None


__all__ = ["check_regular", "open_regular", "read_text"]
