"""Links of a chain of deltas, and the head that says which is the last.

A chain is a folder. Each link has a file of arrays a rank, and a record in JSON that names these
files and the link before it. Numbers count through, so that no chain has a circle. A base is a
link with all rows, and needs none before it. ``head.json`` is written last, and names the last
link and the base from which to read.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recis_lightning.arguments import check_dtype
from recis_lightning.serving.array_file import DTYPES, FileRecord
from recis_lightning.serving.checked_json import read_checked, write_checked
from recis_lightning.serving.values import DTYPES as TENSOR_DTYPES

CHAIN_FOLDER = "deltas"
HEAD_FILE = "head.json"
BASE, DELTA = "base", "delta"
_LINK_FORMAT, _HEAD_FORMAT, _VERSION = "recis_lightning.delta", "recis_lightning.chain", 1
_ID = re.compile(r"[0-9a-f]{16}")
_FILE = re.compile(
    rf"(?:(?:{BASE}|{DELTA})-\d{{10}}-[0-9a-f]{{16}}(?:\.json|\.\d+-of-\d+\.rows)"
    rf"|{re.escape(HEAD_FILE)})(?:\.[0-9a-f]{{8}}\.part)?"
)
_MAX_RANKS = 1 << 16
_MAX_DIM = 1 << 24


def is_chain_file(name: str) -> bool:
    """Return whether a file of a chain's folder may be one that a chain wrote."""
    return _FILE.fullmatch(name) is not None


@dataclass(frozen=True)
class Part:
    """Part of a table in a link: what one rank wrote.

    Attributes:
        is_whole: Whether it replaces what was before.
        rows: Its ids.
        removed: Its tombstones.
        fields: Primitives of the table's state; None without state.
        by_id: Dtype of each array of the state with an item an id.
        others: Dtype of each other array of the state.
        slots: Float32 words a row of each slot of the optimizer's state.
        now_us: Clock of the table.
    """

    is_whole: bool
    rows: int
    removed: int
    fields: dict[str, Any] | None
    by_id: list[str]
    others: list[str]
    slots: dict[str, int]
    now_us: int


@dataclass(frozen=True)
class LinkTable:
    """Table in a link.

    Attributes:
        name: Its name.
        embedding_dim: Weights in a row.
        dtype: Of the weights.
        parts: By rank.
    """

    name: str
    embedding_dim: int
    dtype: str
    parts: list[Part]


@dataclass(frozen=True)
class Link:
    """Record of a link.

    Attributes:
        kind: ``BASE`` or ``DELTA``.
        seq: Its number.
        id: Random, part of its files' names.
        parent: Of a delta, ``state_id`` of the link before it; "" of a base.
        state_id: Name of the state behind the link: its ``id``; of a compacted base that of the
            link whose state it holds.
        step: Of the delta.
        time: When it was written, in seconds since the epoch.
        tables: Its tables.
        files: By rank; array names begin with the table's number.
        dense: Dtype of each parameter and buffer; they are in rank 0's file.
    """

    kind: str
    seq: int
    id: str
    parent: str
    state_id: str
    step: int
    time: float
    tables: list[LinkTable]
    files: list[FileRecord]
    dense: dict[str, str]

    @property
    def file(self) -> str:
        """Name of its record's file."""
        return link_file(self.kind, self.seq, self.id)

    def file_names(self) -> list[str]:
        """Return the names of all its files."""
        return [self.file, *(file.file for file in self.files)]

    @property
    def num_bytes(self) -> int:
        """Bytes of its arrays."""
        return sum(file.size for file in self.files)

    def write(self, folder: Path) -> None:
        """Write the record, after its files."""
        state = {**asdict(self), "files": [file.to_state() for file in self.files]}
        write_checked(folder / self.file, {"format": _LINK_FORMAT, "version": _VERSION, **state})

    @classmethod
    def read(cls, folder: Path, kind: str, seq: int, id: str) -> Link:
        """Read a record; ValueError if it is missing, damaged, or of another link."""
        path = folder / link_file(kind, seq, id)
        state = read_checked(path, _LINK_FORMAT, _VERSION)
        fields = {key: value for key, value in state.items() if key not in ("format", "version")}
        try:
            tables = [
                LinkTable(**{**table, "parts": [Part(**part) for part in table["parts"]]})
                for table in fields.pop("tables")
            ]
            files = [FileRecord.from_state(file) for file in fields.pop("files")]
            link = cls(**fields, tables=tables, files=files)
            link._check()
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: damaged ({error})") from None
        if (link.kind, link.seq, link.id) != (kind, seq, id):
            raise ValueError(f"{path}: the record is of another link")
        return link

    def _check(self) -> None:
        """Raise ValueError unless every field is of its kind."""
        if self.kind not in (BASE, DELTA) or not _is_count(self.seq) or not _is_int(self.step):
            raise ValueError("a field is not what it should be")
        ids = [self.id, self.state_id, *([self.parent] if self.kind == DELTA else [])]
        if not all(isinstance(id, str) and _ID.fullmatch(id) for id in ids):
            raise ValueError("its id is none")
        if not isinstance(self.time, float) or not math.isfinite(self.time):
            raise ValueError("its time is no number")
        count = len(self.files)
        if not 1 <= count <= _MAX_RANKS:
            raise ValueError(f"it has {count} files")
        for rank, file in enumerate(self.files):
            if file.file != rows_file(self.kind, self.seq, self.id, rank, count):
                raise ValueError(f"file {file.file!r} is not its own")
        if len({table.name for table in self.tables}) != len(self.tables):
            raise ValueError("two tables have one name")
        for number, table in enumerate(self.tables):
            self._check_table(number, table)
        for name, dtype in self.dense.items():
            if dtype not in TENSOR_DTYPES or f"dense/{name}" not in self.files[0].arrays:
                raise ValueError(f"parameter {name!r} is damaged")

    def _check_table(self, number: int, table: LinkTable) -> None:
        check_dtype(table.dtype)
        dim = table.embedding_dim
        if not isinstance(table.name, str) or not _is_count(dim) or not 0 < dim <= _MAX_DIM:
            raise ValueError("a table's record is damaged")
        if len(table.parts) != len(self.files):
            raise ValueError(f"table {table.name!r} has {len(table.parts)} parts")
        for part, file in zip(table.parts, self.files, strict=True):
            counts = (part.rows, part.removed, *part.slots.values())
            if not isinstance(part.is_whole, bool) or not all(map(_is_count, counts)):
                raise ValueError(f"table {table.name!r}: a part is damaged")
            if self.kind == BASE and (not part.is_whole or part.removed):
                raise ValueError(f"table {table.name!r}: a base is not whole")
            if not (part.fields is None or isinstance(part.fields, dict)):
                raise ValueError(f"table {table.name!r}: its state is damaged")
            if not _is_int(part.now_us):
                raise ValueError(f"table {table.name!r}: its clock is damaged")
            wanted: dict[str, Any] = {"removed": ("int64", (part.removed,))}
            wanted["numbers"] = ("int64", (part.rows,))
            wanted |= {f"by_id/{key}": ("int64", (part.rows,)) for key in part.by_id}
            wanted |= {
                f"slots/{key}": ("float32", (part.rows, words)) for key, words in part.slots.items()
            }
            for key, expected in wanted.items():
                place = file.arrays.get(f"{number}/{key}")
                if place is None or (place.dtype, place.shape) != expected:
                    raise ValueError(f"table {table.name!r}: array {key!r} is damaged")
            for key in part.others:
                place = file.arrays.get(f"{number}/others/{key}")
                if place is None or place.dtype not in DTYPES:
                    raise ValueError(f"table {table.name!r}: array {key!r} is damaged")


@dataclass(frozen=True)
class Head:
    """Head of a chain.

    Attributes:
        seq: Number of the last link.
        id: Its id.
        base_seq: Number of the base.
        base_id: Its id.
    """

    seq: int
    id: str
    base_seq: int
    base_id: str

    def write(self, folder: Path) -> None:
        """Publish the head."""
        state = {"format": _HEAD_FORMAT, "version": _VERSION, **asdict(self)}
        write_checked(folder / HEAD_FILE, state)

    @classmethod
    def read(cls, folder: Path) -> Head | None:
        """Read the head; None if there is none, ValueError if it is damaged."""
        path = folder / HEAD_FILE
        if not path.exists():
            return None
        state = read_checked(path, _HEAD_FORMAT, _VERSION)
        try:
            fields = {key: state[key] for key in ("seq", "id", "base_seq", "base_id")}
        except KeyError:
            raise ValueError(f"{path}: damaged") from None
        numbers_fit = all(_is_count(fields[key]) for key in ("seq", "base_seq"))
        if not numbers_fit or fields["base_seq"] > fields["seq"]:
            raise ValueError(f"{path}: damaged (its numbers)")
        if not all(
            isinstance(fields[k], str) and _ID.fullmatch(fields[k]) for k in ("id", "base_id")
        ):
            raise ValueError(f"{path}: damaged (its ids)")
        return cls(**fields)


def link_file(kind: str, seq: int, id: str) -> str:
    """Return the name of a link's record.

    Example:
        >>> link_file("delta", 7, "0123456789abcdef")
        'delta-0000000007-0123456789abcdef.json'
    """
    return f"{kind}-{seq:010d}-{id}.json"


def rows_file(kind: str, seq: int, id: str, rank: int, num_ranks: int) -> str:
    """Return the name of a rank's file of arrays."""
    return f"{kind}-{seq:010d}-{id}.{rank}-of-{num_ranks}.rows"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def _is_count(value: Any) -> bool:
    return _is_int(value) and 0 <= value < 1 << 33


__all__ = [
    "BASE",
    "CHAIN_FOLDER",
    "DELTA",
    "HEAD_FILE",
    "Head",
    "Link",
    "LinkTable",
    "Part",
    "is_chain_file",
    "link_file",
    "rows_file",
]
