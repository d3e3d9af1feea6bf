"""``ColumnarDataset``: batches of tensors from Parquet and ORC files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from recis_lightning.arguments import check_int
from recis_lightning.data.background import in_background
from recis_lightning.data.columns import Column
from recis_lightning.data.features import Features, features_of
from recis_lightning.data.file_reader import DataFileError, FileReader, Split
from recis_lightning.data.files import Files, FileSet
from recis_lightning.data.filter import normal_filter
from recis_lightning.data.follow import FileStream, Follow, check_follow
from recis_lightning.data.lanes import Lane, Plan
from recis_lightning.data.order import Block, Deal, blocks_of, whole
from recis_lightning.data.rows import Batch, join_rows, pinned
from recis_lightning.data.shared_epoch import SharedEpoch
from recis_lightning.data.windows import Window, check_window
from recis_lightning.distributed import collectives

__all__ = ["ColumnarDataset", "state_after"]

_STATE_VERSION = 1


class ColumnarDataset(IterableDataset[Any]):
    """Batches from columnar files, in an order that depends on seed and epoch alone.

    A split is a row group of Parquet or a stripe of ORC. With ``shuffle_rows`` the splits are
    shuffled, joined to blocks of at least that many rows, and rows are shuffled within each block;
    memory holds two blocks. The rows of an epoch, in that order, are cut into as many runs of equal
    length as there are ranks, and a rank's batches follow its run. All ranks get the same number of
    batches; the last has between 1 and ``batch_size + 1`` rows, or none if there are fewer rows
    than ranks. The batches do not depend on the DataLoader's workers.

    Each iteration is an epoch; a complete one moves on to the next. Where worker processes iterate,
    call ``set_epoch``; persistent ones heed it, but not a place that is loaded while they live.

    With ``window`` or ``follow`` an epoch is a window: the rows of an hour, or the files that are
    new. ``set_epoch(k)`` selects window k (of fixed files, modulo ``num_windows``), ``window``
    names it, and ``for name in data.windows():`` goes through them.

    Args:
        paths: Files or glob patterns, of names that end in ``.parquet`` or ``.orc``; a URL is read
            through fsspec. What they lack may be in folders such as ``day=2026-11-30``.
        columns: Entries of a batch; None, if ``features`` has them.
        batch_size: Rows of a batch on one rank.
        features: Columns, and transforms that are applied to the rows of a block at once.
        convert: Function of a batch whose result takes its place, called where batches are made.
        shuffle_rows: As above; 0 keeps the order of files and rows.
        seed: Of the order.
        filter: Rows to keep, as in ``"country == 'DE' and price > 0"``. Row groups that Parquet's
            statistics rule out are not read. Counting the rows reads the filter's columns once,
            when the data set is made.
        drop_last: Whether rows that do not fill a batch on every rank are left out.
        on_bad_file: ``"error"``, or ``"skip"`` to log and leave out a file that cannot be opened,
            lacks a column or has another kind of it than the first file. Damage that shows only
            when a split is read is an error. A followed file is bad if it was so twice.
        window: Length of windows of time, such as ``"1h"``, each of which is an epoch, by the times
            in the files' paths; ``Window(length, column)`` goes by a column.
        follow: Whether new files are read as they appear; then an epoch is a window of time or,
            without ``window``, the files that appeared since the last one. ``Follow(...)`` says
            how long. Needs no files at first.
        lanes: Runs into which a rank's rows are cut, whose batches take turns. With W workers make
            it a multiple of W: each then reads only its own splits; with 1 every worker reads all.
            The order depends on it.
        prefetch: Batches made ahead, in a thread; 0 makes none.
        pin_memory: Whether batches lie in pinned memory; needs a GPU.

    Attributes:
        epoch: Epoch of the next iteration.
        stop_waiting: Function without arguments that says that a wait for new files is to end, and
            the stream with it; None never does. Called on every rank, about ten times a second.

    Raises:
        FileNotFoundError: A pattern matches nothing.
        DataFileError: A file is bad; the message begins with its name.
        TypeError, ValueError: An argument is invalid.

    Example:
        >>> import tempfile, pyarrow as pa, pyarrow.parquet
        >>> from recis_lightning.data import ColumnarDataset, Id, Label
        >>> folder = tempfile.TemporaryDirectory()
        >>> rows = pa.table({"user": ["ann", "bob", "ann"], "click": [1, 0, 0]})
        >>> pa.parquet.write_table(rows, f"{folder.name}/day-1.parquet")
        >>> columns = [Id("user", hash="farmhash64"), Label("click")]
        >>> data = ColumnarDataset(f"{folder.name}/*.parquet", columns, batch_size=2)
        >>> [batch["click"].tolist() for batch in data]
        [[1.0, 0.0], [0.0]]
        >>> folder.cleanup()
    """

    def __init__(
        self,
        paths: str | Sequence[str],
        columns: Sequence[Column] | None = None,
        batch_size: int = 512,
        *,
        features: Features | None = None,
        convert: Callable[[Batch], Any] | None = None,
        shuffle_rows: int = 0,
        seed: int = 0,
        filter: str | None = None,
        drop_last: bool = False,
        on_bad_file: str = "error",
        window: str | Window | None = None,
        follow: bool | Follow = False,
        lanes: int = 1,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        self.features = features_of(columns, features)
        self.columns = self.features.columns
        self.batch_size = check_int("batch_size", batch_size, least=1)
        self.shuffle_rows = check_int("shuffle_rows", shuffle_rows, least=0)
        self.seed = check_int("seed", seed, least=0)
        self.lanes = check_int("lanes", lanes, least=1)
        self.prefetch = check_int("prefetch", prefetch, least=0)
        self.drop_last, self.pin_memory, self.convert = drop_last, pin_memory, convert
        sources = [source for column in self.columns for source in column.sources]
        hashed = [column.sources[0] for column in self.columns if getattr(column, "hash", None)]
        reader = FileReader(sources, filter, check_window(window), hashed)
        self._filter = None if filter is None else normal_filter(filter)
        stream = check_follow(follow)
        self.stop_waiting: Callable[[], bool] | None = None
        self._files: Files
        if stream is None:
            self._files = FileSet(paths, reader, on_bad_file)
        else:
            self._files = FileStream(paths, reader, stream, on_bad_file, self._stops)
        self.epoch = 0
        self._stages: list[tuple[int, int, int, int]] = []  # ranks, batch size, lanes, batches
        self._num_yielded = 0
        self._pickled_ranks = (0, 1)  # rank and their number, for workers that are not forked
        self._shared_epoch = SharedEpoch()

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_pickled_ranks": self._ranks(),
            "_shared_epoch": self._shared_epoch.of_copy(),
            "stop_waiting": None,
        }

    @property
    def num_rows(self) -> int:
        """Rows of an epoch (of its window), of all ranks."""
        return sum(split.num_rows for split in self._files.splits)

    def __len__(self) -> int:
        """Return the batches of this rank in an epoch, those before a resumption included."""
        return sum(self.progress())

    @property
    def window(self) -> str | None:
        """Name of the window that was selected last; None without ``window`` and ``follow``."""
        return self._files.window

    @property
    def num_windows(self) -> int | None:
        """Number of windows, 1 where data are not divided; None with ``follow``."""
        return self._files.num_windows

    @property
    def ended(self) -> bool:
        """Whether a followed stream has ended: the last ``set_epoch`` found no further window."""
        return self._files.ended

    def windows(self) -> Iterator[str | None]:
        """Select one window after the other, from the place in the data, and yield its name.

        With ``follow`` it ends where the stream does, else after the last window.

        Example:
            >>> import tempfile, pyarrow as pa, pyarrow.parquet
            >>> from recis_lightning.data import ColumnarDataset, Id
            >>> folder = tempfile.TemporaryDirectory()
            >>> for day in (1, 2):
            ...     path = f"{folder.name}/2026-12-0{day}.parquet"
            ...     pa.parquet.write_table(pa.table({"user": [day]}), path)
            >>> data = ColumnarDataset(f"{folder.name}/*.parquet", [Id("user")], window="1d")
            >>> for window in data.windows():
            ...     print(window, [batch["user"].tolist() for batch in data])
            2026-12-01 [[1]]
            2026-12-02 [[2]]
            >>> folder.cleanup()
        """
        number, count = self.epoch, self.num_windows
        if count == 0:  # no row of any window is kept
            return
        last = None if count is None else (number // count + 1) * count
        while number != last:
            self.set_epoch(number)
            if self.ended:
                return
            yield self.window
            number += 1

    def progress(self) -> tuple[int, int]:
        """Return the batches of this rank in the epoch: before the place in the data, and left."""
        plan = self._plan()
        return plan.first, plan.deal.num_batches - plan.skipped

    def why_empty(self) -> str | None:
        """Return why no epoch has a batch, such as a filter; None if one has, or may get one."""
        reason = self._files.why_empty()
        if reason is not None or self.num_windows != 1 or len(self):
            return reason
        num_ranks = self._ranks()[1]  # with one row a rank has a batch, unless it is left out
        return (
            f"drop_last: {self.num_rows:,} rows are fewer than a batch of {self.batch_size} on "
            f"each of {num_ranks} rank{'s' if num_ranks > 1 else ''}"
        )

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be of this epoch; a place loaded within it is kept.

        With ``follow`` an epoch after the one that was read begins the next window: all ranks call
        this, and wait until there is one, or the stream ends.

        Raises:
            DataFileError: A followed file is bad.
            ValueError: The epoch is below 0, or, with ``follow``, before that of the open window.
        """
        check_int("epoch", epoch, least=0)
        self._files.select(epoch)
        self._go_to(epoch)
        if get_worker_info() is None:
            self._shared_epoch.tell(epoch)

    def heed_parent(self) -> None:
        """Go to the epoch that this worker's parent has set since the worker was started.

        Raises:
            RuntimeError: The parent has loaded a place since.
        """
        epoch = self._shared_epoch.news() if get_worker_info() is not None else None
        if epoch is not None:
            self._go_to(epoch)

    def forget_workers(self) -> None:
        """Let workers that have a copy of this fail, instead of reading from an older place."""
        if get_worker_info() is None:
            self._shared_epoch.tell_loaded()

    def _go_to(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self._stages, self._num_yielded = epoch, [], 0

    def state_dict(self, num_batches: int | None = None) -> dict[str, Any]:
        """Return the place in the data: a few numbers.

        Args:
            num_batches: Batches of this epoch that every rank has trained on, those before a
                resumption included. None means those that this object has yielded, which is right
                in a loop of one process without workers.

        Raises:
            ValueError: ``num_batches`` is below that of the place that was loaded.
        """
        before = sum(stage[3] for stage in self._stages)
        if num_batches is None:
            num_batches = before + self._num_yielded
        check_int("num_batches", num_batches, least=before)
        state = {
            "version": _STATE_VERSION,
            "epoch": self.epoch,
            "stages": [list(stage) for stage in self._stages_today()],
            "data": self.fingerprint(),
            "filter": self._filter,
        }
        files = self._files.state(self.epoch)
        if files is not None:
            state["files"] = files
        return state_after(state, num_batches)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a place: the next iteration yields the rest of its epoch.

        The number of ranks, ``batch_size`` and ``lanes`` may be others: what is left is shared out
        anew. Nothing else that sets the order may differ.

        Raises:
            ValueError: The state is of other files, another order or a later version.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(
                f"state: expected version {_STATE_VERSION}, got {state.get('version')!r}"
            )
        if state["data"] != self.fingerprint():
            raise ValueError(
                "state: it is a place in other data: files, their rows, filter, seed, shuffle_rows "
                "and drop_last must be those of the run that saved it"
            )
        if state.get("filter", self._filter) != self._filter:
            raise ValueError(
                f"state: it is a place in rows of another filter: {state['filter']!r}, and this is "
                f"{self._filter!r}"
            )
        epoch = int(state["epoch"])
        stages = [(int(r), int(b), int(n), int(t)) for r, b, n, t in state["stages"]]
        self._files.load_state(state.get("files"), epoch)
        self.epoch, self._stages, self._num_yielded = epoch, stages, 0
        self.forget_workers()

    def __iter__(self) -> Iterator[Any]:
        self.heed_parent()
        plan, worker = self._plan(), get_worker_info()
        self._num_yielded = 0
        share = (0, 1) if worker is None else (worker.id, worker.num_workers)
        batches = in_background(self._batches(plan, *share), self.prefetch)
        try:
            for batch in batches:
                self._num_yielded += 1
                yield batch
        finally:
            batches.close()  # type: ignore[attr-defined]
        if not self.ended:
            self.epoch, self._stages, self._num_yielded = self.epoch + 1, [], 0

    def _stops(self) -> bool:
        return self.stop_waiting is not None and self.stop_waiting()

    def _ranks(self) -> tuple[int, int]:
        """Return this process's rank, a worker's being its parent's, and the number of ranks."""
        ranks = collectives.rank(), collectives.world_size()
        return self._pickled_ranks if get_worker_info() and ranks == (0, 1) else ranks

    def _stages_today(self) -> list[tuple[int, int, int, int]]:
        """Return the stages, the last of which is under today's ranks."""
        today = (self._ranks()[1], self.batch_size, self.lanes)
        if self._stages and self._stages[-1][:3] == today:
            return self._stages
        return [*self._stages, (*today, 0)]

    def _plan(self) -> Plan:
        self._files.select(self.epoch)
        splits = self._files.splits
        sizes = [split.num_rows for split in splits]
        blocks = blocks_of(sizes, self.shuffle_rows, self.seed, self.epoch)
        spans, first = whole(blocks), 0
        *earlier, today = self._stages_today()
        for num_ranks, batch_size, lanes, num_batches in earlier:
            deal = Deal(spans, num_ranks, batch_size, lanes, self.drop_last)
            spans, first = deal.left_after(num_batches), first + num_batches
        num_ranks, batch_size, lanes, skipped = today
        deal = Deal(spans, num_ranks, batch_size, lanes, self.drop_last)
        return Plan(blocks, deal, first + skipped, skipped, splits, self.epoch)

    def _batches(self, plan: Plan, worker: int, num_workers: int) -> Iterator[Any]:
        rank = self._ranks()[0]
        sizes = plan.deal.batch_sizes(rank)
        with ThreadPoolExecutor(1, "recis_lightning.data.blocks") as pool:
            # Of the plan, not of the files: another window may be selected while this one is read.
            order = (self.shuffle_rows, self.seed, plan.epoch)
            read = partial(self.read_block, splits=plan.splits)
            empty = partial(self.empty, plan.splits)
            ahead = pool if self.prefetch else None
            lanes = [
                Lane(read, empty, plan.blocks, spans, order, ahead)
                for spans in plan.deal.lanes_of(rank)
            ]
            for index, size in enumerate(sizes):
                lane = lanes[index % len(lanes)]
                if index < plan.skipped or (index - plan.skipped) % num_workers != worker:
                    lane.skip(size)
                    continue
                batch: Any = lane.take(size)
                if self.convert is not None:
                    batch = self.convert(batch)
                yield pinned(batch) if self.pin_memory else batch

    def read_block(self, block: Block, splits: Sequence[Split]) -> Batch:
        """Read the rows of a block of some splits, in their order.

        Raises:
            DataFileError: A file cannot be read; names it, and the column.
        """
        parts = []
        for index in block.splits:
            split = splits[index]
            arrays = self._files.read(split)
            where = f"{self._files.path_of(split)}, part {split.group}"
            part: Batch = {}
            for column in self.columns:
                try:
                    part[column.name] = column.read(arrays)
                except (TypeError, ValueError) as error:
                    raise DataFileError(f"{where}, column {column.name!r}: {error}") from error
            parts.append(part)
        return self.features.transform(list(join_rows(parts).values()))

    def empty(self, splits: Sequence[Split]) -> Batch:
        """Return a batch without rows, of what some splits hold."""
        arrays = {name: array[:0] for name, array in self._files.read(splits[0]).items()}
        return self.features.transform([column.read(arrays) for column in self.columns])

    def fingerprint(self) -> str:
        """Return what is the same for data in which a place has the same meaning."""
        order = [self.shuffle_rows, self.seed, self.drop_last]
        text = json.dumps([*self._files.fingerprint(), order])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def state_after(state: Mapping[str, Any], num_batches: int) -> dict[str, Any]:
    """Return a place moved to ``num_batches`` of its epoch, under the same number of ranks."""
    *earlier, (num_ranks, batch_size, lanes, _) = state["stages"]
    rest = max(num_batches - sum(stage[3] for stage in earlier), 0)
    return {**state, "stages": [*earlier, [num_ranks, batch_size, lanes, rest]]}
