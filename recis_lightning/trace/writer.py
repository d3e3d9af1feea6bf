"""``TraceWriter``: a Parquet data set of rows for every step, written in the background."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from recis_lightning.arguments import check_int
from recis_lightning.trace.files import (
    OWN_COLUMNS,
    TraceFiles,
    TraceStep,
    host_value,
    import_pyarrow,
    num_rows_of,
    rewind_files,
)

__all__ = ["TraceWriter", "check_flushing", "check_names"]

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.1  # between checks that the thread is alive, by callers that wait


class TraceWriter:
    """Writes a table of rows for every step to a Parquet data set, in the background.

    Files are ``{path}/{key}={value}/.../rank-00000-step-000000000001.parquet``: partitions as
    Hive names them, the rank that wrote, the first step in the file. Rows have int64 ``step``,
    int32 ``rank`` and a column for each tensor: fixed-size lists for [B, d], lists for ragged
    values, float32 for bfloat16. Rows of a rank are in the order of its steps. An open file is
    hidden (``.part``) and gets its name when it is complete: at 256 MiB, when the partition
    changes, at ``flush`` and at ``close``; and, for readers that follow a run, at the latest when
    ``flush_rows`` rows or ``flush_seconds`` have gone by since it was opened.

    ``write`` returns as soon as the step is in the queue, and waits while the queue is full. If
    writing fails, the next call raises.

    Args:
        path: The data set's folder; created if missing.
        tensors: The names of the columns; None takes those of the first step.
        rank: Of this process.
        queue_size: Steps that may wait to be written, at least 1.
        flush_rows: Complete a file with the step that brings it to so many rows; None: never.
        flush_seconds: Complete a file so long after its first step, if no other step comes too;
            None: never.

    Raises:
        ImportError: pyarrow is not installed.
        TypeError, ValueError: An argument is of a wrong type or out of range; the error names it.

    Example:
        >>> import tempfile, torch, pyarrow.dataset
        >>> folder = tempfile.mkdtemp()
        >>> with TraceWriter(folder, ["score"]) as writer:
        ...     for step in range(1, 3):
        ...         writer.write(step, {"score": torch.tensor([0.5, step])})
        >>> pyarrow.dataset.dataset(folder).to_table()["score"].to_pylist()
        [0.5, 1.0, 0.5, 2.0]
    """

    def __init__(
        self,
        path: str | Path,
        tensors: Sequence[str] | None = None,
        *,
        rank: int = 0,
        queue_size: int = 16,
        flush_rows: int | None = None,
        flush_seconds: float | None = None,
    ) -> None:
        import_pyarrow()
        check_flushing(flush_rows, flush_seconds)
        self.flush_rows, self.flush_seconds = flush_rows, flush_seconds
        self.path = Path(path)
        self.tensors = None if tensors is None else check_names(tensors)
        self.rank = check_int("rank", rank, least=0)
        self.path.mkdir(parents=True, exist_ok=True)
        self._queue: queue.Queue[TraceStep | _Flush | None] = queue.Queue(
            check_int("queue_size", queue_size, least=1)
        )
        self._files = TraceFiles(self.path, self.rank)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = threading.Thread(
            target=self._run, name=f"TraceWriter({self.path})", daemon=True
        )
        self._thread.start()

    def write(
        self, step: int, columns: Mapping[str, Any], partition: Mapping[str, Any] | None = None
    ) -> None:
        """Queue the rows of a step.

        Args:
            step: Value of the step column.
            columns: Name -> value, as ``add_to_trace`` takes them; all with as many rows.
            partition: Key -> value, the part of the data set that the rows belong to.

        Raises:
            TypeError: A value is of a type that ``add_to_trace`` does not take.
            ValueError: A column is missing, new or reserved, or two differ in their rows.
            RuntimeError: An earlier step could not be written, or the writer is closed.
        """
        self._check_alive()
        if self.tensors is None:
            self.tensors = check_names(list(columns))
        if set(columns) != set(self.tensors):
            missing = sorted(set(self.tensors) - set(columns))
            new = sorted(set(columns) - set(self.tensors))
            raise ValueError(
                f"trace of step {step}: expected {self.tensors}, missing {missing}, not known {new}"
            )
        values = {name: host_value(name, columns[name]) for name in self.tensors}
        sizes = {n: size for n, value in values.items() if (size := num_rows_of(value)) >= 0}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"trace of step {step}: expected as many rows everywhere, got {sizes}")
        num_rows = next(iter(sizes.values()), 1)
        self._put(TraceStep(int(step), num_rows, values, dict(partition or {})))

    def flush(self) -> None:
        """Wait until all steps so far are in complete files.

        Raises:
            RuntimeError: A step could not be written, or the writer is closed.
        """
        self._check_alive()
        flush = _Flush(threading.Event())
        self._put(flush)
        while not flush.done.wait(_POLL_SECONDS):
            self._check_alive()
        self._check_alive()

    def close(self) -> None:
        """Write the queued steps, complete the file and stop; a second call does nothing.

        Raises:
            RuntimeError: A step could not be written.
        """
        thread = self._thread
        if thread is None:
            return
        while thread.is_alive():
            try:
                self._queue.put(None, timeout=_POLL_SECONDS)
                break
            except queue.Full:
                continue
        thread.join()
        self._thread = None
        if self._error is not None:
            self._raise()

    def rewind(self, step: int, ranks: int = 1) -> int:
        """Remove the rows of steps after ``step`` that an earlier run left.

        To be called before the first ``write``. If the earlier run had more ranks, the files of
        its rank ``r`` are handled by rank ``r % ranks``.

        Args:
            step: The last step to keep.
            ranks: Number of processes that write now.

        Returns:
            Number of rows removed.
        """
        return rewind_files(self.path, step, lambda rank: rank % ranks == self.rank % ranks)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except RuntimeError:  # the block's own exception matters more
            _log.exception("The trace in %s is incomplete", self.path)

    def _put(self, item: TraceStep | _Flush) -> None:
        while True:
            self._check_alive()
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
                return
            except queue.Full:
                continue

    def _check_alive(self) -> None:
        if self._thread is None:
            raise RuntimeError(f"the trace in {self.path} is closed")
        if not self._thread.is_alive():
            self._raise()

    def _raise(self) -> None:
        raise RuntimeError(
            f"the trace in {self.path} could not be written; what was queued from step "
            f"{self._files.first_unsaved} on is lost: {self._error}"
        ) from self._error

    def _run(self) -> None:
        try:
            rows, due = 0, math.inf  # rows of the open file, and when it must be complete
            while True:
                try:
                    wait = None if due == math.inf else max(due - time.monotonic(), 0.0)
                    item = self._queue.get(timeout=wait)
                except queue.Empty:
                    self._files.finish()
                    rows, due = 0, math.inf
                    continue
                if item is None:
                    break
                if isinstance(item, _Flush):
                    self._files.finish()
                    rows, due = 0, math.inf
                    item.done.set()
                    continue
                self._files.append(item)
                rows += item.num_rows
                if due == math.inf and self.flush_seconds is not None:
                    due = time.monotonic() + self.flush_seconds
                if rows >= (self.flush_rows or math.inf) or time.monotonic() >= due:
                    self._files.finish()
                    rows, due = 0, math.inf
            self._files.finish()
        except BaseException as error:  # the next call raises it in the caller's thread
            self._error = error
            self._files.abandon()


class _Flush(NamedTuple):
    done: threading.Event


def check_flushing(flush_rows: int | None, flush_seconds: float | None) -> None:
    """Raise unless both are positive numbers or None."""
    if flush_rows is not None:
        check_int("flush_rows", flush_rows, least=1, alternative=" or None")
    if flush_seconds is None:
        return
    if isinstance(flush_seconds, bool) or not isinstance(flush_seconds, int | float):
        raise TypeError(f"flush_seconds: expected a number > 0 or None, got {flush_seconds!r}")
    if not 0 < flush_seconds <= threading.TIMEOUT_MAX:
        raise ValueError(f"flush_seconds: expected a number > 0 or None, got {flush_seconds!r}")


def check_names(names: Sequence[str]) -> list[str]:
    """Return the names of a trace's columns as a list, or raise if they are invalid."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"tensors: expected a sequence of names, got {names!r}")
    invalid = [name for name in names if name in OWN_COLUMNS or list(names).count(name) > 1]
    if invalid or not names:
        raise ValueError(
            f"tensors: expected different names, none of {OWN_COLUMNS}, got {list(names)!r}"
        )
    return list(names)
