"""Sink that writes deltas as a chain of files, which ``follow`` and ``restore`` read."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from threading import Thread

from recis_lightning.arguments import check_folder, check_int
from recis_lightning.distributed import collectives
from recis_lightning.serving.array_file import FileRecord
from recis_lightning.serving.chain import (
    State,
    WriterLock,
    chain_folder,
    links_of,
    publishing,
    remove_links,
    remove_strays,
)
from recis_lightning.serving.chain_link import (
    BASE,
    DELTA,
    Head,
    Link,
    Part,
    rows_file,
)
from recis_lightning.serving.compaction import compact
from recis_lightning.serving.delta import Delta
from recis_lightning.serving.delta_file import dense_dtypes, tables_of, write_delta


class ChainSink:
    """Sink that writes a chain of deltas into ``folder/deltas``.

    The first delta becomes a base, and takes the place of a chain that is there: of a run that was
    killed, for one. Each rank writes a file of its shard; when all are durable, rank 0 writes the
    link's record and then ``head.json``, aside and renamed. So a reader finds the chain before the
    delta or with it, wherever a process is killed. One sink writes to a chain at a time.

    Args:
        folder: Where to; made if it is not there. On several ranks all of them see it. A folder of
            ``serving.export`` is one for ``serving.follow``.
        compact_every: Deltas after which they and the base become a new base, in a thread of rank
            0; None never compacts.

    Raises:
        TypeError, ValueError: ``folder`` is no path, or ``compact_every`` no int >= 1 and not None.
        NotADirectoryError: ``folder`` is a file.
    """

    def __init__(self, folder: str | os.PathLike[str], compact_every: int | None = 100) -> None:
        if compact_every is not None:
            check_int("compact_every", compact_every, least=1, alternative=" or None")
        self.folder = chain_folder(check_folder("folder", folder))
        self.compact_every = compact_every
        self._lock: WriterLock | None = None
        self._last: State | None = None  # state that this sink published last
        self._compaction: Thread | None = None
        self._compaction_error: BaseException | None = None

    def write(self, delta: Delta) -> None:
        """Add a delta to the chain; all ranks call it together, and all raise if one fails.

        Raises:
            RuntimeError: Another writer adds to the chain, or another rank failed.
            OSError, ValueError: A file cannot be written, or the chain that is there is damaged.
        """
        rank, num_ranks = collectives.rank(), collectives.world_size()
        begun = collectives.run_on_all_ranks(lambda: None if rank else self._begin())
        state = collectives.gather(begun)[0]
        assert state is not None
        seq, id = state
        kind = BASE if self._last is None else DELTA
        path = self.folder / rows_file(kind, seq, id, rank, num_ranks)

        def publish() -> None:
            if rank == 0:
                self._publish(kind, state, delta, parts)

        try:
            parts = collectives.gather(
                collectives.run_on_all_ranks(lambda: write_delta(path, delta, rank == 0))
            )
            collectives.run_on_all_ranks(publish)
        except BaseException:
            if self._is_published(state):
                self._last = state
            else:
                path.unlink(missing_ok=True)
            raise
        self._last = state
        if rank == 0:
            self._compact_if_due()

    def close(self) -> None:
        """Wait for a compaction that runs, and let others write."""
        try:
            self._end_compaction()
        finally:
            if self._lock is not None:
                self._lock.close()
            self._lock, self._last = None, None

    def _begin(self) -> State:
        """Return number and id of the link to write."""
        self._raise_compaction_error()
        if self._lock is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = WriterLock(self.folder, patience=1.0)
            with publishing(self.folder):
                remove_strays(self.folder)
        if self._last is not None:
            return State(self._last.seq + 1, secrets.token_hex(8))
        head = Head.read(self.folder)
        return State(0 if head is None else head.seq + 1, secrets.token_hex(8))

    def _publish(
        self,
        kind: str,
        state: State,
        delta: Delta,
        parts: list[tuple[FileRecord, dict[str, Part]]],
    ) -> None:
        """Write the record of a link, and make it the chain's last one."""
        tables = tables_of(delta, [of_rank for _, of_rank in parts])
        parent = "" if self._last is None else self._last.id
        link = Link(
            *(kind, *state, parent, state.id, delta.step, time.time()),
            *(tables, [file for file, _ in parts], dense_dtypes(delta)),
        )
        if kind == BASE and not all(p.is_whole for table in tables for p in table.parts):
            raise ValueError("the first delta of a sink must have all rows")
        try:
            link.write(self.folder)
            with publishing(self.folder):
                head, superseded = Head.read(self.folder), list[Link]()
                if kind == BASE:
                    if head is not None:
                        superseded = links_of(self.folder, head)
                    new = Head(*state, *state)
                else:
                    if head is None or State(head.seq, head.id) != self._last:
                        raise RuntimeError(f"{self.folder}: somebody else changed this chain")
                    new = Head(*state, head.base_seq, head.base_id)
                new.write(self.folder)
                remove_links(self.folder, superseded)
        except BaseException:
            if not self._is_published(state):
                for name in link.file_names():
                    (self.folder / name).unlink(missing_ok=True)
            raise

    def _is_published(self, state: State) -> bool:
        with contextlib.suppress(ValueError, OSError):
            head = Head.read(self.folder)
            return head is not None and State(head.seq, head.id) == state
        return False

    def _compact_if_due(self) -> None:
        head = Head.read(self.folder)
        if self.compact_every is None or head is None or self._compaction is not None:
            if self._compaction is not None and not self._compaction.is_alive():
                self._compaction = None
            return
        if head.seq - head.base_seq >= self.compact_every:
            self._compaction = Thread(target=self._compact, name="recis_lightning compaction")
            self._compaction.start()

    def _compact(self) -> None:
        try:
            compact(self.folder.parent)
        except BaseException as error:
            self._compaction_error = error

    def _end_compaction(self) -> None:
        if self._compaction is not None:
            self._compaction.join()
            self._compaction = None
        self._raise_compaction_error()

    def _raise_compaction_error(self) -> None:
        error, self._compaction_error = self._compaction_error, None
        if error is not None:
            raise RuntimeError(f"{self.folder}: a compaction failed: {error}") from error


__all__ = ["ChainSink"]
