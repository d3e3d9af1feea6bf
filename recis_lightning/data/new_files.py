"""Looking for files that were not there before; done on one rank for all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from recis_lightning.data.file_reader import (
    FORMATS,
    DataFileError,
    FileReader,
    FoundFile,
    version_of,
)
from recis_lightning.data.files import Kinds, Pattern
from recis_lightning.data.origins import Origins

__all__ = ["KnownFile", "Look", "NewFiles"]

_log = logging.getLogger(__name__)


class KnownFile(NamedTuple):
    """A file of a stream.

    Attributes:
        pattern: Number of the pattern that it matches.
        name: Its path below the folder of the pattern, and the pattern's number if there are more.
        file: Its parts and their windows.
        lasting: Its name in places, as ``Origins`` gives it.
    """

    pattern: int
    name: str
    file: FoundFile
    lasting: str


class Look(NamedTuple):
    """Result of a look for new files.

    Attributes:
        files: Files that can be read.
        is_over: Whether no further ones will appear.
        error: Message about a bad file, which is to stop the run.
    """

    files: list[KnownFile]
    is_over: bool = False
    error: str | None = None


class NewFiles:
    """Files that match patterns and are new.

    Args:
        patterns: Patterns; what matches and is no Parquet or ORC file is passed over.
        origins: Of their files' names.
        reader: Of the files' columns.
        order: ``"name"`` or ``"time"``.
        stop_file: File whose existence says that no further ones will appear.
        skips: Whether bad files are logged and left out; otherwise they are an error.
    """

    def __init__(
        self,
        patterns: Sequence[Pattern],
        origins: Origins,
        reader: FileReader,
        order: str,
        stop_file: Pattern | None,
        skips: bool,
    ) -> None:
        self._patterns, self._origins = patterns, origins
        self._reader, self._order = reader, order
        self._stop_file, self._skips = stop_file, skips
        self._kinds = Kinds()
        self._unsettled: dict[str, Any] = {}  # name -> version at the last look, which was bad
        self._bad: dict[str, Any] = {}  # name -> version that was logged

    def look(self, is_known: Callable[[str], bool], first_window: int) -> Look:
        """Look once.

        A file that cannot be read may be half written: it is bad if it was the same at the look
        before, or if there is a stop file.

        Args:
            is_known: Says of a lasting name that it is not new.
            first_window: Rows of earlier windows count as of this one.
        """
        is_over = self._stop_file is not None and self._stop_file.is_there()
        found: list[tuple[Any, KnownFile]] = []
        seen: set[str] = set()  # a file belongs to the first pattern that it matches
        for number, pattern in enumerate(self._patterns):
            for path in pattern.matches():
                name, place = self._name(number, path), pattern.place_of(path)
                if not path.endswith(FORMATS) or place in seen:
                    continue
                seen.add(place)
                lasting = self._origins.name_of(place)
                if is_known(lasting):
                    continue
                try:
                    file = self._examine(number, name, path, first_window, is_over)
                except DataFileError as error:
                    if not self._skips:
                        return Look([], is_over, str(error))
                    _log.warning("Skipped a file: %s", error)
                    continue
                if file is not None:
                    known = KnownFile(number, name, file, lasting)
                    found.append((self._key(number, path, file), known))
        found.sort(key=lambda item: item[0])
        return Look([file for _, file in found], is_over)

    def again(self, lasting: str, first_window: int) -> KnownFile:
        """Look at a file of which a part was read.

        Raises:
            DataFileError: It cannot be read any more, or is below the folder of no pattern.
        """
        place = self._origins.place_of(lasting)
        for number, pattern in enumerate(self._patterns):
            path = pattern.path_at(place)
            if path is not None:
                file = self._reader.examine(pattern.system, path, first_window)
                self._kinds.add(file)
                return KnownFile(number, self._name(number, path), file, lasting)
        raise DataFileError(f"{place}: a part of it was read, and paths have its folder no longer")

    def _name(self, number: int, path: str) -> str:
        name = path.removeprefix(self._patterns[number].folder)
        return f"{number}:{name}" if len(self._patterns) > 1 else name

    def _key(self, number: int, path: str, file: FoundFile) -> Any:
        return (file.version[1], path) if self._order == "time" else (number, path)

    def _examine(
        self, number: int, name: str, path: str, first_window: int, is_over: bool
    ) -> FoundFile | None:
        """Return a file; None if it is bad, but may be half written, or was logged before.

        Raises:
            DataFileError: It is bad.
        """
        system, version = self._patterns[number].system, None
        try:
            version = version_of(system, path)
            if self._bad.get(name) == version:
                return None
            file = self._reader.examine(system, path, first_window)
            self._kinds.add(file)
        except (DataFileError, OSError) as error:
            if self._unsettled.get(name) != version and not is_over:
                self._unsettled[name] = version
                return None
            self._bad[name] = version
            if isinstance(error, DataFileError):
                raise
            raise DataFileError(f"{path}: {error}") from error
        self._unsettled.pop(name, None)
        return file
