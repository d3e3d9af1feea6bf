"""System calls that Linux has and another system may lack, each with what it does there instead.

macOS has neither huge pages nor ``posix_fallocate`` nor ``fdatasync``; Windows has no forks, no
users' numbers, no folders that can be opened, and other locks. Everything else here calls these.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import sys
import threading
from collections.abc import Callable
from typing import Any

_fcntl: Any = None
_msvcrt: Any = None
try:
    import fcntl as _fcntl
except ImportError:
    with contextlib.suppress(ImportError):
        import msvcrt as _msvcrt

IS_LINUX = sys.platform == "linux"
_LOCKED_BYTE = 1 << 40  # beyond what a file holds: Windows lets nobody read a byte that is locked
_WAIT_SECONDS = 0.02
_position = threading.Lock()  # of files' positions, where a call moves them


def open_flags(*names: str) -> int:
    """Return the flags of ``os.open`` of these names, without those that the system lacks.

    Example:
        >>> open_flags("O_RDWR", "O_CREAT") == os.O_RDWR | os.O_CREAT
        True
    """
    found = 0
    for name in (*names, "O_BINARY"):  # Windows would change the ends of lines
        found |= getattr(os, name, 0)
    return found


def call_at_fork(**callbacks: Callable[[], Any]) -> None:
    """Register what is called at a fork, as ``os.register_at_fork``; nothing where there is none.

    Args:
        callbacks: ``before``, ``after_in_parent`` and ``after_in_child``.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(**callbacks)


def lock(file: int, wait: bool = False) -> None:
    """Lock an open file against all that lock it by another descriptor.

    Args:
        file: Its descriptor.
        wait: Whether to wait until nobody else holds it.

    Raises:
        BlockingIOError: It is held, and ``wait`` is False.
        OSError: The file system locks no files.
    """
    if _fcntl is not None:
        _fcntl.flock(file, _fcntl.LOCK_EX | (0 if wait else _fcntl.LOCK_NB))
        return
    if _msvcrt is None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    while True:
        try:
            _at_locked_byte(file, _msvcrt.LK_NBLCK)
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EDEADLK):
                raise
            if not wait:
                raise BlockingIOError(errno.EWOULDBLOCK, "the file is locked") from None
        threading.Event().wait(_WAIT_SECONDS)


def unlock(file: int) -> None:
    """Let others lock an open file."""
    if _fcntl is not None:
        _fcntl.flock(file, _fcntl.LOCK_UN)
    elif _msvcrt is not None:
        _at_locked_byte(file, _msvcrt.LK_UNLCK)


def _at_locked_byte(file: int, mode: int) -> None:
    with _position:
        place = os.lseek(file, 0, os.SEEK_CUR)
        try:
            os.lseek(file, _LOCKED_BYTE, os.SEEK_SET)
            _msvcrt.locking(file, mode, 1)
        finally:
            os.lseek(file, place, os.SEEK_SET)


def open_folder(folder: str | os.PathLike[str]) -> int | None:
    """Open a folder and return its descriptor; None where folders are not opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return None
    return os.open(folder, open_flags("O_RDONLY", "O_DIRECTORY", "O_CLOEXEC"))


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the names in a folder durable, where a folder can be synced."""
    file = open_folder(folder)
    if file is None:
        return
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_data(file: int) -> None:
    """Make what was written to a file durable, perhaps without its times."""
    getattr(os, "fdatasync", os.fsync)(file)


def reserve(file: int, size: int) -> None:
    """Reserve a file's space, so that a full disk is an error before anything is written.

    Where the system or the file system cannot, the file gets its size alone.
    """
    if not _allocate(file, 0, size):
        os.ftruncate(file, size)


def reserve_range(file: int, offset: int, size: int) -> None:
    """Reserve space of a file that nothing is in yet; a full disk is an error now, not later.

    Where the system or the file system cannot, zeros are written.
    """
    if _allocate(file, offset, size):
        return
    zeros, end = memoryview(bytes(1 << 20)), offset + size
    while offset < end:
        offset += write_at(file, zeros[: end - offset], offset)


def _allocate(file: int, offset: int, size: int) -> bool:
    """Reserve space of a file; return whether that is possible here."""
    allocate = getattr(os, "posix_fallocate", None)
    if allocate is None:
        return False
    try:
        allocate(file, offset, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return False
    return True


def free_range(file: int, offset: int, size: int) -> None:
    """Give space of a file back to its disk, where the system can; it then reads as zeros."""
    call = getattr(ctypes.CDLL(None), "fallocate", None) if IS_LINUX else None
    if call is not None:
        keep_size, punch_hole = 1, 2
        long = ctypes.c_int64
        call(file, keep_size | punch_hole, long(offset), long(size))  # at worst it stays reserved


def write_back(file: int) -> None:
    """Write a file's changed pages to the disk and wait for it, where the system can.

    Not to make them durable, but to have memory that can be taken for something else.
    """
    call = getattr(ctypes.CDLL(None), "sync_file_range", None) if IS_LINUX else None
    if call is not None:
        zero = ctypes.c_int64(0)
        call(file, zero, zero, 7)  # wait for what is being written, write, and wait


def read_at(file: int, data: memoryview, offset: int) -> int:
    """Read from an offset on into memory, and return how many bytes."""
    if hasattr(os, "preadv"):
        return os.preadv(file, [data], offset)
    with _position:
        os.lseek(file, offset, os.SEEK_SET)
        content = os.read(file, len(data))
    data[: len(content)] = content
    return len(content)


def write_at(file: int, data: memoryview, offset: int) -> int:
    """Write memory from an offset on, and return how many bytes."""
    if hasattr(os, "pwrite"):
        return os.pwrite(file, data, offset)
    with _position:
        os.lseek(file, offset, os.SEEK_SET)
        return os.write(file, data)


def is_alive(process: int) -> bool:
    """Return whether there is a process of a number; True where asking would end it."""
    if sys.platform == "win32" or not hasattr(os, "getuid"):
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def others_may_write(status: os.stat_result) -> str | None:
    """Return who else can write to a file or folder, by its ``os.lstat``; None if nobody can.

    Windows keeps this in lists that ``os.stat`` does not show: there a user's folders are the
    user's own.
    """
    if not hasattr(os, "geteuid"):
        return None
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}, and this is user {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written to by others (mode {stat.S_IMODE(status.st_mode):o})"
    return None


__all__ = [
    "IS_LINUX",
    "call_at_fork",
    "free_range",
    "is_alive",
    "lock",
    "open_flags",
    "open_folder",
    "others_may_write",
    "read_at",
    "reserve",
    "reserve_range",
    "sync_data",
    "sync_folder",
    "unlock",
    "write_at",
    "write_back",
]
