"""Files of a data set: which there are, how many rows their parts have, and reading a part."""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.dataset as pads
from pyarrow import acero, fs, orc, parquet
from torch.utils.data import get_worker_info

from recis_lightning.data.filter import columns_of, parse_filter

__all__ = ["DataFileError", "FileSet", "Split", "find_files"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_FORMATS = (".parquet", ".orc")
# pyarrow reports damage as any of these, and lacks of memory as MemoryError, which passes.
_BAD = (OSError, ValueError, TypeError, KeyError, NotImplementedError)


class DataFileError(ValueError):
    """A file of a data set that cannot be read as asked; the message begins with its name."""


class Split(NamedTuple):
    """Part of a file that is read at once: a row group of Parquet, a stripe of ORC.

    Attributes:
        file: Index of the file.
        group: Index in the file.
        num_rows: Its rows that pass the filter.
    """

    file: int
    group: int
    num_rows: int


class FileSet:
    """Files of one data set, in order, and their splits.

    Every file's footer is read when this is made, and with a filter also the columns that it
    names. A file that has changed since is refused when it is read.

    Args:
        paths: Files or glob patterns; a URL (``s3://...``) is read through fsspec.
        columns: Columns to read.
        filter: Rows to keep, as ``parse_filter`` takes it; None keeps all.
        on_bad_file: ``"error"`` raises for a file that cannot be opened, lacks a column or has
            another kind of column than the first file; ``"skip"`` logs a warning that names it.

    Attributes:
        files: Path of each file.
        splits: Splits that have rows, in the order of the files.

    Raises:
        FileNotFoundError: A pattern matches no file.
        DataFileError: A file is bad.
        ValueError: An argument is invalid, or no file could be read.
    """

    def __init__(
        self,
        paths: str | Sequence[str],
        columns: Sequence[str],
        filter: str | None = None,
        on_bad_file: str = "error",
    ) -> None:
        if on_bad_file not in ("error", "skip"):
            raise ValueError(f"on_bad_file: expected 'error' or 'skip', got {on_bad_file!r}")
        self._columns = list(dict.fromkeys(columns))
        self._filter = None if filter is None else parse_filter(filter)
        self._filter_columns = [] if filter is None else columns_of(filter)
        self._kinds: dict[str, str] = {}
        self.files: list[str] = []
        self._systems: list[Any] = []
        self._versions: list[tuple[Any, Any]] = []
        self.splits: list[Split] = []
        for system, path in find_files(paths):
            try:
                self._add(system, path)
            except DataFileError as error:
                if on_bad_file == "error":
                    raise
                _log.warning("Skipped a file: %s", error)
        if not self.files:
            raise ValueError(f"paths: none of the files of {paths!r} could be read")

    def read(self, split: Split) -> dict[str, pa.Array]:
        """Read the columns of a split: column -> its values in the rows that pass the filter.

        Raises:
            DataFileError: The file is damaged, or has changed.
        """
        system, path = self._systems[split.file], self.files[split.file]
        where = f"{path}, part {split.group}"

        def load() -> pa.Table:
            if _version_of(system, path) != self._versions[split.file]:
                raise ValueError("the file has changed since the data set was made")
            names = list(dict.fromkeys([*self._columns, *self._filter_columns]))
            with system.open_input_file(path) as source:
                if path.endswith(".orc"):
                    batch = orc.ORCFile(source).read_stripe(split.group, columns=names)
                    part = pa.Table.from_batches([batch])
                else:
                    # Arrow's own threads do not survive the fork that made a worker.
                    threads = get_worker_info() is None
                    file = parquet.ParquetFile(source, pre_buffer=False)
                    part = file.read_row_group(split.group, columns=names, use_threads=threads)
            return part if self._filter is None else _filtered(part, self._filter)

        table = _naming(where, load)
        if table.num_rows != split.num_rows:
            raise DataFileError(
                f"{where}: {split.num_rows} rows when the data set was made, "
                f"{table.num_rows} when it was read"
            )
        return {name: _whole(table[name]) for name in self._columns}

    def _add(self, system: Any, path: str) -> None:
        """List a file, all of it or nothing."""
        version = _naming(path, lambda: _version_of(system, path))
        kinds, counts = _naming(path, lambda: self._examine(system, path))
        for name in self._columns:
            known = self._kinds.get(name, kinds[name])
            if "null" not in (known, kinds[name]) and known != kinds[name]:
                raise DataFileError(
                    f"{path}: column {name!r} holds {kinds[name]}, in earlier files {known}"
                )
        for name in self._columns:
            if self._kinds.get(name, "null") == "null":
                self._kinds[name] = kinds[name]
        index = len(self.files)
        self.files.append(path)
        self._systems.append(system)
        self._versions.append(version)
        self.splits += [Split(index, group, n) for group, n in enumerate(counts) if n]

    def _examine(self, system: Any, path: str) -> tuple[dict[str, str], list[int]]:
        """Return the kind of each column, and the rows of each split that pass the filter."""
        if path.endswith(".orc"):
            file = orc.ORCFile(system.open_input_file(path))
            kinds = self._kinds_of(file.schema)
            if self._filter is None and file.nstripes <= 1:
                return kinds, [file.nrows] * file.nstripes
            names = self._filter_columns or self._columns[:1]
            stripes = (
                pa.Table.from_batches([file.read_stripe(i, columns=names)])
                for i in range(file.nstripes)
            )
            if self._filter is None:
                return kinds, [stripe.num_rows for stripe in stripes]
            return kinds, [_filtered(stripe, self._filter).num_rows for stripe in stripes]
        fragment = pads.ParquetFileFormat().make_fragment(path, system)
        kinds = self._kinds_of(fragment.physical_schema)
        groups = fragment.row_groups
        if self._filter is None:
            return kinds, [group.num_rows for group in groups]
        parts = (fragment.subset(row_group_ids=[group.id]) for group in groups)
        return kinds, [part.count_rows(filter=self._filter) for part in parts]

    def _kinds_of(self, schema: pa.Schema) -> dict[str, str]:
        absent = sorted({*self._columns, *self._filter_columns} - set(schema.names))
        if absent:
            raise ValueError(f"columns {absent} are missing; it has {sorted(schema.names)}")
        return {name: _kind_of(schema.field(name).type) for name in self._columns}


def find_files(paths: str | Sequence[str]) -> list[tuple[Any, str]]:
    """Find the files of paths and patterns, each once: those of a pattern in the order of names.

    Returns:
        The Arrow file system and the path of each.

    Raises:
        FileNotFoundError: One matches nothing.
        ValueError: There are no paths, or a file is of no known format.
    """
    found: dict[tuple[str, str], tuple[Any, str]] = {}
    patterns = [paths] if isinstance(paths, str | PurePath) else list(paths)
    if not patterns:
        raise ValueError("paths: expected at least one file or pattern, got none")
    for pattern in map(str, patterns):
        system, names = _matches(pattern)
        if not names:
            raise FileNotFoundError(f"paths: no file matches {pattern!r}")
        for name in names:
            if not name.endswith(_FORMATS):
                raise ValueError(f"paths: expected names that end in {_FORMATS}, got {name!r}")
            found.setdefault((system.type_name, name), (system, name))
    return list(found.values())


def _filtered(table: pa.Table, condition: Any) -> pa.Table:
    """Return the rows that pass, in order, on this thread: workers are forked."""
    source = acero.Declaration("table_source", acero.TableSourceNodeOptions(table))
    kept = acero.Declaration("filter", acero.FilterNodeOptions(condition), [source])
    return kept.to_table(use_threads=False)


def _matches(pattern: str) -> tuple[Any, list[str]]:
    if "://" not in pattern:
        return fs.LocalFileSystem(), sorted(glob.glob(pattern, recursive=True))
    import fsspec

    system, path = fsspec.core.url_to_fs(pattern)
    return fs.PyFileSystem(fs.FSSpecHandler(system)), sorted(system.glob(path))


def _version_of(system: Any, path: str) -> tuple[Any, Any]:
    info = system.get_file_info(path)
    if info.type is not fs.FileType.File:
        raise FileNotFoundError("there is no such file")
    return info.size, info.mtime_ns


def _kind_of(kind: pa.DataType) -> str:
    """Return what files must agree on: the width and the layout of values may differ."""
    text = str(kind)
    if pa.types.is_null(kind):
        return "null"
    if pa.types.is_dictionary(kind):
        return _kind_of(kind.value_type)
    if "list" in text:
        return f"lists of {_kind_of(kind.value_type)}"
    if "string" in text or "binary" in text:
        return "strings"
    if pa.types.is_temporal(kind):
        return text  # a unit is part of what an id means
    return "floats" if pa.types.is_floating(kind) else "integers or decimals"


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _naming(where: str, work: Callable[[], _T]) -> _T:
    """Run ``work``; its error names the file."""
    try:
        return work()
    except DataFileError:
        raise
    except _BAD as error:
        raise DataFileError(f"{where}: {error}") from error
