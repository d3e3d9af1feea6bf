"""Tables whose rows are in shard files; any number of ranks reads what any number wrote."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from recis_lightning.checkpoint.chunks import ProgressCallback, parallel_for
from recis_lightning.checkpoint.commit import FORMAT, SLOT_PREFIX, Commit
from recis_lightning.checkpoint.owned_rows import OwnedRows, prefetch_rows
from recis_lightning.checkpoint.progress import Progress, on_rank_zero
from recis_lightning.checkpoint.saved_tables import (
    FitRules,
    SavedTables,
    TableContents,
    all_or_none,
    check_layout,
)
from recis_lightning.checkpoint.shard_check import check_file, check_same_layout, slots_of
from recis_lightning.checkpoint.shard_file import FileDigest, ShardFile, opened
from recis_lightning.distributed import collectives
from recis_lightning.table import state as table_state
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.state_schema import check_distinct, check_fields


class ShardTables(SavedTables):
    """Tables of the shard files that a commit names, for this rank to read.

    Args:
        commit: Names the files.
        file: File that holds the commit; None if it is not known.

    Raises:
        ValueError: The folder of the files is missing; from methods, a file is missing, damaged or
            not of this save.
    """

    def __init__(self, commit: Commit, file: Path | None) -> None:
        self._commit, self._folder = commit, commit.find_folder(file)
        self._rank, self._world_size = collectives.rank(), collectives.world_size()
        self._files: dict[tuple[str, int], ShardFile] = {}
        self._first: dict[str, ShardFile] = {}  # by table, to compare the others with
        self._numbers: dict[str, dict[str, tuple[int, dict[str, Any]]]] = {}  # of their tables
        self._shared: dict[str, ShardFile] = {}  # files of several tables, by their names

    @property
    @override
    def save_id(self) -> str:
        return self._commit.save_id

    @override
    def names(self) -> list[str]:
        return list(self._commit.tables)

    @override
    def excluded(self) -> list[str]:
        return list(self._commit.excluded)

    @override
    def contents(self, name: str) -> TableContents:
        files = [self._file(name, writer) for writer in range(self._commit.world_size)]
        dim, dtype, slots = self._layout(name)
        return TableContents(
            rows=[file.metadata["rows"] for file in files],
            embedding_dim=dim,
            dtype=dtype,
            slots=slots,
            step=max(file.metadata["step"] for file in files),
            num_updates=max(file.metadata["num_updates"] for file in files),
            num_bytes=sum(file.num_bytes for file in files),
        )

    @override
    def pinned(self, name: str) -> Tensor:
        parts = []
        for writer in range(self._commit.world_size):
            file = self._file(name, writer)
            if "pinned_ids" in file.specs:
                with file.opened():
                    count = file.num_chunks("pinned_ids")
                    parts += [file.chunk("pinned_ids", index) for index in range(count)]
        pinned: Tensor = torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *parts])
        return pinned

    @override
    def chunks(self, name: str, num_rows: int) -> Iterator[dict[str, Tensor]]:
        for writer in range(self._commit.world_size):
            file = self._file(name, writer)
            columns = {key: key for key in table_state.row_columns(file.specs)}
            columns["weights"] = "weights"
            columns |= {slot: SLOT_PREFIX + slot for slot in slots_of(file)}
            count, at_once = file.num_chunks("ids"), max(num_rows // file.chunk_rows["ids"], 1)
            for first in range(0, max(count, 1), at_once):
                indices = range(first, min(first + at_once, count))
                with file.opened():
                    chunk = {
                        column: torch.cat([file.empty(key), *(file.chunk(key, i) for i in indices)])
                        for column, key in columns.items()
                    }
                yield chunk

    @override
    def check_fit(self, name: str, table: HashTable, how: FitRules) -> None:
        if self._lacks_state(name):
            how = how._replace(optimizer_state=False)
        check_layout(str(self._folder), table, *self._layout(name), how)

    @override
    def load(self, tables: dict[str, HashTable], how: FitRules, progress: Progress) -> None:
        # Tables with rows are not touched if a byte is damaged; empty ones skip the extra pass.
        if not all(collectives.gather(not any(map(_holds_anything, tables.values())))):
            collectives.run_on_all_ranks(partial(self.check, progress, list(tables)))

        def restore() -> None:
            with on_rank_zero(progress)("Loading tables", self._num_bytes(tables)) as on_progress:
                for name, table in tables.items():
                    self._restore(name, table, how, on_progress)

        with all_or_none(tables.values()):
            collectives.run_on_all_ranks(restore)

    def load_table(self, name: str, table: HashTable, progress: Progress) -> None:
        """Replace the rows of one table, on this rank by itself; it keeps them after an error."""
        with on_rank_zero(progress)(f"Loading {name}", self._num_bytes([name])) as on_progress:
            self._restore(name, table, FitRules(strict=False), on_progress)

    def check(self, progress: Progress, names: Sequence[str] | None = None) -> None:
        """Read this rank's share of tables; ValueError if a byte is damaged, or a field invalid.

        Args:
            progress: Shows the progress of rank 0.
            names: Tables; None for all.
        """
        names = self.names() if names is None else names
        with on_rank_zero(progress)("Checking tables", self._num_bytes(names)) as on_progress:
            files = self._share(names)
            chunks = [partial(file.chunk, *chunk) for file in files for chunk in file.chunks()]
            with opened(files):
                parallel_for(len(chunks), lambda index: chunks[index]().nbytes, on_progress)
        for name in names:
            files, ranks = self._files_to_read(name)
            with opened(files):
                state = OwnedRows(files, list(slots_of(files[0])), self._rank, ranks).state()
            self._check_state(name, files, state)
            check_distinct(state, f"{files[0].path}: table {name!r}")

    def _share(self, names: Iterable[str]) -> list[ShardFile]:
        """List the files that this rank checks: its own, if as many ranks read as wrote."""
        writers = range(self._rank, self._commit.world_size, self._world_size)
        return [self._file(name, writer) for name in names for writer in writers]

    def _num_bytes(self, names: Iterable[str]) -> int:
        return sum(file.num_bytes for file in self._share(names))

    def _layout(self, name: str) -> tuple[int, torch.dtype, dict[str, int]]:
        """Return a table's embedding_dim, dtype and optimizer state (name -> float32 words)."""
        file = self._file(name, self._rank % self._commit.world_size)
        weights = file.specs["weights"]
        return weights.shape[1], weights.dtype, slots_of(file)

    def _file(self, table: str, rank: int) -> ShardFile:
        file = self._files.get((table, rank))
        if file is None:
            file = self._open(table, rank)
            check_file(file)
            check_same_layout(file, self._first.setdefault(table, file))
            self._files[table, rank] = file
        return file

    def _open(self, name: str, rank: int) -> ShardFile:
        """Open a shard file; ValueError unless it is the one that the commit names."""
        shard = self._commit.tables[name][rank]
        file = self._shared.get(shard.file) or ShardFile(self._folder / shard.file)
        parts, metadata = file.metadata.get("parts"), file.metadata
        if isinstance(parts, list):
            self._shared[shard.file] = file
            save = {key: metadata.get(key) for key in ("format", "save_id", "rank", "world_size")}
            number, part = self._part(file, name)
            file, metadata = file.part(str(number), {**part, **save}), {**part, **save}
        expected = (FORMAT, self._commit.save_id, name, rank, self._commit.world_size, shard.rows)
        keys = ("format", "save_id", "table", "rank", "world_size", "rows")
        found = tuple(metadata.get(key) for key in keys)
        if found != expected:
            raise ValueError(
                f"{file.path}: not of this save: expected {dict(zip(keys, expected, strict=True))},"
                f" found {dict(zip(keys, found, strict=True))}"
            )
        file.check(FileDigest(shard.size, shard.checksum))
        return file

    def _part(self, file: ShardFile, name: str) -> tuple[int, dict[str, Any]]:
        """Return the number and the metadata of a table in a file of several."""
        numbers = self._numbers.get(file.path.name)
        if numbers is None:
            parts = [part for part in file.metadata["parts"] if isinstance(part, dict)]
            numbers = {str(part.get("table")): (i, part) for i, part in enumerate(parts)}
            self._numbers[file.path.name] = numbers
        if name not in numbers:
            raise ValueError(f"{file.path}: not of this save: it has no table {name!r}")
        return numbers[name]

    def _lacks_state(self, name: str) -> bool:
        """Return whether a part of a table's optimizer state was left out: the rest is no use."""
        return name in self._commit.without_state

    def _files_to_read(self, name: str) -> tuple[list[ShardFile], int]:
        """Return the files with rows that this rank owns, and among how many they are divided."""
        writers: Sequence[int] = range(self._commit.world_size)
        ranks = self._world_size
        if ranks == len(writers):
            writers, ranks = [self._rank], 1  # a rank owns all rows of its own file
        return [self._file(name, writer) for writer in writers], ranks

    def _check_state(self, name: str, files: Sequence[ShardFile], state: dict[str, Any]) -> None:
        where = f"{files[0].path}: state of table {name!r}"
        check_fields(state, where, files[0].metadata["embedding_dim"])

    def _restore(
        self, name: str, table: HashTable, how: FitRules, on_progress: ProgressCallback
    ) -> None:
        """Replace the rows of a table by those that this rank owns."""
        files, ranks = self._files_to_read(name)
        with_state = how.optimizer_state and not self._lacks_state(name)
        slots = slots_of(files[0]) if with_state else {}
        with opened(files), prefetch_rows(files, list(slots)):
            owned = OwnedRows(files, list(slots), self._rank, ranks)
            state = owned.state()
            self._check_state(name, files, state)
            if table.given_name is not None and name != table.name:
                state["name"] = table.name
            if not with_state:
                state["num_updates"] = 0
            table_state.restore(
                table, state, slots, lambda rows: owned.write(table, rows, on_progress)
            )


def _holds_anything(table: HashTable) -> bool:
    counter = table.storage.admission_counter
    return bool(
        len(table)
        or table.step
        or table.num_updates
        or table.evictor.pinned is not None
        or (counter is not None and counter.num_lookups)
    )


__all__ = ["ShardTables"]
