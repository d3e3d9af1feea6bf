"""``ColumnarDataset``: batches of tensors from Parquet and ORC files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from recis_lightning.arguments import check_int
from recis_lightning.data.background import in_background
from recis_lightning.data.columns import Column
from recis_lightning.data.features import Features, features_of
from recis_lightning.data.files import DataFileError, FileSet
from recis_lightning.data.order import Block, Deal, Span, blocks_of, row_order, whole
from recis_lightning.data.rows import Batch, join_rows, pinned, select_rows
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
    call ``set_epoch``.

    Args:
        paths: Files or glob patterns, of names that end in ``.parquet`` or ``.orc``; a URL is read
            through fsspec.
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
            when a split is read is an error.
        lanes: Runs into which a rank's rows are cut, whose batches take turns. With W workers make
            it a multiple of W: each then reads only its own splits; with 1 every worker reads all.
            The order depends on it.
        prefetch: Batches made ahead, in a thread; 0 makes none.
        pin_memory: Whether batches lie in pinned memory; needs a GPU.

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
        self._files = FileSet(paths, sources, filter, on_bad_file)
        self.epoch = 0
        self._stages: list[tuple[int, int, int, int]] = []  # ranks, batch size, lanes, batches
        self._num_yielded = 0
        self._pickled_ranks = (0, 1)  # rank and their number, for workers that are not forked

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pickled_ranks": self._ranks()}

    @property
    def num_rows(self) -> int:
        """Rows of an epoch, of all ranks."""
        return sum(split.num_rows for split in self._files.splits)

    def __len__(self) -> int:
        """Return the batches of this rank in an epoch, those before a resumption included."""
        plan = self._plan()
        return plan.first + plan.deal.num_batches - plan.skipped

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be of this epoch; a place loaded within it is kept."""
        if check_int("epoch", epoch, least=0) != self.epoch:
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
            "data": self._fingerprint(),
        }
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
        if state["data"] != self._fingerprint():
            raise ValueError(
                "state: it is a place in other data: files, their rows, filter, seed, shuffle_rows "
                "and drop_last must be those of the run that saved it"
            )
        self.epoch, self._num_yielded = int(state["epoch"]), 0
        self._stages = [(int(r), int(b), int(n), int(t)) for r, b, n, t in state["stages"]]

    def __iter__(self) -> Iterator[Any]:
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
        self.epoch, self._stages, self._num_yielded = self.epoch + 1, [], 0

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

    def _plan(self) -> _Plan:
        sizes = [split.num_rows for split in self._files.splits]
        blocks = blocks_of(sizes, self.shuffle_rows, self.seed, self.epoch)
        spans, first = whole(blocks), 0
        *earlier, today = self._stages_today()
        for num_ranks, batch_size, lanes, num_batches in earlier:
            deal = Deal(spans, num_ranks, batch_size, lanes, self.drop_last)
            spans, first = deal.left_after(num_batches), first + num_batches
        num_ranks, batch_size, lanes, skipped = today
        deal = Deal(spans, num_ranks, batch_size, lanes, self.drop_last)
        return _Plan(blocks, deal, first + skipped, skipped)

    def _batches(self, plan: _Plan, worker: int, num_workers: int) -> Iterator[Any]:
        rank = self._ranks()[0]
        sizes = plan.deal.batch_sizes(rank)
        with ThreadPoolExecutor(1, "recis_lightning.data.blocks") as pool:
            lanes = [_Lane(self, plan.blocks, spans, pool) for spans in plan.deal.lanes_of(rank)]
            for index, size in enumerate(sizes):
                lane = lanes[index % len(lanes)]
                if index < plan.skipped or (index - plan.skipped) % num_workers != worker:
                    lane.skip(size)
                    continue
                batch: Any = lane.take(size)
                if self.convert is not None:
                    batch = self.convert(batch)
                yield pinned(batch) if self.pin_memory else batch

    def read_block(self, block: Block) -> Batch:
        """Read the rows of a block, in the order of its splits.

        Raises:
            DataFileError: A file cannot be read; names it, and the column.
        """
        parts = []
        for index in block.splits:
            split = self._files.splits[index]
            arrays = self._files.read(split)
            where = f"{self._files.files[split.file]}, part {split.group}"
            part: Batch = {}
            for column in self.columns:
                try:
                    part[column.name] = column.read(arrays)
                except (TypeError, ValueError) as error:
                    raise DataFileError(f"{where}, column {column.name!r}: {error}") from error
            parts.append(part)
        return self.features.transform(list(join_rows(parts).values()))

    def empty(self) -> Batch:
        """Return a batch without rows."""
        split = self._files.splits[0]
        arrays = {name: array[:0] for name, array in self._files.read(split).items()}
        return self.features.transform([column.read(arrays) for column in self.columns])

    def _fingerprint(self) -> str:
        splits = [list(split) for split in self._files.splits]
        order = [self.shuffle_rows, self.seed, self.drop_last]
        names = [name.rsplit("/", 1)[-1] for name in self._files.files]
        text = json.dumps([names, splits, order])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def state_after(state: Mapping[str, Any], num_batches: int) -> dict[str, Any]:
    """Return a place moved to ``num_batches`` of its epoch, under the same number of ranks."""
    *earlier, (num_ranks, batch_size, lanes, _) = state["stages"]
    rest = max(num_batches - sum(stage[3] for stage in earlier), 0)
    return {**state, "stages": [*earlier, [num_ranks, batch_size, lanes, rest]]}


class _Plan:
    """Rest of an epoch.

    Attributes:
        blocks: Blocks of the epoch.
        deal: Share of today's ranks in what earlier numbers of ranks left.
        first: Batches of the epoch before the next one.
        skipped: Batches of ``deal`` among them.
    """

    def __init__(self, blocks: Sequence[Block], deal: Deal, first: int, skipped: int) -> None:
        self.blocks, self.deal, self.first, self.skipped = blocks, deal, first, skipped


class _Lane:
    """Reader of one lane: its spans, and the block that it is in."""

    def __init__(
        self,
        data: ColumnarDataset,
        blocks: Sequence[Block],
        spans: Sequence[Span],
        pool: ThreadPoolExecutor,
    ) -> None:
        self._data, self._blocks, self._pool = data, blocks, pool
        self._spans = list(reversed(spans))
        self._block = self._next_block = -1
        self._rows: Batch = {}
        self._order: Tensor | None = None
        self._next: Future[Batch] | None = None

    def skip(self, num_rows: int) -> None:
        """Pass over rows without reading them."""
        for _ in self._pieces(num_rows):
            pass

    def take(self, num_rows: int) -> Batch:
        """Return the next rows, as a copy."""
        parts = []
        for span in self._pieces(num_rows):
            self._open(span.block)
            rows: Tensor | slice = slice(span.start, span.stop)
            if self._order is not None:
                rows = self._order[rows]
            parts.append({name: select_rows(value, rows) for name, value in self._rows.items()})
        return join_rows(parts) if parts else self._data.empty()

    def _pieces(self, num_rows: int) -> Iterator[Span]:
        while num_rows:
            block, start, stop = self._spans.pop()
            middle = min(stop, start + num_rows)
            if middle < stop:
                self._spans.append(Span(block, middle, stop))
            num_rows -= middle - start
            yield Span(block, start, middle)

    def _open(self, block: int) -> None:
        """Make a block the current one, and start to read the one after it."""
        if block == self._block:
            return
        data, blocks = self._data, self._blocks
        self._rows = {}
        if self._next is not None and block == self._next_block:
            self._rows = self._next.result()
        else:
            self._rows = data.read_block(blocks[block])
        size = blocks[block].num_rows
        self._order = row_order(block, size, data.shuffle_rows, data.seed, data.epoch)
        self._block, self._next = block, None
        later = next((span.block for span in reversed(self._spans) if span.block != block), -1)
        if later >= 0 and data.prefetch:
            self._next_block = later
            self._next = self._pool.submit(data.read_block, blocks[later])
