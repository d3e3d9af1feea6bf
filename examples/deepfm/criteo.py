"""Display-advertising clicks in the Criteo layout, streamed from ORC or Parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import lightning as L
import pyarrow as pa
import torch
from pyarrow import orc, parquet
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from examples.deepfm.batch import Batch, as_is

COUNTS = [f"i{n}" for n in range(1, 14)]
CATEGORIES = [f"c{n}" for n in range(1, 27)]
MISSING_ID = -1  # an id like any other: a missing category is information, too

_COLUMNS = ["label", *COUNTS, *CATEGORIES]


class Criteo(IterableDataset[Batch]):
    """Batches from files whose columns are lists, read chunk by chunk.

    A file has ``label`` [double], counts ``i1``..``i13`` [double] and categories ``c1``..``c26``
    [int64]; an empty list is a missing value. A chunk is an ORC stripe or a Parquet row group.
    Workers and ranks divide the chunks among them, so no row is read twice; a worker without chunks
    has no batches.

    Args:
        files: ``.orc`` and ``.parquet`` files, in the order in which they are read.
        batch_size: Rows in a batch; the last batch of a worker may be smaller.
        shuffle_rows: Rows of a block within which rows are shuffled, the order of chunks included;
            0 keeps the order.
        seed: Of the shuffled order.
    """

    def __init__(
        self, files: list[Path], batch_size: int, shuffle_rows: int = 0, seed: int = 0
    ) -> None:
        super().__init__()
        self.files = files
        self.batch_size = batch_size
        self.shuffle_rows = shuffle_rows
        self.seed = seed

    def __iter__(self) -> Iterator[Batch]:
        shard, num_shards = _shard()
        chunks = [chunk for file in self.files for chunk in _chunks(file)]
        random = torch.Generator().manual_seed(self.seed)
        if self.shuffle_rows:
            chunks = [chunks[i] for i in torch.randperm(len(chunks), generator=random)]
        mine = map(_read_chunk, chunks[shard::num_shards])
        if not self.shuffle_rows:
            yield from rebatch(mine, self.batch_size)
            return
        for block in rebatch(mine, max(self.shuffle_rows, self.batch_size)):
            order = torch.randperm(len(block["label"]), generator=random)
            yield from rebatch([_take(block, order)], self.batch_size)


class CriteoDataModule(L.LightningDataModule):
    """Files in the Criteo layout, divided by name into train, validation and test.

    Args:
        root: Folder of the files.
        train: File names or glob patterns under ``root``.
        val: The same, for validation; may be empty.
        test: The same, for the test.
        batch_size: Rows in a batch.
        shuffle_rows: Rows of a block within which training rows are shuffled; 0 keeps the order.
            Set the Trainer's ``reload_dataloaders_every_n_epochs: 1`` for another order in each
            epoch.
        num_workers: Worker processes of each DataLoader; 0 reads in the main process.
        seed: Of the shuffled order.
    """

    def __init__(
        self,
        root: str,
        train: list[str],
        val: list[str] | None = None,
        test: list[str] | None = None,
        batch_size: int = 512,
        shuffle_rows: int = 0,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.patterns = {"train": train, "val": val or [], "test": test or []}
        self.batch_size = batch_size
        self.shuffle_rows = shuffle_rows
        self.num_workers = num_workers
        self.seed = seed

    def files(self, part: str) -> list[Path]:
        """Return the files of ``"train"``, ``"val"`` or ``"test"``, each once, in order.

        Raises:
            FileNotFoundError: A pattern matches nothing.
        """
        found: dict[Path, None] = {}
        for pattern in self.patterns[part]:
            matches = sorted(self.root.glob(pattern))
            if not matches:
                raise FileNotFoundError(
                    f"no file matches {pattern!r} ({part} part) under {self.root.resolve()}; "
                    "set the data module's `root` to the folder of your Criteo files"
                )
            found.update(dict.fromkeys(matches))
        return list(found)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training files."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        return self._loader("train", self.shuffle_rows, self.seed + epoch)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation files; no batches if none are named."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test files; no batches if none are named."""
        return self._loader("test")

    def _loader(self, part: str, shuffle_rows: int = 0, seed: int = 0) -> DataLoader[Batch]:
        return DataLoader(
            Criteo(self.files(part), self.batch_size, shuffle_rows, seed),
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=as_is,  # type: ignore[arg-type]
        )


def _shard() -> tuple[int, int]:
    """Return this worker's index among all workers of all ranks, and their number."""
    distributed = torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    ranks = torch.distributed.get_world_size() if distributed else 1
    worker = get_worker_info()
    id_, workers = (worker.id, worker.num_workers) if worker else (0, 1)
    return rank * workers + id_, ranks * workers


def _chunks(file: Path) -> list[tuple[Path, int]]:
    if file.suffix == ".orc":
        return [(file, index) for index in range(orc.ORCFile(file).nstripes)]
    if file.suffix == ".parquet":
        return [(file, index) for index in range(parquet.ParquetFile(file).num_row_groups)]
    raise ValueError(f"{file}: expected a name that ends in .orc or .parquet")


def _read_chunk(chunk: tuple[Path, int]) -> Batch:
    file, index = chunk
    if file.suffix == ".orc":
        rows = pa.table(orc.ORCFile(file).read_stripe(index, columns=_COLUMNS))
    else:
        rows = parquet.ParquetFile(file).read_row_group(index, columns=_COLUMNS)
    return to_batch(rows, str(file))


def to_batch(rows: pa.Table, source: str = "the table") -> Batch:
    """Return list columns as a batch of tensors.

    A count ``x`` becomes ``sign(x) log(1 + |x|)``, 0 where it is missing, followed by 13 columns
    that are 1 where a count is missing. A missing category becomes ``MISSING_ID``.

    Args:
        rows: The columns ``label``, ``i1``..``i13``, ``c1``..``c26``.
        source: Name of the rows in errors.

    Raises:
        ValueError: A column is absent, or a row holds several values in one column.
    """
    if absent := set(_COLUMNS) - set(rows.column_names):
        raise ValueError(f"{source} lacks the columns {sorted(absent)}")
    columns = {name: _column(rows[name], name, source) for name in _COLUMNS}
    counts = torch.stack([columns[name][0] for name in COUNTS], dim=1)
    missing = torch.stack([~columns[name][1] for name in COUNTS], dim=1)
    label = columns["label"][0]
    return Batch(
        features={
            name: columns[name][0].where(columns[name][1], MISSING_ID) for name in CATEGORIES
        },
        dense=torch.cat([counts.sign() * counts.abs().log1p(), missing], dim=1).float(),
        label=(label > 0.5).float(),
        group=torch.full(label.shape, -1),
    )


def _column(column: pa.ChunkedArray, name: str, source: str) -> tuple[Tensor, Tensor]:
    """Return the value of each row (0 if missing) and whether it has one."""
    lists = column.fill_null([]).combine_chunks()
    lengths = torch.tensor(lists.value_lengths().to_numpy())
    if len(lengths) and lengths.max() > 1:
        raise ValueError(f"{source}: column {name!r} has a row with {lengths.max()} values, not 1")
    present = lengths == 1
    dtype = pa.int64() if name in CATEGORIES else pa.float64()
    values = torch.tensor(lists.flatten().cast(dtype).to_numpy())
    return values.new_zeros(len(lengths)).masked_scatter(present, values), present


def _ids(batch: Batch) -> dict[str, Tensor]:
    return cast("dict[str, Tensor]", batch["features"])  # no bags in this file


def _take(batch: Batch, rows: Tensor | slice) -> Batch:
    return Batch(
        features={name: column[rows] for name, column in _ids(batch).items()},
        dense=batch["dense"][rows],
        label=batch["label"][rows],
        group=batch["group"][rows],
    )


def _join(batches: list[Batch]) -> Batch:
    return Batch(
        features={name: torch.cat([_ids(batch)[name] for batch in batches]) for name in CATEGORIES},
        dense=torch.cat([batch["dense"] for batch in batches]),
        label=torch.cat([batch["label"] for batch in batches]),
        group=torch.cat([batch["group"] for batch in batches]),
    )


def rebatch(chunks: Iterable[Batch], batch_size: int) -> Iterator[Batch]:
    """Yield chunks of any length as batches of ``batch_size``; the last may be smaller."""
    held: list[Batch] = []
    num_held = 0
    for chunk in chunks:
        held.append(chunk)
        num_held += len(chunk["label"])
        if num_held < batch_size:
            continue
        rows = _join(held)
        whole = num_held // batch_size * batch_size
        for start in range(0, whole, batch_size):
            yield _take(rows, slice(start, start + batch_size))
        num_held -= whole
        held = [_take(rows, slice(whole, None))] if num_held else []
    if num_held:
        yield _join(held)
