"""Reading a columnar file: its footer, the rows of its parts, and a part's columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from pyarrow import acero, fs, orc, parquet
from torch.utils.data import get_worker_info

from recis_lightning.close_names import did_you_mean
from recis_lightning.data.conversion import is_list
from recis_lightning.data.filter import columns_of, parse_filter, trusts_statistics
from recis_lightning.data.partitions import partition_kinds, partitions_of, with_partitions
from recis_lightning.data.windows import Window

__all__ = ["EARLIEST", "FORMATS", "DataFileError", "FileReader", "FoundFile", "Split", "version_of"]

_T = TypeVar("_T")
FORMATS = (".parquet", ".orc")
# pyarrow reports damage as any of these, and lacks of memory as MemoryError, which passes.
_BAD = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, NotImplementedError)
EARLIEST = -(2**62)  # before every window


class DataFileError(ValueError):
    """A file of a data set that cannot be read as asked; the message begins with its name."""


class Split(NamedTuple):
    """Part of a file that is read at once: rows of a row group of Parquet, or a stripe of ORC.

    Attributes:
        file: Index of the file.
        group: Index of the row group or stripe in the file.
        num_rows: Its rows that pass the filter and belong to the window.
        window: Number of the window; 0 where data are not divided.
    """

    file: int
    group: int
    num_rows: int
    window: int = 0


class FoundFile(NamedTuple):
    """A file, and what its footer and its rows' times say.

    Attributes:
        path: Path in its file system.
        version: Size and time of change.
        kinds: Kind of each column.
        parts: Row group or stripe, rows, and window of each part that has rows.
        first_window: Rows of earlier windows count as of this one.
        num_rows: Its rows, those too that the filter leaves out.
    """

    path: str
    version: tuple[Any, Any]
    kinds: dict[str, str]
    parts: list[tuple[int, int, int]]
    first_window: int
    num_rows: int

    def splits_of(self, index: int) -> list[Split]:
        """Return its splits, as file ``index``."""
        return [Split(index, *part) for part in self.parts]


class FileReader:
    """Columns that are read of files, by which rows.

    A column that a file lacks may be in its path, in a folder such as ``day=2026-11-30``.

    Args:
        columns: Columns to read.
        filter: Rows to keep, as ``parse_filter`` takes it; None keeps all.
        window: Windows of time; None divides nothing.
        texts: Columns that are strings where a path has them, whatever it holds.
    """

    def __init__(
        self,
        columns: Sequence[str],
        filter: str | None = None,
        window: Window | None = None,
        texts: Collection[str] = (),
    ) -> None:
        self.window = window
        self._texts = frozenset(texts)
        self._columns = list(dict.fromkeys(columns))
        self._filter = filter
        if filter is not None:
            parse_filter(filter)  # so that a wrong one is refused before any file is read
        self._filter_columns = [] if filter is None else columns_of(filter)
        self._time = None if window is None else window.column
        times = [] if self._time is None else [self._time]
        self._read_columns = list(dict.fromkeys([*self._columns, *self._filter_columns, *times]))

    @property
    def filter(self) -> str | None:
        """Rows to keep, as it was given."""
        return self._filter

    def examine(self, system: Any, path: str, first_window: int = EARLIEST) -> FoundFile:
        """Read a file's footer, and the columns that the filter and the window name.

        Parquet's statistics spare reading the filter's columns of row groups where they decide.

        Args:
            system: Arrow's file system.
            path: Path in it.
            first_window: Rows of earlier windows count as of this one.

        Raises:
            DataFileError: The file cannot be read, or lacks a column.
        """
        version = _naming(path, lambda: version_of(system, path))
        kinds, num_rows, counts = _naming(path, lambda: self._examine(system, path, first_window))
        parts = [
            (group, kept, window)
            for group, found in enumerate(counts)
            for window, kept in sorted(found.items())
            if kept
        ]
        return FoundFile(path, version, kinds, parts, first_window, num_rows)

    def read(self, system: Any, file: FoundFile, split: Split) -> dict[str, pa.Array]:
        """Read the columns of a split: column -> its values in the rows of the split.

        Raises:
            DataFileError: The file is damaged, or has changed.
        """
        where = f"{file.path}, part {split.group}"

        def load() -> pa.Table:
            part = self._kept(system, file.path, split.group, self._read_columns)
            if self._time is None:
                return part
            numbers = self._numbers_of(part, file.first_window)
            return part.filter(pa.array(numbers == split.window))

        def check_version() -> None:
            if version_of(system, file.path) != file.version:
                raise ValueError("the file has changed since the data set was made")

        try:
            table = _naming(where, load)
        except DataFileError:
            _naming(where, check_version)  # a better reason, if it is one
            raise
        _naming(where, check_version)  # only now: it may change while it is read
        if table.num_rows != split.num_rows:
            raise DataFileError(
                f"{where}: {split.num_rows} rows when the data set was made, "
                f"{table.num_rows} when it was read"
            )
        return {name: _whole(table[name]) for name in self._columns}

    def _examine(
        self, system: Any, path: str, first_window: int
    ) -> tuple[dict[str, str], int, list[Counter[int]]]:
        """Return the kind of each column, all rows, and those of each window in each part."""
        if path.endswith(".orc"):
            file = orc.ORCFile(system.open_input_file(path))
            kinds, num_parts = self._kinds_of(file.schema, path), file.nstripes
            num_rows = file.nrows
        else:
            fragment = pads.ParquetFileFormat().make_fragment(path, system)
            kinds = self._kinds_of(fragment.physical_schema, path)
            num_parts, num_rows = len(fragment.row_groups), fragment.metadata.num_rows
        if self._time is not None:
            names = list(dict.fromkeys([self._time, *self._filter_columns]))
            kept = (self._kept(system, path, group, names) for group in range(num_parts))
            numbers = (self._numbers_of(part, first_window).tolist() for part in kept)
            return kinds, num_rows, [Counter(found) for found in numbers]
        number = 0 if self.window is None else self.window.of_path(path)
        if path.endswith(".orc"):
            counts = self._stripe_rows(system, path, file)
        else:
            counts = self._group_rows(system, path, fragment)
        return kinds, num_rows, [Counter({max(number, first_window): kept}) for kept in counts]

    def _stripe_rows(self, system: Any, path: str, file: orc.ORCFile) -> list[int]:
        if self._filter is None and file.nstripes <= 1:
            return [file.nrows] * file.nstripes
        names = self._filter_columns or self._columns[:1]
        return [self._kept(system, path, i, names).num_rows for i in range(file.nstripes)]

    def _group_rows(self, system: Any, path: str, fragment: Any) -> list[int]:
        """Return the rows of each row group that pass the filter.

        They are counted by the values that will be read. Statistics only rule out: they leave out
        NaN, so a row group whose bounds pass may have rows that do not.
        """
        schema = fragment.physical_schema
        condition = self._condition(schema, path)
        if isinstance(condition, bool):
            return [condition * group.num_rows for group in fragment.row_groups]
        kinds = dict(zip(schema.names, schema.types, strict=True))
        names = self._filter_columns
        left = fragment
        if trusts_statistics(self._filter or "", kinds):
            try:
                left = fragment.subset(filter=condition)
            except pa.ArrowException as error:
                raise ValueError(f"filter: {error}, in {self._filter!r}") from error
        counts = [0] * len(fragment.row_groups)
        for group in left.row_groups:
            counts[group.id] = self._kept(system, path, group.id, names, fragment.metadata).num_rows
        return counts

    def _condition(self, schema: pa.Schema, path: str) -> Any:
        """Return the filter, for the columns of a file; True or False if it is for all its rows."""
        if self._filter is None:
            return True
        kinds = dict(zip(schema.names, schema.types, strict=True))
        partitions = partitions_of(path).items()
        values = {name: text for name, text in partitions if name not in kinds}
        return parse_filter(self._filter, kinds, values)

    def _kept(
        self, system: Any, path: str, group: int, names: list[str], footer: Any = None
    ) -> pa.Table:
        """Read columns of a row group or stripe, of the rows that pass the filter.

        The footer of Parquet is read, unless it is given.
        """
        with system.open_input_file(path) as source:
            if path.endswith(".orc"):
                stripes = orc.ORCFile(source)
                present = _present(stripes.schema, names)
                # A name with a dot may be that of a struct's field as well: then all are read.
                some = None if any("." in name for name in present) else present
                part = pa.Table.from_batches([stripes.read_stripe(group, columns=some)])
                part = part.select(present)
            else:
                # Arrow's own threads do not survive the fork that made a worker.
                threads = get_worker_info() is None
                file = parquet.ParquetFile(
                    source, metadata=footer, pre_buffer=False, page_checksum_verification=True
                )
                present = _present(file.schema_arrow, names)
                part = file.read_row_group(group, columns=present, use_threads=threads)
        try:
            part = _filtered(_without_views(part), self._condition(part.schema, path))
        except pa.ArrowException as error:
            raise ValueError(f"filter: {error}, in {self._filter!r}") from error
        return with_partitions(part, path, names, self._texts)

    def _numbers_of(self, part: pa.Table, first_window: int) -> Any:
        """Return the window of each row."""
        assert self.window is not None
        assert self._time is not None
        try:
            numbers = self.window.of_times(_whole(part[self._time]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"column {self._time!r}: {error}") from error
        return np.maximum(numbers, first_window)

    def _kinds_of(self, schema: pa.Schema, path: str) -> dict[str, str]:
        found = partition_kinds(path, self._texts)
        found |= dict(zip(schema.names, schema.types, strict=True))
        absent = sorted(set(self._read_columns) - found.keys())
        if absent:
            advice = did_you_mean(absent, found)
            of_filter = sorted(set(self._filter_columns) & set(absent))
            if of_filter == absent:
                raise ValueError(
                    f"filter: columns {absent} of {self._filter!r} are missing; it has "
                    f"{sorted(found)}{advice}"
                )
            raise ValueError(f"columns {absent} are missing; it has {sorted(found)}{advice}")
        for name in self._read_columns:
            if schema.names.count(name) > 1:
                raise ValueError(f"column {name!r} is there {schema.names.count(name)} times")
        return {name: _kind_of(name, found[name]) for name in self._columns}


def _present(schema: pa.Schema, names: list[str]) -> list[str]:
    """Return the columns that a file itself has; one at least, which says how many rows it has."""
    return [name for name in names if name in schema.names] or schema.names[:1]


def version_of(system: Any, path: str) -> tuple[Any, Any]:
    """Return the size of a file, and the time of its last change in nanoseconds.

    Raises:
        FileNotFoundError: There is no such file.
    """
    info = system.get_file_info(path)
    if info.type is fs.FileType.Directory:
        raise FileNotFoundError(f"it is a folder; name its files, as in {path}/*.parquet")
    if info.type is not fs.FileType.File:
        raise FileNotFoundError("there is no such file")
    return info.size, info.mtime_ns


def _filtered(table: pa.Table, condition: Any) -> pa.Table:
    """Return the rows that pass, in order, on this thread: workers are forked."""
    if isinstance(condition, bool):
        return table if condition else table.slice(0, 0)
    source = acero.Declaration("table_source", acero.TableSourceNodeOptions(table))
    kept = acero.Declaration("filter", acero.FilterNodeOptions(condition), [source])
    return kept.to_table(use_threads=False)


def _without_views(table: pa.Table) -> pa.Table:
    """Return a table without string views, which Arrow cannot filter."""
    for index, kind in enumerate(table.schema.types):
        if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
            wide = pa.large_string() if pa.types.is_string_view(kind) else pa.large_binary()
            table = table.set_column(index, table.schema.names[index], table[index].cast(wide))
    return table


def _kind_of(name: str, kind: pa.DataType) -> str:
    """Return what files must agree on: the width and the layout of values may differ.

    Raises:
        ValueError: It is a type that no column of a data set takes.
    """
    if isinstance(kind, pa.BaseExtensionType):
        return _kind_of(name, kind.storage_type)
    text = str(kind)
    if pa.types.is_null(kind):
        return "null"
    if pa.types.is_dictionary(kind):
        return _kind_of(name, kind.value_type)
    if is_list(kind):
        return f"lists of {_kind_of(name, kind.value_type)}"
    if pa.types.is_nested(kind):
        raise ValueError(f"column {name!r} holds {kind}, and expected are values or lists")
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
    except (DataFileError, MemoryError):
        raise
    except _BAD as error:
        raise DataFileError(f"{where}: {error}") from error
