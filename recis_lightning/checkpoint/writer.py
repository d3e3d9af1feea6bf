"""Writer of shard files: every rank writes its own rows of each table."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recis_lightning.checkpoint.chunks import ProgressCallback
from recis_lightning.checkpoint.commit import (
    FORMAT,
    SHARD_SUFFIX,
    SLOT_PREFIX,
    Commit,
    Shard,
    file_name,
    file_stems,
    sync_folder,
)
from recis_lightning.checkpoint.progress import Progress, on_rank_zero
from recis_lightning.checkpoint.shard_file import TensorGroup, TensorSpec, write_shard
from recis_lightning.distributed import collectives
from recis_lightning.distributed.ownership import owner_of
from recis_lightning.distributed.process_group import global_ranks
from recis_lightning.table import state as table_state
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.listing import hash_tables
from recis_lightning.table.lock import distinct_locks, read

# More than so many tables of less than so many bytes each share files of about so many bytes.
_MANY_TABLES, _SMALL_BYTES, _SHARED_BYTES = 64, 1 << 20, 1 << 26


def tables_by_name(tables: nn.Module | Iterable[HashTable]) -> dict[str, HashTable]:
    """Return tables, or those of a module, by name; ValueError if they cannot be saved so."""
    if isinstance(tables, nn.Module):
        tables = hash_tables(tables)
    if not isinstance(tables, Iterable):
        raise TypeError(
            f"tables: expected a module with tables, or tables, got {type(tables).__name__}"
        )
    named: dict[str, HashTable] = {}
    for table in tables:
        if not isinstance(table, HashTable):
            raise TypeError(f"tables: expected HashTable, got {type(table).__name__}")
        if named.setdefault(table.name, table) is not table:
            raise ValueError(
                f"tables: two have the name {table.name!r}, and a checkpoint tells tables apart "
                "by their names; give one another name"
            )
        if collectives.world_size(table.process_group) != collectives.world_size():
            raise ValueError(
                f"tables: {table.name!r} is sharded over ranks {global_ranks(table.process_group)} "
                f"of {collectives.world_size()}; checkpoints are of tables sharded over all ranks"
            )
    return named


def write_shards(
    directory: Path,
    tables: nn.Module | Iterable[HashTable],
    folder: str,
    progress: Progress,
    save_id: str,
) -> Commit:
    """Write the shard files of all ranks; all ranks call it together.

    Args:
        directory: Folder of the files; made if it is not there.
        tables: A module with tables, or tables of different names.
        folder: Path of that folder, relative to the commit.
        progress: Shows the progress of rank 0.
        save_id: Random; that of rank 0 is taken.

    Returns:
        The commit, to be written last.

    Raises:
        ValueError, OSError, RuntimeError: As for ``save``, also where ranks do not see each other's
            files; the files written so far are removed.
    """
    rank, world_size = collectives.rank(), collectives.world_size()
    own = collectives.run_on_all_ranks(lambda: tables_by_name(tables))
    layouts = collectives.gather((save_id, {name: own[name].embedding_dim for name in own}))
    save_id = layouts[0][0]
    for other, (_, layout) in enumerate(layouts):
        if layout != layouts[0][1]:
            raise ValueError(f"tables: rank 0 has {layouts[0][1]}, rank {other} has {layout}")

    def write() -> dict[str, Shard]:
        directory.mkdir(parents=True, exist_ok=True)
        total = sum(map(_num_bytes, own.values()))
        save = {"format": FORMAT, "save_id": save_id, "rank": rank, "world_size": world_size}
        with on_rank_zero(progress)("Saving tables", total) as on_progress:
            shards: dict[str, Shard] = {}
            for stem, names in _files_of(own).items():
                file = directory / file_name(stem, rank, world_size, save_id)
                shards |= _write_tables(file, [own[name] for name in names], save, on_progress)
        sync_folder(directory)
        return shards

    try:
        # Other threads may read the tables, but not train them.
        locks = distinct_locks(table.lock for table in own.values())
        shards = collectives.gather(collectives.run_on_all_ranks(lambda: read(locks, write)))
        hosts = collectives.gather(socket.gethostname())
        collectives.run_on_all_ranks(lambda: _check_shared(directory, shards, hosts))
    except BaseException:
        # A rank that failed removes its own files; the others may still write theirs.
        for file in directory.glob(f"*.{rank}-of-{world_size}.{save_id}{SHARD_SUFFIX}"):
            with contextlib.suppress(OSError):
                file.unlink()
        raise
    by_table = {name: [of_rank[name] for of_rank in shards] for name in own}
    return Commit(save_id, world_size, folder, str(directory.resolve()), by_table)


def _check_shared(
    directory: Path, shards: Sequence[Mapping[str, Shard]], hosts: Sequence[str]
) -> None:
    """Raise on rank 0, which commits, unless it sees the files of all ranks.

    Args:
        directory: Folder of the files.
        shards: Of each rank, by table.
        hosts: Of each rank.

    Raises:
        RuntimeError: Names a file that is missing or of another size, its rank, and what to do.
    """
    if collectives.rank() != 0:
        return
    for rank, of_rank in enumerate(shards):
        for shard in {shard.file: shard for shard in of_rank.values()}.values():
            try:
                size = (directory / shard.file).stat().st_size
            except OSError:
                size = None
            if size != shard.size:
                seen = "which is not there" if size is None else f"which has {size} bytes"
                raise RuntimeError(
                    f"{directory}: expected a folder that all ranks share; rank {rank} on host "
                    f"{hosts[rank]!r} wrote {shard.size} bytes to {shard.file}, {seen} for rank 0 "
                    f"on host {hosts[0]!r}. Save to a file system that all hosts have in common "
                    "(NFS, Lustre, ...), under the same path on each: ModelCheckpoint(dirpath=...) "
                    "or Trainer(default_root_dir=...)"
                )


def _num_bytes(table: HashTable) -> int:
    """Return about how many bytes a table's shard will have."""
    return len(table) * (4 * table.storage.rows.row_words + 8 * (1 + table.storage.keeps_last_seen))


def _files_of(tables: Mapping[str, HashTable]) -> dict[str, list[str]]:
    """Return the tables of each file, by the stem of its name.

    A file is synced by itself, which takes milliseconds: many small tables share files.
    """
    small = [name for name, table in tables.items() if _num_bytes(table) < _SMALL_BYTES]
    if len(small) <= _MANY_TABLES:
        small = []
    alone = file_stems(name for name in tables if name not in set(small))
    files = {stem: [name] for name, stem in alone.items()}
    num_bytes, number = 0, 0
    for name in small:
        # No stem of a table has a "+".
        files.setdefault(f"tables+{number}", []).append(name)
        num_bytes += _num_bytes(tables[name])
        if num_bytes >= _SHARED_BYTES:
            num_bytes, number = 0, number + 1
    return files


def _write_tables(
    file: Path, tables: list[HashTable], save: dict[str, Any], on_progress: ProgressCallback
) -> dict[str, Shard]:
    """Write this rank's rows of tables to one file; return the shard of each."""
    contents = [_contents(table, save["rank"], save["world_size"]) for table in tables]
    if len(tables) == 1:
        [(metadata, groups)] = contents
        digest = write_shard(file, {**metadata, **save}, groups, on_progress)
    else:
        parts = [part for part, _ in contents]
        prefixed = [
            group.prefixed(str(number))
            for number, (_, groups) in enumerate(contents)
            for group in groups
        ]
        digest = write_shard(file, {**save, "parts": parts}, prefixed, on_progress)
    return {part["table"]: Shard(file.name, part["rows"], *digest) for part, _ in contents}


def _contents(
    table: HashTable, rank: int, world_size: int
) -> tuple[dict[str, Any], list[TensorGroup]]:
    """Return what a file holds of a table: metadata, and this rank's rows."""
    ids, rows = table.ids_map()
    if world_size > 1 and table.needs_reshard:
        own = owner_of(ids, world_size) == rank
        ids, rows = ids[own], rows[own]
    fields = _flat(table_state.saved_fields(table, rows))
    tensors = {key: value for key, value in fields.items() if isinstance(value, Tensor)}
    metadata = {key: value for key, value in fields.items() if key not in tensors}
    metadata |= {"table": table.name, "rows": len(ids)}
    columns = {"ids": ids, **{key: tensors.pop(key) for key in table_state.row_columns(tensors)}}
    groups = [_rows_group(table, rows, columns)]
    groups += [TensorGroup.of(name, tensor) for name, tensor in tensors.items()]
    return metadata, groups


def _rows_group(table: HashTable, rows: Tensor, columns: dict[str, Tensor]) -> TensorGroup:
    """Return ids and policies' columns, weights and slots, to be read together."""
    store, count = table.storage.rows, len(rows)
    specs = {key: TensorSpec(column.dtype, tuple(column.shape)) for key, column in columns.items()}
    specs["weights"] = TensorSpec(table.dtype, (count, table.embedding_dim))
    for name, words in store.slots.items():
        specs[SLOT_PREFIX + name] = TensorSpec(torch.float32, (count, words))

    def read(start: int, stop: int) -> Mapping[str, Tensor]:
        weights, slots = store.read(rows[start:stop])
        return {
            **{key: column[start:stop] for key, column in columns.items()},
            "weights": weights,
            **{SLOT_PREFIX + name: slot for name, slot in slots.items()},
        }

    return TensorGroup(specs, read)


def _flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one, with the names joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


__all__ = ["tables_by_name", "write_shards"]
