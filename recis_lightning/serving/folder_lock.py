"""Lock of a served folder: one export at a time."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recis_lightning import system_calls

__all__ = ["exporting"]

# Of file systems that lock no folders.
_UNABLE = {errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.ENOSYS}


@contextmanager
def exporting(folder: Path) -> Iterator[bool]:
    """Hold a folder for an export; the lock is the folder's own, and ends with the process.

    Args:
        folder: One that is there.

    Yields:
        Whether it is held; a file system or Windows may be unable to.

    Raises:
        RuntimeError: Another export, of this process or another, writes to the folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name, exporting(Path(name)) as is_held:
        ...     is_held
        True
    """
    file = system_calls.open_folder(folder)
    if file is None:
        yield False
        return
    try:
        is_held = True
        try:
            system_calls.lock(file)
        except BlockingIOError:
            raise RuntimeError(
                f"folder: another export writes to {folder}; let it end, or name another folder"
            ) from None
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            is_held = False
        try:
            yield is_held
        finally:
            if is_held:  # a process that was forked meanwhile has the file open, too
                system_calls.unlock(file)
    finally:
        os.close(file)
