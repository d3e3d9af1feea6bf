"""Tables to shard files and back: each rank writes its own, any number of ranks reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from recis_lightning.checkpoint.chunks import Advance, ahead, in_pieces
from recis_lightning.checkpoint.shard_file import (
    Kind,
    Part,
    ShardFile,
    Written,
    opened,
    write_shard,
)
from recis_lightning.distributed.ownership import owner_of
from recis_lightning.table import state as table_state
from recis_lightning.table.hash_table import HashTable

FORMAT = 1
SUFFIX = ".safetensors"
_SLOTS = "slots."
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Shard:
    """One rank's part of one table, as a checkpoint names it.

    Attributes:
        file: Its name in the checkpoint's folder.
        rows: How many it holds.
        size: In bytes.
        checksum: See ``shard_file.Written``.
    """

    file: str
    rows: int
    size: int
    checksum: int


@dataclass(frozen=True)
class Commit:
    """What makes files a checkpoint: written last, it names every one of them.

    Attributes:
        save_id: Random; part of the files' names and headers.
        world_size: Ranks that wrote.
        folder: Where the files are, from where the commit is.
        location: The same, absolute, when it was written.
        tables: By name, the shards by rank.
    """

    save_id: str
    world_size: int
    folder: str
    location: str
    tables: dict[str, list[Shard]]

    def to_state(self) -> dict[str, Any]:
        """Return it as primitives."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_state(cls, state: Any, where: str) -> Commit:
        """Take it from primitives.

        Raises:
            ValueError: They are none of ours; names ``where`` they were found.
        """
        version = state.get("format") if isinstance(state, dict) else None
        if version != FORMAT:
            raise ValueError(f"{where}: expected format {FORMAT} of tables, got {version!r}")
        try:
            fields = {key: state[key] for key in ("save_id", "world_size", "folder", "location")}
            tables = {
                name: [Shard(**shard) for shard in shards]
                for name, shards in state["tables"].items()
            }
            if any(len(shards) != fields["world_size"] for shards in tables.values()):
                raise ValueError
            return cls(**fields, tables=tables)
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"{where}: what it says of tables is damaged") from None


def file_name(table: str, rank: int, world_size: int, save_id: str) -> str:
    """Return the name of a shard's file.

    Example:
        >>> file_name("item", 0, 2, "1f")
        'item.0-of-2.1f.safetensors'
    """
    stem = quote(table, safe=" ")
    if len(stem) > _LONGEST_NAME:
        digest = hashlib.blake2b(table.encode(), digest_size=8).hexdigest()
        stem = f"{stem[:_LONGEST_NAME]}-{digest}"
    return f"{stem}.{rank}-of-{world_size}.{save_id}{SUFFIX}"


def num_bytes(table: HashTable) -> int:
    """Return about how many bytes a table's shard will have."""
    return len(table) * (4 * table.storage.rows.row_words + 8 * (1 + table.storage.keeps_last_seen))


def write_table(
    folder: Path, table: HashTable, rank: int, world_size: int, save_id: str, advance: Advance
) -> Shard:
    """Write this rank's rows of a table to a file of their own; see ``shard_file.write_shard``."""
    ids, rows = table.ids_map()
    if world_size > 1 and table.needs_reshard:
        mine = owner_of(ids, world_size) == rank
        ids, rows = ids[mine], rows[mine]
    fields = _flat(table_state.saved_fields(table, rows))
    tensors = {key: value for key, value in fields.items() if isinstance(value, Tensor)}
    metadata = {key: value for key, value in fields.items() if key not in tensors}
    metadata |= {"format": FORMAT, "save_id": save_id, "table": table.name, "rows": len(ids)}
    metadata |= {"rank": rank, "world_size": world_size}
    store, columns = table.storage.rows, {"ids": ids}
    columns |= {key: tensors.pop(key) for key in table_state.row_columns(tensors)}
    kinds = {key: Kind(column.dtype, tuple(column.shape)) for key, column in columns.items()}
    kinds["weights"] = Kind(table.dtype, (len(ids), table.embedding_dim))
    for name, words in store.slots.items():
        kinds[_SLOTS + name] = Kind(torch.float32, (len(ids), words))

    def read(start: int, stop: int) -> Mapping[str, Tensor]:
        weights, slots = store.read(rows[start:stop])
        found = {key: column[start:stop] for key, column in columns.items()}
        return {
            **found,
            "weights": weights,
            **{_SLOTS + name: slot for name, slot in slots.items()},
        }

    parts = [Part(kinds, read), *(Part.of(name, tensor) for name, tensor in tensors.items())]
    file = file_name(table.name, rank, world_size, save_id)
    written = write_shard(folder / file, metadata, parts, advance)
    return Shard(file, len(ids), *written)


def _flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


class TableShards:
    """The shard files of a checkpoint, for one rank to read.

    Args:
        commit: What names them.
        folder: Where they are.
        rank: Of the reader.
        world_size: Ranks that read; each may have the share of another number that wrote.

    Raises:
        ValueError: By every method: a file is missing, or is not the one that the commit names.
    """

    def __init__(self, commit: Commit, folder: Path, rank: int, world_size: int) -> None:
        self.commit, self.folder = commit, folder
        self.rank, self.world_size = rank, world_size
        self._files: dict[tuple[str, int], ShardFile] = {}

    def file(self, table: str, rank: int) -> ShardFile:
        """Open what a rank wrote of a table, and see that it is the file that is meant."""
        known = self._files.get((table, rank))
        if known is None:
            known = self._files[table, rank] = _open(self.folder, self.commit, table, rank)
        return known

    def share(self) -> list[ShardFile]:
        """List what this rank checks; when as many ranks read as wrote, it is what it loads."""
        writers = range(self.rank, self.commit.world_size, self.world_size)
        return [self.file(table, writer) for table in self.commit.tables for writer in writers]

    def check(self, advance: Advance) -> None:
        """Read this rank's share, and raise ValueError if a byte is not as it was written."""
        pieces = [partial(file.piece, *piece) for file in self.share() for piece in file.pieces()]
        with opened(self.share()):
            in_pieces(len(pieces), lambda number: pieces[number]().nbytes, advance)

    def num_bytes(self) -> int:
        """Return the bytes of this rank's share."""
        return sum(file.size for file in self.share())

    def check_fit(self, name: str, table: HashTable, strict: bool = False) -> None:
        """Raise ValueError if a table cannot take up the rows of the table ``name``.

        Args:
            name: As it was saved.
            table: The one to load.
            strict: Whether dtype and optimizer state must be the same too.
        """
        where = f"table {table.name!r}: the checkpoint's ({self.folder})"
        dim, dtype, slots = self.layout(name)
        if dim != table.embedding_dim:
            raise ValueError(f"{where} has embedding_dim={dim}, the model's {table.embedding_dim}")
        if strict and dtype is not table.dtype:
            raise ValueError(f"{where} has dtype {dtype}, the model's {table.dtype}")
        if strict and table.optimizer is not None and slots != table.storage.rows.slots:
            raise ValueError(
                f"{where} has optimizer state {slots or 'of no kind'}, "
                f"{type(table.optimizer).__name__} keeps {table.storage.rows.slots or 'none'}: "
                "resume with the optimizer that the checkpoint was trained with"
            )

    def layout(self, name: str) -> tuple[int, torch.dtype, dict[str, int]]:
        """Return a table's embedding_dim, dtype and optimizer state (name -> float32 words)."""
        kinds = self.file(name, self.rank % self.commit.world_size).kinds
        slots = {
            key.removeprefix(_SLOTS): kind.shape[1]
            for key, kind in kinds.items()
            if key.startswith(_SLOTS)
        }
        return kinds["weights"].shape[1], kinds["weights"].dtype, slots

    def pieces(self, name: str, num_rows: int) -> Iterator[dict[str, Tensor]]:
        """Read what all ranks wrote of a table, checked; see ``Source.pieces``."""
        for writer in range(self.commit.world_size):
            file = self.file(name, writer)
            columns = {key: key for key in table_state.row_columns(file.kinds)}
            columns["weights"] = "weights"
            columns |= {
                key.removeprefix(_SLOTS): key for key in file.kinds if key.startswith(_SLOTS)
            }
            count, at_once = file.num_pieces("ids"), max(num_rows // file.piece_rows["ids"], 1)
            for first in range(0, max(count, 1), at_once):
                numbers = range(first, min(first + at_once, count))
                with file.opened():
                    piece = {
                        shown: torch.cat([file.empty(key), *(file.piece(key, n) for n in numbers)])
                        for shown, key in columns.items()
                    }
                yield piece

    def restore(self, name: str, table: HashTable, advance: Advance) -> None:
        """Replace everything a table holds by the rows that this rank owns.

        Args:
            name: As it was saved.
            table: One that passed ``check_fit``.
            advance: Called with bytes read, now and then.

        Raises:
            ValueError: A byte is not as it was written. The table is empty then; ``check`` before
                finds out in time.
        """
        rank, ranks, writers = self.rank, self.world_size, self.commit.world_size
        same = ranks == writers
        files = [self.file(name, writer) for writer in ([rank] if same else range(writers))]
        dim, dtype, slots = self.layout(name)
        with opened(files), _reading_ahead(files, list(slots)):
            kept = [None if same or ranks == 1 else _owned(f, rank, ranks) for f in files]
            state = _joined(files, kept, rank, ranks)
            count = state["ids"].numel()
            row: dict[str, Any] = {"weights": torch.empty(count, dim, dtype=dtype, device="meta")}
            row["slots"] = {key: torch.empty(count, n, device="meta") for key, n in slots.items()}
            table_state.check_state({**state, **row}, table.name, table.embedding_dim)
            table_state.restore(
                table,
                state,
                slots,
                lambda rows: _write_rows(table, files, kept, rows, list(slots), advance),
            )


def _open(folder: Path, commit: Commit, name: str, rank: int) -> ShardFile:
    """Open a shard and see that it is the one that is meant."""
    shard = commit.tables[name][rank]
    file = ShardFile(folder / shard.file)
    meant = (FORMAT, commit.save_id, name, rank, commit.world_size, shard.rows)
    keys = ("format", "save_id", "table", "rank", "world_size", "rows")
    found = tuple(file.metadata.get(key) for key in keys)
    if found != meant:
        raise ValueError(
            f"{file.path}: not of this save: expected {dict(zip(keys, meant, strict=True))}, "
            f"found {dict(zip(keys, found, strict=True))}"
        )
    file.check(Written(shard.size, shard.checksum))
    return file


def _owned(file: ShardFile, rank: int, world_size: int, ids: str = "ids") -> Tensor:
    """Return int64 [n], ascending: where in a file the ids are that a rank owns."""
    return (owner_of(file.view(ids), world_size) == rank).nonzero().squeeze(1)


def _joined(
    files: Sequence[ShardFile], kept: Sequence[Tensor | None], rank: int, world_size: int
) -> dict[str, Any]:
    """Put the files' fields together, all but weights and slots, for the ids that are kept."""
    state: dict[str, Any] = {}
    for file, positions in zip(files, kept, strict=True):
        for key, value in file.metadata.items():
            known = state.setdefault(key, value)
            # Steps and the like: of ranks that are not level the furthest counts.
            if isinstance(value, int) and not isinstance(value, bool):
                state[key] = max(known, value)
        picked = {"ids": positions}
        for key in file.kinds:
            if key == "weights" or key.startswith(_SLOTS):
                continue
            along = table_state.KEYED_BY.get(key)
            # What belongs to rows goes into the table's own memory; other tensors it may keep.
            value = file.view(key) if along == "ids" else file.read(key)
            if along is None:  # no item belongs to an id: each rank keeps what all know together
                known = state.setdefault(key, value)
                state[key] = torch.maximum(known, value)
                continue
            if along not in picked:
                picked[along] = None
                if positions is not None:
                    picked[along] = _owned(file, rank, world_size, along)
            chosen = picked[along]
            state.setdefault(key, []).append(value if chosen is None else value[chosen])
    return {
        key: (value[0] if len(value) == 1 else torch.cat(value))
        if isinstance(value, list)
        else value
        for key, value in state.items()
    }


def _row_tensors(slots: Sequence[str]) -> list[str]:
    """List the tensors of a file that hold rows, as a row has them."""
    return ["weights", *(_SLOTS + slot for slot in slots)]


def _reading_ahead(
    files: Sequence[ShardFile], slots: Sequence[str]
) -> AbstractContextManager[None]:
    """Let the disk work on rows while their ids are read and numbered."""
    names = _row_tensors(slots)
    pieces = [(file, number) for file in files for number in range(file.num_pieces("weights"))]

    def prepare(index: int) -> None:
        file, number = pieces[index]
        for name in names:
            file.read_ahead(name, number)

    return ahead(len(pieces), prepare)


def _write_rows(
    table: HashTable,
    files: Sequence[ShardFile],
    kept: Sequence[Tensor | None],
    rows: Tensor,
    slots: Sequence[str],
    advance: Advance,
) -> None:
    """Write the files' weights and slots, of the ids that are kept, to ``rows``, in that order."""
    pieces, first = [], 0
    for file, positions in zip(files, kept, strict=True):
        length, step = file.kinds["ids"].shape[0], file.piece_rows["ids"]
        for number, start in enumerate(range(0, length, step)):
            stop, chosen = min(start + step, length), None
            if positions is not None:
                low, high = torch.searchsorted(positions, torch.tensor([start, stop])).tolist()
                chosen = positions[low:high] - start
            count = stop - start if chosen is None else len(chosen)
            if count:
                pieces.append((file, number, chosen, rows[first : first + count]))
            first += count

    names = _row_tensors(slots)

    def write(index: int) -> int:
        file, number, chosen, targets = pieces[index]
        parts = [file.piece(name, number) for name in names]
        done = sum(part.nbytes for part in parts)
        if chosen is not None:
            parts = [part[chosen] for part in parts]
        weights, *states = parts
        table.storage.rows.write(
            targets, weights.to(table.dtype), dict(zip(slots, states, strict=True))
        )
        return done

    in_pieces(len(pieces), write, advance)


__all__ = ["Commit", "Shard", "TableShards", "file_name", "num_bytes", "write_table"]
