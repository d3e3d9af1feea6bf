"""Files of a trace: rows of steps as Parquet, and values as Arrow arrays."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recis_lightning.jagged import Jagged
from recis_lightning.nested_jagged import NestedJagged

__all__ = [
    "OWN_COLUMNS",
    "TraceFiles",
    "TraceStep",
    "check_scalar",
    "host_value",
    "import_pyarrow",
    "num_rows_of",
    "rewind_files",
]

_log = logging.getLogger(__name__)

OWN_COLUMNS = ("step", "rank")
_GROUP_BYTES = 8 << 20  # of a row group, the unit of encoding and reading
_FILE_BYTES = 256 << 20  # of a file, before compression
_FILE = re.compile(r"(\.?)rank-(\d+)-step-\d+\.parquet(?:\.part)?")


class TraceStep(NamedTuple):
    """Rows of a step on the host; a value is an array [B, ...], a list, ``_Ragged`` or a scalar."""

    step: int
    num_rows: int
    values: dict[str, Any]
    partition: dict[str, Any]


class _Ragged(NamedTuple):
    values: Any  # an array [N, ...], or _Ragged where there are two levels
    offsets: np.ndarray[Any, Any]


class TraceFiles:
    """Files of one writer: one is open at a time, and used by the writer's thread only."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.rank = path, rank
        self.first_unsaved = 0
        self._schema: Any = None
        self._writer: Any = None
        self._partition: dict[str, Any] = {}
        self._queued: list[Any] = []  # tables that do not fill a row group yet
        self._queued_bytes = self._file_bytes = 0

    def append(self, step: TraceStep) -> None:
        """Write the rows of a step, or queue them for the current row group."""
        try:
            table = self._table(step)
        except BaseException:
            self.finish()  # the earlier steps are valid
            self.first_unsaved = step.step
            raise
        if self._writer is not None and step.partition != self._partition:
            self.finish()
        if self._writer is None:
            self._open(step)
        self._queued.append(table)
        self._queued_bytes += table.nbytes
        if self._queued_bytes >= _GROUP_BYTES:
            self._write_group()
            if self._file_bytes >= _FILE_BYTES:
                self.finish()

    def finish(self) -> None:
        """Complete the open file and give it its final name."""
        if self._writer is None:
            return
        self._write_group()
        self._writer.close()
        self._unfinished.rename(self._final)
        self._writer = None

    def abandon(self) -> None:
        """Remove the open file, which could not be written."""
        if self._writer is None:
            return
        self._queued.clear()
        try:
            self._writer.close()
        except Exception:  # the error that made writing fail, again
            _log.debug("Could not close %s", self._unfinished, exc_info=True)
        self._unfinished.unlink(missing_ok=True)

    def _open(self, step: TraceStep) -> None:
        pa = import_pyarrow()
        self._partition, self.first_unsaved, self._file_bytes = step.partition, step.step, 0
        folder = self.path.joinpath(*(f"{key}={value}" for key, value in step.partition.items()))
        folder.mkdir(parents=True, exist_ok=True)
        self._final = folder / f"rank-{self.rank:05d}-step-{step.step:012d}.parquet"
        self._unfinished = folder / f".{self._final.name}.part"
        if self._final.exists():
            raise FileExistsError(f"{self._final} exists: another run traced this step")
        self._writer = pa.parquet.ParquetWriter(self._unfinished, self._schema)

    def _write_group(self) -> None:
        if self._queued:
            group = import_pyarrow().concat_tables(self._queued)
            self._queued.clear()
            self._file_bytes += self._queued_bytes
            self._queued_bytes = 0
            self._writer.write_table(group, row_group_size=max(1, group.num_rows))

    def _table(self, step: TraceStep) -> Any:
        pa = import_pyarrow()
        num_rows = step.num_rows
        arrays = {
            "step": pa.array(np.full(num_rows, step.step, np.int64)),
            "rank": pa.array(np.full(num_rows, self.rank, np.int32)),
        }
        for name, value in step.values.items():
            wanted = None if self._schema is None else self._schema.field(name).type
            array = _arrow(value, num_rows, wanted)
            if wanted is not None and array.type != wanted:
                raise TypeError(
                    f"trace of step {step.step}: {name!r} was {wanted} before, is {array.type} now"
                )
            arrays[name] = array
        table = pa.table(arrays)
        if self._schema is None:
            self._schema = table.schema
        return table


def import_pyarrow() -> Any:
    """Return pyarrow, or raise an ImportError that names the package to install."""
    try:
        import pyarrow as pa
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "a trace is a Parquet data set, and writing one needs pyarrow: "
            "pip install 'recis-lightning[trace]'"
        ) from error
    return pa


def host_value(name: str, value: Any) -> Any:
    """Return a value as a ``TraceStep`` holds it, on the host."""
    if isinstance(value, Tensor) and value.is_nested:
        if value.layout is not torch.jagged:
            raise TypeError(f"trace of {name!r}: expected a NestedTensor of layout torch.jagged")
        if value.lengths() is not None:  # type: ignore[attr-defined]
            value = value.contiguous()  # holes between the rows
        value = Jagged(value.values(), value.offsets())
    if isinstance(value, NestedJagged):
        outer = _array(name, value.outer_offsets).astype(np.int32)
        return _Ragged(host_value(name, value.inner()), outer)
    if isinstance(value, Jagged):
        return _Ragged(_array(name, value.values), _array(name, value.offsets).astype(np.int32))
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _array(name, value)
    return list(value) if isinstance(value, list) else check_scalar(name, value)


def check_scalar(name: str, value: Any) -> bool | int | float | str:
    """Return a value that is repeated for all rows of its step, or raise."""
    if not isinstance(value, bool | int | float | str):
        raise TypeError(
            f"trace of {name!r}: expected a tensor, array, Jagged, NestedJagged, list, number or "
            f"str, got {type(value).__name__}"
        )
    return value


def _array(name: str, value: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype is torch.bfloat16 else value).numpy()
    array = np.array(value)
    if array.dtype.kind not in "biufU" or 0 in array.shape[1:]:
        raise TypeError(
            f"trace of {name!r}: expected numbers [B, ...] with no empty dimension behind B, "
            f"got {array.dtype} {array.shape}"
        )
    return array


def num_rows_of(value: Any) -> int:
    """Return the number of rows of a value on the host; -1 for a scalar."""
    if isinstance(value, _Ragged):
        return len(value.offsets) - 1
    if isinstance(value, np.ndarray):
        return len(value) if value.ndim else -1
    return len(value) if isinstance(value, list) else -1


def _arrow(value: Any, num_rows: int, wanted: Any) -> Any:
    """Return a value on the host as an Arrow array of ``num_rows``."""
    pa = import_pyarrow()
    if isinstance(value, _Ragged):
        is_nested = isinstance(value.values, _Ragged)
        items = _arrow(value.values, 0, None) if is_nested else _fixed(value.values)
        return pa.ListArray.from_arrays(pa.array(value.offsets), items)
    if isinstance(value, list):
        return pa.array(value, type=wanted)
    if isinstance(value, np.ndarray) and value.ndim:
        return _fixed(value)
    return _fixed(np.full(num_rows, value))


def _fixed(values: np.ndarray[Any, Any]) -> Any:
    pa = import_pyarrow()
    array = pa.array(values.reshape(-1))
    for size in reversed(values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


def rewind_files(path: Path, step: int, is_ours: Callable[[int], bool]) -> int:
    """Remove the rows after a step, and unfinished files, of some ranks.

    Args:
        path: The data set's folder.
        step: The last step to keep.
        is_ours: Whether a rank's files are to be changed.

    Returns:
        Number of rows removed.
    """
    removed = 0
    for file in sorted(path.rglob("*rank-*-step-*.parquet*")):
        match = _FILE.fullmatch(file.name)
        if match is None or not is_ours(int(match[2])):
            continue
        if match[1]:
            file.unlink()  # its run was killed before the file was complete
        else:
            removed += _rewind_file(file, step)
    return removed


def _rewind_file(path: Path, step: int) -> int:
    """Remove the rows of a file after a step, and the file if none are left."""
    pa = import_pyarrow()
    metadata = pa.parquet.read_metadata(path)
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    if not any(group.num_rows and group.column(0).statistics.max > step for group in groups):
        return 0
    table = pa.parquet.read_table(path, partitioning=None)
    kept = table.filter(pa.compute.less_equal(table["step"], step))
    if kept.num_rows:
        unfinished = path.with_name(f".{path.name}.part")
        pa.parquet.write_table(kept, unfinished)
        unfinished.replace(path)
    else:
        path.unlink()
    return int(table.num_rows - kept.num_rows)
