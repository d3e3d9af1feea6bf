"""Following folders: files that appear are taken up, window by window, each once."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from torch.utils.data import get_worker_info

from recis_lightning.arguments import check_bound, check_str
from recis_lightning.data.file_reader import (
    EARLIEST,
    DataFileError,
    FileReader,
    FoundFile,
    Split,
)
from recis_lightning.data.files import Pattern, check_on_bad_file, patterns_of
from recis_lightning.data.new_files import KnownFile, Look, NewFiles
from recis_lightning.data.origins import Origins
from recis_lightning.distributed import collectives

__all__ = ["FileStream", "Follow", "check_follow"]

_NAP_SECONDS = 0.1  # between checks, in a wait, that the run goes on


@dataclass(frozen=True)
class Follow:
    """Settings of a stream of files: in which order they are read, and when it ends.

    Args:
        order: Order of the files of a window, ``"name"`` or ``"time"`` (of their last change).
        poll_seconds: Seconds between two looks for files, while none are left to read.
        stop_file: Path of a file whose existence says that no more files will appear: what is there
            is read, and the stream ends.
        timeout_seconds: A wait of so long without a new file does the same; None waits for ever.

    Raises:
        TypeError, ValueError: An argument is invalid.
    """

    order: str = "name"
    poll_seconds: float = 10.0
    stop_file: str | None = None
    timeout_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.order not in ("name", "time"):
            raise ValueError(f"order: expected 'name' or 'time', got {self.order!r}")
        check_bound("poll_seconds", self.poll_seconds)
        if self.stop_file is not None:
            check_str("stop_file", self.stop_file)
        if self.timeout_seconds is not None:
            check_bound("timeout_seconds", self.timeout_seconds)


def check_follow(follow: bool | Follow) -> Follow | None:
    """Return the settings of a stream; None if nothing is followed.

    Raises:
        TypeError: It is neither a bool nor a ``Follow``.
    """
    if isinstance(follow, Follow):
        return follow
    if not isinstance(follow, bool):
        raise TypeError(f"follow: expected a bool or Follow, got {type(follow).__name__}")
    return Follow() if follow else None


class FileStream:
    """Files that appear one after the other, read window by window; each row is read once.

    Rank 0 looks for files and tells the others, so all read the same. Without a ``window`` of the
    reader a window holds the files that are there when it begins. With one it holds those of its
    time, and begins when there is a file of a later one, or when the stream ends; rows that
    come later than that are read in the next window. A name that was read is not read again.

    Args:
        paths: Files or glob patterns, which need not match anything yet.
        reader: Of the files' columns.
        follow: Order, and end.
        on_bad_file: As for ``FileSet``. A file that cannot be read may be half written: it is bad
            if it is the same at the look after.
        is_stopped: Says that a wait is to end, and the stream with it.

    Attributes:
        splits: Splits of the window that is read.
        window: Name of the last window that was begun: its time, or the name of its last file.
        num_windows: None: there is no end that is known.
        ended: Whether the last wait found no further window.
    """

    def __init__(
        self,
        paths: str | Sequence[str],
        reader: FileReader,
        follow: Follow,
        on_bad_file: str = "error",
        is_stopped: Callable[[], bool] | None = None,
    ) -> None:
        check_on_bad_file(on_bad_file)
        self._patterns, self._reader, self._follow = patterns_of(paths), reader, follow
        stop_file = None if follow.stop_file is None else Pattern.of(follow.stop_file)
        skips = on_bad_file == "skip"
        self._origins = Origins(self._patterns)
        self._new = NewFiles(self._patterns, self._origins, reader, follow.order, stop_file, skips)
        self.splits: list[Split] = []
        self.window: str | None = None
        self.num_windows: int | None = None
        self.ended = False
        self._is_stopped = is_stopped
        self._epoch: int | None = None  # whose window is open
        self._begun: int | None = None  # number of the last window
        self._known: dict[int, KnownFile] = {}  # files of which something is left
        self._next_index = 0
        self._members: list[int] = []  # of the open window, in order
        self._done: set[int] = set()  # hashes of the names of files of which nothing is left
        self._loaded: dict[str, Any] | None = None  # until its files are looked at

    def why_empty(self) -> None:
        """Return None: rows may come."""

    def path_of(self, split: Split) -> str:
        """Return the file that a split is part of."""
        return self._known[split.file].file.path

    def read(self, split: Split) -> dict[str, pa.Array]:
        """Read the columns of a split: column -> its values in the rows of the split.

        Raises:
            DataFileError: The file is damaged, has changed or is gone.
        """
        known = self._known[split.file]
        return self._reader.read(self._patterns[known.pattern].system, known.file, split)

    def fingerprint(self) -> list[Any]:
        """Return what divides the stream: its files may be others."""
        window = self._reader.window
        return ["follow", None if window is None else [window.length, window.column]]

    def select(self, epoch: int) -> None:
        """Begin the next window, for an epoch; wait until there is one, or the stream ends.

        All ranks call it. While the epoch's window is open it does nothing.

        Raises:
            DataFileError: A file is bad, or a file that was read in part has changed.
            RuntimeError: This is a worker process.
            ValueError: The epoch is one before that of the open window.
        """
        if self._loaded is not None and get_worker_info() is None:
            self._look_again(self._loaded)
        if self._epoch is not None and epoch <= self._epoch:
            if epoch < self._epoch:
                raise ValueError(
                    f"epoch: a stream does not go back from {self._epoch}, got {epoch}"
                )
            return
        if get_worker_info() is not None:
            raise RuntimeError("follow: call set_epoch() before worker processes are started")
        self._close()
        self._wait(epoch)

    def state(self, epoch: int) -> dict[str, Any]:
        """Return what was read before the place of an epoch, and the files of its window.

        Eight bytes for each file of which nothing is left, the names of the others, the patterns.
        """
        if self._loaded is not None:
            return self._loaded
        is_open = self._epoch is not None and epoch <= self._epoch
        finished = set() if is_open else {_hash(known.lasting) for known in self._finished()}
        partly = [i for i, known in self._known.items() if self._windows_of(known)[0]]
        order = [*self._members, *(i for i in partly if i not in self._members)]
        kept = [self._known[index] for index in order]
        return {
            "begun": self._begun,
            "window": self.window,
            "epoch": self._epoch if is_open else None,
            "files": [
                [known.lasting, known.file.first_window, _digest(known.file)]
                for known in kept
                if _hash(known.lasting) not in finished
            ],
            "done": _pack(self._done | finished),
            "origins": self._origins.state(),
        }

    def load_state(self, state: Any, epoch: int) -> None:
        """Go on from a state. Its files are looked at when a window is selected.

        Raises:
            ValueError: The paths are others, in a way that leaves open what was read.
        """
        if "origins" not in state:
            raise ValueError("state: it is of a development version, which named files otherwise")
        self._origins.load(state["origins"])
        self._loaded, self.ended = dict(state), False
        self.window = state["window"]
        self._epoch, self._members, self.splits = None, [], []

    def _look_again(self, state: dict[str, Any]) -> None:
        """Take the place of a state, and look at the files of which it read a part."""
        found: list[KnownFile] = []

        def look() -> Look:
            for lasting, first_window, digest in state["files"]:
                known = self._new.again(lasting, first_window)
                if _digest(known.file) != digest:
                    raise DataFileError(
                        f"{known.file.path}: the file has changed since a part of it was read"
                    )
                found.append(known)
            return Look(found)

        files = self._on_first_rank(look).files
        self._loaded = None
        self._known, self._done = {}, _unpack(state["done"])
        self._begun, self._epoch = state["begun"], state["epoch"]
        self._add(files)
        if self._epoch is not None:
            self._open([i for i, known in self._known.items() if self._is_member(known)])

    def _wait(self, epoch: int) -> None:
        timeout, seconds = self._follow.timeout_seconds, 0.0
        begin = time.monotonic()

        def look() -> Look:
            nonlocal begin
            found = self._look()
            if found.files:
                begin = time.monotonic()
            elif timeout is not None and time.monotonic() - begin >= timeout:
                return found._replace(is_over=True)
            return found

        self.ended = False
        while not self.ended:
            stops = collectives.gather(self._sleep(seconds))
            found = self._on_first_rank(look)
            self._add(found.files)
            number = None if any(stops) else self._next_window(found.is_over)
            if number is not None:
                self._begin(number, epoch)
                return
            self.ended = found.is_over or any(stops)
            seconds = self._follow.poll_seconds

    def _sleep(self, seconds: float) -> bool:
        """Wait; return whether the run is to stop, as soon as it is."""
        end = time.monotonic() + seconds
        while True:
            if self._is_stopped is not None and self._is_stopped():
                return True
            left = end - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(left, _NAP_SECONDS))

    def _look(self) -> Look:
        names = {known.lasting for known in self._known.values()}
        first_window = EARLIEST if self._begun is None else self._begun + 1
        return self._new.look(lambda name: name in names or _hash(name) in self._done, first_window)

    def _on_first_rank(self, look: Callable[[], Look]) -> Look:
        """Run a look on rank 0; return what it found, or raise its error, on all ranks."""
        found = Look([])
        if collectives.rank() == 0:
            try:
                found = look()
            except Exception as error:  # the other ranks wait
                found = Look([], error=f"{error}")
        found = collectives.gather(found)[0]
        if found.error is not None:
            raise DataFileError(found.error)
        return found

    def _add(self, files: Sequence[KnownFile]) -> None:
        for known in files:
            self._known[self._next_index] = known
            self._next_index += 1

    def _windows_of(self, known: KnownFile) -> tuple[list[int], list[int]]:
        """Return the windows of a file's parts that were begun, and the others."""
        windows = [window for _, _, window in known.file.parts]
        begun = EARLIEST - 1 if self._begun is None else self._begun
        return [w for w in windows if w <= begun], [w for w in windows if w > begun]

    def _next_window(self, is_over: bool) -> int | None:
        """Return the number of the window that may begin now."""
        left = {window for known in self._known.values() for window in self._windows_of(known)[1]}
        if not left or (self._reader.window is not None and len(left) == 1 and not is_over):
            return None
        return min(left)

    def _begin(self, number: int, epoch: int) -> None:
        self._begun, self._epoch = number, epoch
        members = [i for i, known in self._known.items() if self._is_member(known)]
        if self._follow.order == "time":
            members.sort(key=lambda i: (self._known[i].file.version[1], self._known[i].name))
        else:
            members.sort(key=lambda i: self._known[i][:2])
        self._open(members)
        window = self._reader.window
        last = self._known[members[-1]].name
        self.window = last if window is None else window.name(number)

    def _open(self, members: list[int]) -> None:
        splits = [split for i in members for split in self._known[i].file.splits_of(i)]
        self._members = members
        self.splits = [split for split in splits if split.window == self._begun]

    def _is_member(self, known: KnownFile) -> bool:
        return any(window == self._begun for _, _, window in known.file.parts)

    def _finished(self) -> list[KnownFile]:
        return [known for known in self._known.values() if not self._windows_of(known)[1]]

    def _close(self) -> None:
        """Forget the files of which nothing is left."""
        self._done |= {_hash(known.lasting) for known in self._finished()}
        self._known = {i: known for i, known in self._known.items() if self._windows_of(known)[1]}
        self._epoch, self._members, self.splits = None, [], []


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _digest(file: FoundFile) -> str:
    """Return what tells whether a file's parts are those that they were."""
    return hashlib.blake2b(repr(file.parts).encode(), digest_size=8).hexdigest()


def _pack(hashes: set[int]) -> str:
    return base64.b64encode(np.array(sorted(hashes), np.uint64).tobytes()).decode()


def _unpack(text: str) -> set[int]:
    return set(np.frombuffer(base64.b64decode(text), np.uint64).tolist())
