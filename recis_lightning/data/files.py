"""Files of a data set: which there are, and how bad ones are named."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
from pyarrow import fs

from recis_lightning.data.file_reader import FORMATS, DataFileError, FileReader, FoundFile, Split
from recis_lightning.distributed import collectives

__all__ = ["FileSet", "Files", "Kinds", "Pattern", "check_on_bad_file", "find_files", "patterns_of"]

_log = logging.getLogger(__name__)


class Files(Protocol):
    """Files of a data set, of which one window is read at a time: fixed ones or a stream.

    Attributes:
        splits: Splits of the window that is read.
    """

    splits: list[Split]

    @property
    def window(self) -> str | None:
        """Name of the window; None where data are not divided, and before a stream's first."""

    @property
    def num_windows(self) -> int | None:
        """Number of windows; None if there is no end."""

    @property
    def ended(self) -> bool:
        """Whether there is no further window."""

    def select(self, epoch: int) -> None:
        """Let ``splits`` be those of an epoch's window."""

    def path_of(self, split: Split) -> str:
        """Return the file that a split is part of."""

    def read(self, split: Split) -> dict[str, pa.Array]:
        """Read the columns of a split."""

    def fingerprint(self) -> list[Any]:
        """Return what must be the same for a place to have a meaning."""

    def state(self, epoch: int) -> dict[str, Any] | None:
        """Return which files and windows were read before the place of an epoch, if they grow."""

    def load_state(self, state: Any, epoch: int) -> None:
        """Go on from what ``state`` returned."""

    def why_empty(self) -> str | None:
        """Return why there are no rows, now or ever; None if there are some, or may come."""


class FileSet:
    """Files that do not change, in order, and their splits.

    Every file's footer is read when this is made, and also the columns that the filter and the
    window name. A file that has changed since is refused when it is read.

    Args:
        paths: Files or glob patterns; a URL (``s3://...``) is read through fsspec.
        reader: Of their columns.
        on_bad_file: ``"error"`` raises for a file that cannot be opened, lacks a column or has
            another kind of column than the first file; ``"skip"`` logs a warning that names it.

    Attributes:
        files: The files, in order.
        splits: Splits with rows of the window that is read, in the order of the files.

    A set of files of which no row is kept is logged as a warning, on rank 0.

    Raises:
        FileNotFoundError: A pattern matches no file.
        DataFileError: A file is bad.
        ValueError: An argument is invalid, or no file could be read.
    """

    def __init__(
        self, paths: str | Sequence[str], reader: FileReader, on_bad_file: str = "error"
    ) -> None:
        check_on_bad_file(on_bad_file)
        self._reader = reader
        self.files: list[FoundFile] = []
        self._systems: list[Any] = []
        kinds = Kinds()
        for system, path in find_files(paths):
            try:
                file = reader.examine(system, path)
                kinds.add(file)
            except DataFileError as error:
                if on_bad_file == "error":
                    raise
                _log.warning("Skipped a file: %s", error)
            else:
                self.files.append(file)
                self._systems.append(system)
        if not self.files:
            raise ValueError(f"paths: none of the files of {paths!r} could be read")
        found = [split for index, file in enumerate(self.files) for split in file.splits_of(index)]
        numbers = sorted({split.window for split in found})
        self._windows = {n: [split for split in found if split.window == n] for n in numbers}
        self._number: int | None = None
        self.splits: list[Split] = []
        self.select(0)
        if (reason := self.why_empty()) is not None and collectives.rank() == 0:
            _log.warning("Nothing to read: %s", reason)

    @property
    def window(self) -> str | None:
        """Name of the window that is read; None where data are not divided."""
        if self._reader.window is None or self._number is None:
            return None
        return self._reader.window.name(self._number)

    @property
    def num_windows(self) -> int:
        """Number of windows; 1 where data are not divided."""
        return len(self._windows) if self._reader.window is not None else 1

    @property
    def ended(self) -> bool:
        """False: after the last window the first one is read again."""
        return False

    def select(self, epoch: int) -> None:
        """Let ``splits`` be those of window ``epoch``, modulo the number of windows."""
        if self._windows:
            self._number = list(self._windows)[epoch % len(self._windows)]
            self.splits = self._windows[self._number]

    def path_of(self, split: Split) -> str:
        """Return the file that a split is part of."""
        return self.files[split.file].path

    def read(self, split: Split) -> dict[str, pa.Array]:
        """Read the columns of a split: column -> its values in the rows of the split.

        Raises:
            DataFileError: The file is damaged, or has changed.
        """
        return self._reader.read(self._systems[split.file], self.files[split.file], split)

    def fingerprint(self) -> list[Any]:
        """Return the names of the files, and all splits."""
        names = [file.path.rsplit("/", 1)[-1] for file in self.files]
        found = [split for index, file in enumerate(self.files) for split in file.splits_of(index)]
        width = 3 if self._reader.window is None else 4
        return [names, [list(split[:width]) for split in found]]

    def state(self, epoch: int) -> None:
        """Return None: the files do not change."""

    def load_state(self, state: Any, epoch: int) -> None:
        """Read the window of an epoch."""
        self.select(epoch)

    def why_empty(self) -> str | None:
        """Return why there are no rows; None if there are some."""
        if self._windows:
            return None
        num_rows, condition = sum(file.num_rows for file in self.files), self._reader.filter
        files = f"{len(self.files)} file{'s' if len(self.files) > 1 else ''}"
        if not num_rows or condition is None:
            return f"paths: {files} without rows, the first is {self.files[0].path}"
        return f"filter: {condition!r} keeps none of {num_rows:,} rows of {files}"


class Kinds:
    """Kinds of the columns of the files so far, on which all must agree."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def add(self, file: FoundFile) -> None:
        """Check a file, and learn the kinds of columns that no file before had values of.

        Raises:
            DataFileError: A column is of another kind; names the file.
        """
        for name, kind in file.kinds.items():
            known = self._known.get(name, kind)
            if "null" not in (known, kind) and known != kind:
                raise DataFileError(
                    f"{file.path}: column {name!r} holds {kind}, in earlier files {known}"
                )
        for name, kind in file.kinds.items():
            if self._known.get(name, "null") == "null":
                self._known[name] = kind


def check_on_bad_file(on_bad_file: str) -> None:
    """Raise unless it is ``"error"`` or ``"skip"``."""
    if on_bad_file not in ("error", "skip"):
        raise ValueError(f"on_bad_file: expected 'error' or 'skip', got {on_bad_file!r}")


class Pattern(NamedTuple):
    """Where files are looked for.

    Attributes:
        text: As it was given.
        system: Arrow's file system.
        path: Path or pattern in it.
        glob: Function that lists what matches a path.
        literal: Leading part of the path that is there as it is written, with its brackets.
    """

    text: str
    system: Any
    path: str
    glob: Any
    literal: str = ""

    @classmethod
    def of(cls, text: str) -> Pattern:
        """Read a path, a pattern or a URL; brackets of a file or folder that exists are its own."""
        if "://" not in text:
            literal = _literal_part(text, os.path.lexists)
            return cls(text, fs.LocalFileSystem(), text, _local_glob, literal)
        import fsspec

        system, path = fsspec.core.url_to_fs(text)
        arrow = fs.PyFileSystem(fs.FSSpecHandler(system))
        return cls(text, arrow, path, _RemoteGlob(system), _literal_part(path, system.exists))

    def matches(self) -> list[str]:
        """Return the paths of the files there are now, in the order of names."""
        if self.literal and self.literal == self.path:
            return [self.path] if self.is_there() else []
        rest = self.path.removeprefix(self.literal)
        return sorted(self.glob(glob.escape(self.literal) + rest))

    def is_there(self) -> bool:
        """Return whether there is something at the path, or something that matches it."""
        if self.system.get_file_info(self.path).type is not fs.FileType.NotFound:
            return True
        return self.literal != self.path and bool(self.matches())

    @property
    def folder(self) -> str:
        """The part before the first folder or name that is a pattern, with its last slash."""
        rest = self.path.removeprefix(self.literal)
        plain = self.literal + re.split(r"[*?\[]", rest, maxsplit=1)[0]
        head, slash, _ = plain.rpartition("/")
        return head + slash

    def place_of(self, path: str) -> str:
        """Return a path below it as one that is the same however it was written.

        Example:
            >>> Pattern.of("file:///logs/*.parquet").place_of("/logs/b/../a.parquet")
            '/logs/a.parquet'
            >>> Pattern.of("memory://logs/*.parquet").place_of("/logs/a.parquet")
            'py::fsspec+memory:/logs/a.parquet'
        """
        if not self._is_local:
            return f"{self.system.type_name}:{path}"
        place = os.path.abspath(path)
        return place.rstrip("/") + "/" if path.endswith("/") or not path else place

    def path_at(self, place: str) -> str | None:
        """Return the path at a place; None if that is not below the folder."""
        folder = self.place_of(self.folder)
        return self.folder + place.removeprefix(folder) if place.startswith(folder) else None

    def file_at(self, path: str) -> str:
        """Return what is the same for all paths of a file: links are followed."""
        return os.path.realpath(path) if self._is_local else self.place_of(path)

    @property
    def _is_local(self) -> bool:
        kind = self.system.type_name
        return kind == "local" or "'file'" in kind


def _literal_part(path: str, exists: Callable[[str], bool]) -> str:
    """Return the path, or the folder before its first star, if it has brackets and exists."""
    plain = re.split(r"[*?]", path, maxsplit=1)[0]
    for part in (plain if plain == path else "", plain[: plain.rfind("/") + 1]):
        if "[" in part and exists(part):
            return part
    return ""


def _local_glob(path: str) -> list[str]:
    return glob.glob(path, recursive=True)


class _RemoteGlob:
    """``glob`` of a file system of fsspec, without what it remembers of folders."""

    def __init__(self, system: Any) -> None:
        self._system = system

    def __call__(self, path: str) -> list[str]:
        self._system.invalidate_cache()
        return list(self._system.glob(path))


def patterns_of(paths: str | Sequence[str]) -> list[Pattern]:
    """Read paths and patterns.

    Raises:
        ValueError: There are none.
    """
    texts = [paths] if isinstance(paths, str | PurePath) else list(paths)
    if not texts:
        raise ValueError("paths: expected at least one file or pattern, got none")
    return [Pattern.of(str(text)) for text in texts]


def find_files(paths: str | Sequence[str]) -> list[tuple[Any, str]]:
    """Find the files of paths and patterns, each once, by whatever paths and links it is found.

    Those of a pattern come in the order of names.

    Returns:
        The Arrow file system and the path of each.

    Raises:
        FileNotFoundError: One matches nothing.
        ValueError: There are no paths, or a file is of no known format.
    """
    found: dict[str, tuple[Any, str]] = {}
    for pattern in patterns_of(paths):
        names = pattern.matches()
        if not names:
            advice = "; [ and ] stand for themselves as [[] and []]" if "[" in pattern.path else ""
            raise FileNotFoundError(f"paths: no file matches {pattern.text!r}{advice}")
        for name in names:
            if not name.endswith(FORMATS):
                advice = ""
                if pattern.system.get_file_info(name).type is fs.FileType.Directory:
                    advice = f", a folder: its files are {name.rstrip('/') + '/*' + FORMATS[0]!r}"
                raise ValueError(
                    f"paths: expected names that end in {FORMATS}, got {name!r}{advice}"
                )
            found.setdefault(pattern.file_at(name), (pattern.system, name))
    return list(found.values())
