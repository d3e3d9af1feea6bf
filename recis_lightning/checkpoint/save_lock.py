"""Lock of a checkpoint's folder: one writer at a time, and a record of the saves it began.

The lock is a file in the folder, held by ``flock`` as long as saves are under way, and removed
after them. A process that is killed leaves it, without its hold: what it names is then removed by
the next save, unless the checkpoint that is there names it too.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Set
from pathlib import Path
from typing import Any

from recis_lightning import system_calls
from recis_lightning.checkpoint.commit import Commit, new_save_id, remove_files, remove_unfinished

LOCK_FILE = ".recis_lightning.lock"
_FORMAT = "recis_lightning.lock"
# After this time, the lock of another host counts as left behind: a file system may keep what is
# locked on one host from the others.
_FOREIGN_SECONDS = 3600.0

# Returns the commit of the checkpoint that is there now, None without a checkpoint; ValueError if
# it cannot be read.
CurrentCommit = Callable[[], Commit | None]

_held: dict[Path, SaveLock] = {}  # by folder
# Of locks that are taken, by folder; an interrupt may leave one that is held no longer.
_descriptors: dict[Path, int] = {}
_guard = threading.RLock()


class SaveLock:
    """Hold on a folder, for one owner and any number of its saves; made by ``begin_save``.

    Attributes:
        owner: Who saves: the folder is refused to all others.
        saves: ``save_id`` of saves under way.
    """

    def __init__(self, folder: Path, file: int, owner: object) -> None:
        self.folder, self.owner, self.pid = folder, owner, os.getpid()
        self.saves: set[str] = set()
        self._file = file
        self._note({"format": _FORMAT, "pid": self.pid, "host": socket.gethostname()})

    def _note(self, line: dict[str, Any]) -> None:
        """Add a line to the lock's file."""
        os.write(self._file, (json.dumps(line) + "\n").encode())

    def begin(self, save_id: str) -> None:
        """Note a save before its first file is written."""
        self._note({"saving": save_id})
        self.saves.add(save_id)

    def replace(self, files: Iterable[str]) -> None:
        """Note the files of the checkpoint that the next rename replaces."""
        self._note({"replaces": sorted(files)})

    def remove(self, files: Iterable[str]) -> None:
        """Note the files of the checkpoint that is about to be removed."""
        with contextlib.suppress(OSError):  # on a full disk removing goes on
            self._note({"removes": sorted(files)})

    def end(self, save_id: str) -> None:
        """Forget a save that is a checkpoint now, or whose files were removed."""
        self.saves.discard(save_id)
        if self.saves:
            with contextlib.suppress(OSError):
                self._note({"ended": save_id})

    def lines(self) -> list[dict[str, Any]]:
        """Return what was noted."""
        return list(_lines(self.folder, self._file))

    def close(self) -> None:
        """Remove the file and let others take the lock; does nothing if that was done."""
        if _descriptors.get(self.folder) != self._file:
            return
        with contextlib.suppress(OSError):
            (self.folder / LOCK_FILE).unlink()
        # A forked process has the descriptor too, and would keep the lock.
        with contextlib.suppress(OSError):
            system_calls.unlock(self._file)
        _close(self.folder)


def begin_save(folder: Path, save_id: str, owner: object, current: CurrentCommit) -> None:
    """Take the lock of a folder for a save; remove what a killed save left there.

    Args:
        folder: Folder of the shard files; made if it is not there.
        save_id: Random name of the save.
        owner: Who saves; it may begin a save before its last one has ended.
        current: Returns the commit of the checkpoint that is there.

    Raises:
        RuntimeError: Another process, or another owner in this one, saves to the folder.
    """
    folder = folder.resolve()
    with _guard:
        lock = _held.get(folder)
        if lock is not None and not lock.saves:  # an interrupt came between
            lock.close()
            lock = None
        if lock is None:
            lock = _take(folder, owner, current)
        elif lock.owner is not owner:
            raise RuntimeError(
                f"{folder}: another save of this process ({lock.pid} on {socket.gethostname()}) "
                "writes to this checkpoint; let it end first, or save to another path"
            )
        try:
            _held[folder] = lock
            lock.begin(save_id)
        except BaseException:
            if not lock.saves:
                _held.pop(folder, None)
                lock.close()
            raise


def note_replaced(folder: Path, files: Iterable[str]) -> None:
    """Note the files of the checkpoint that a save is about to replace: they are known after it."""
    with _guard:
        lock = _held.get(folder.resolve())
        if lock is not None:
            lock.replace(files)


def end_save(folder: Path, save_id: str) -> None:
    """End a save; the last one gives the folder free. Does nothing if it ended before."""
    folder = folder.resolve()
    with _guard:
        lock = _held.get(folder)
        if lock is None:
            return
        if save_id in lock.saves:
            lock.end(save_id)
        if not lock.saves:  # also where an interrupt came between
            lock.close()
            del _held[folder]


def fail_save(folder: Path, save_id: str, current: CurrentCommit) -> None:
    """End a save after an exception: remove its files, or those of the checkpoint it replaced.

    Does nothing if it ended before.

    Args:
        folder: Folder of the shard files.
        save_id: Random name of the save.
        current: Returns the commit of the checkpoint that is there.
    """
    folder = folder.resolve()
    with _guard:
        lock = _held.get(folder)
        if lock is not None and save_id in lock.saves:
            with contextlib.suppress(OSError):  # the lock's next owner may succeed
                _clear(folder, lock.lines(), current, lock.saves - {save_id})
        end_save(folder, save_id)


@contextlib.contextmanager
def removing(folder: Path, files: Iterable[str], current: CurrentCommit) -> Iterator[None]:
    """Hold a folder while its checkpoint is removed, so that a later save ends what a kill cuts.

    Args:
        folder: Folder of the shard files; it may be missing.
        files: Those of the checkpoint, removed at the end of the context.
        current: Returns the commit of the checkpoint that is there.
    """
    files, folder, removal = sorted(files), folder.resolve(), new_save_id()
    with _guard:
        lock = _held.get(folder)
        if lock is None and files:
            with contextlib.suppress(OSError, RuntimeError, ValueError):  # another process has it
                lock = _held[folder] = _take(folder, None, current)
        if lock is not None:
            lock.remove(files)
            lock.saves.add(removal)
    try:
        yield
        remove_files(folder, files)
    finally:
        end_save(folder, removal)


def clear_killed_saves(folder: Path, current: CurrentCommit) -> None:
    """Remove what killed saves left in a folder; the folder too, if nothing else is in it."""
    folder = folder.resolve()
    with _guard, contextlib.suppress(OSError, RuntimeError):
        if folder not in _held:
            if (folder / LOCK_FILE).exists():
                _take(folder, None, current).close()
            folder.rmdir()  # fails if it is not empty


def _take(folder: Path, owner: object, current: CurrentCommit) -> SaveLock:
    """Lock a folder that this process does not hold."""
    file = _open_locked(folder)
    try:
        lines = list(_lines(folder, file))
        holder = _holder(lines)
        if holder and holder.get("host") != socket.gethostname():
            age = time.time() - os.fstat(file).st_mtime
            if age < _FOREIGN_SECONDS:
                raise _busy(folder, holder)
        _clear(folder, lines, current)
        return SaveLock(folder, file, owner)
    except BaseException:
        _close(folder)
        raise


def _open_locked(folder: Path) -> int:
    """Open and lock a folder's lock file, which another process may remove at any moment."""
    path = folder / LOCK_FILE
    names = ("O_RDWR", "O_CREAT", "O_APPEND", "O_NONBLOCK", "O_NOFOLLOW")
    flags = system_calls.open_flags(*names)
    _close(folder)
    for _ in range(100):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path, flags, 0o644)
        except FileNotFoundError:  # the folder went, as an empty one
            continue
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise ValueError(f"{path}: expected a regular file; remove it")
            _descriptors[folder] = file
            _lock(folder, file)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(path, follow_symlinks=False)):
                    return file
        except BaseException:
            _descriptors[folder] = file
            _close(folder)
            raise
        _close(folder)
    raise RuntimeError(f"{path}: other processes took this lock a hundred times; try again")


def _close(folder: Path) -> None:
    """Close the descriptor of a folder's lock, if there is one."""
    file = _descriptors.pop(folder, None)
    if file is not None:
        with contextlib.suppress(OSError):
            os.close(file)


def _lock(folder: Path, file: int) -> None:
    try:
        system_calls.lock(file)
    except OSError as error:
        holder = _holder(list(_lines(folder, file)))
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise _busy(folder, holder) from None
        # A file system without locks: the process that is named must be gone.
        if holder.get("host") == socket.gethostname() and _is_alive(holder.get("pid")):
            raise _busy(folder, holder) from None


def _holder(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the last line that a process wrote about itself; {} if none did."""
    return next((line for line in reversed(lines) if "pid" in line), {})


def _is_alive(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0 or pid == os.getpid():
        return False
    return system_calls.is_alive(pid)


def _busy(folder: Path, holder: dict[str, Any]) -> RuntimeError:
    return RuntimeError(
        f"{folder}: process {holder.get('pid', 'of unknown number')} on "
        f"{holder.get('host', 'an unknown host')} saves to this checkpoint; let it end first, or "
        f"save to another path (if it is gone, remove {LOCK_FILE} there)"
    )


def _lines(folder: Path, file: int) -> Iterator[dict[str, Any]]:
    """Read the lines of a lock; ValueError if the file is none of ours."""
    content = bytearray(os.fstat(file).st_size)
    done = system_calls.read_at(file, memoryview(content), 0) if content else 0
    del content[done:]
    for number, text in enumerate(content.splitlines()):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or (number == 0 and line.get("format") != _FORMAT):
            if number:
                continue  # cut short by a kill
            raise ValueError(f"{folder / LOCK_FILE}: no lock of a checkpoint; remove it")
        yield line


def _clear(
    folder: Path,
    lines: list[dict[str, Any]],
    current: CurrentCommit,
    under_way: Set[str] = frozenset(),
) -> None:
    """Remove the files of ended saves that a lock names, but not those of the checkpoint.

    Args:
        folder: Folder of the shard files.
        lines: Of the lock.
        current: Returns the commit of the checkpoint that is there.
        under_way: ``save_id`` of saves that go on.
    """
    try:
        commit = current()
    except ValueError:
        return
    named = None if commit is None else commit.save_id
    kept = set() if commit is None else commit.files()
    begun = {line["saving"] for line in lines if isinstance(line.get("saving"), str)}
    begun -= {line.get("ended") for line in lines} | under_way
    remove_unfinished(folder, begun - {named})
    # Files are gone with the checkpoint that a save of this lock replaced, or that was removed.
    gone = "removes" if commit is None else "replaces"
    if commit is not None and named not in begun:
        return
    for line in lines:
        files = line.get(gone)
        if isinstance(files, list):
            remove_files(folder, {name for name in files if isinstance(name, str)} - kept)


def _start_child() -> None:
    """Leave the locks to the process that this one was forked from: it alone is to hold them."""
    global _guard
    _guard = threading.RLock()  # the thread that had it is not there
    for folder in list(_descriptors):
        _close(folder)
    _held.clear()


system_calls.call_at_fork(after_in_child=_start_child)


__all__ = [
    "LOCK_FILE",
    "CurrentCommit",
    "begin_save",
    "clear_killed_saves",
    "end_save",
    "fail_save",
    "note_replaced",
    "removing",
]
