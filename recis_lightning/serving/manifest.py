"""Manifest of a served folder: the one file, written last, that says what the others are."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recis_lightning.arguments import check_dtype
from recis_lightning.checkpoint.commit import sync_folder
from recis_lightning.checkpoint.regular_file import read_text
from recis_lightning.serving.array_file import FileRecord
from recis_lightning.serving.served_table import FORMATS
from recis_lightning.serving.values import DTYPES, TensorSpec, check_spec

MANIFEST_FILE = "manifest.json"
FORMAT, VERSION = "recis_lightning.served", 1
_MAX_BYTES = 1 << 28


@dataclass(frozen=True)
class TableRecord:
    """Record of a table.

    Attributes:
        file: Its file.
        num_rows: Its ids.
        embedding_dim: Weights in a row.
        dtype: Of lookups, by name: that of the table in training.
        row_format: As which rows are kept, one of ``served_table.FORMATS``.
    """

    file: FileRecord
    num_rows: int
    embedding_dim: int
    dtype: str
    row_format: str


@dataclass(frozen=True)
class Manifest:
    """Manifest of a served folder.

    Attributes:
        save_id: Random name of the export; part of the files' names.
        versions: Of this package and torch, when it was written.
        model: Name of the model's class.
        inputs: Tensors that the program takes.
        arguments: Name and spec (``serving.values``) of each positional argument.
        outputs: Spec of what the model returns.
        features: Names of the features, keys of the arguments that are dicts.
        transforms: How raw records become the inputs, as ``raw_records.RecordReader`` reads it;
            None: it was not written.
        tables: Tables by name.
        dense: File of the parameters and buffers.
        constants: Dtype of each of them.
        program: From ``program.encode``.
    """

    save_id: str
    versions: dict[str, str]
    model: str
    inputs: list[dict[str, Any]]
    arguments: list[list[Any]]
    outputs: dict[str, Any]
    features: list[str]
    transforms: dict[str, Any] | None
    tables: dict[str, TableRecord]
    dense: FileRecord
    constants: dict[str, str]
    program: dict[str, Any]

    def files(self) -> list[str]:
        """Return the names of its files."""
        return [self.dense.file, *(table.file.file for table in self.tables.values())]

    def write(self, folder: Path) -> None:
        """Make the files of a folder what it serves."""
        state = {"format": FORMAT, "version": VERSION, **self._to_state()}
        text = json.dumps({**state, "checksum": _checksum(state)}, indent=1)
        temporary = folder / f"{MANIFEST_FILE}.{self.save_id}"
        try:
            with temporary.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(folder)
            temporary.replace(folder / MANIFEST_FILE)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(folder)

    def _to_state(self) -> dict[str, Any]:
        tables = {
            name: {**asdict(table), "file": table.file.to_state()}
            for name, table in self.tables.items()
        }
        return {**vars(self), "tables": tables, "dense": self.dense.to_state()}

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            ValueError: It is missing, damaged, or of a version that this package does not know.
        """
        path = folder / MANIFEST_FILE
        if not path.exists():
            raise ValueError(f"{folder}: no served folder ({MANIFEST_FILE} is missing)")
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path}: larger than {_MAX_BYTES} bytes")
        try:
            state = json.loads(read_text(path))
        except (ValueError, RecursionError):
            raise ValueError(f"{path}: damaged") from None
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"{path}: no manifest of a served folder")
        if state.get("version") != VERSION:
            raise ValueError(f"{path}: expected version {VERSION}, got {state.get('version')!r}")
        checksum = state.pop("checksum", None)
        if checksum != _checksum(state):
            raise ValueError(f"{path}: damaged (its checksum)")
        fields = {key: value for key, value in state.items() if key not in ("format", "version")}
        try:
            return cls._from_state(fields)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: damaged ({error})") from None

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> Manifest:
        tables = {
            name: TableRecord(**{**table, "file": FileRecord.from_state(table["file"])})
            for name, table in state.pop("tables").items()
        }
        dense = FileRecord.from_state(state.pop("dense"))
        manifest = cls(**state, tables=tables, dense=dense)
        manifest._check()
        return manifest

    def _check(self) -> None:
        """Raise ValueError unless every field is of its kind."""
        for name, table in self.tables.items():
            check_dtype(table.dtype)
            numbers = (table.num_rows, table.embedding_dim)
            if not all(type(number) is int and number >= 0 for number in numbers):
                raise ValueError(f"table {name!r}: its record is damaged")
            ids = table.file.arrays.get("ids")
            if table.row_format not in FORMATS or ids is None or ids.shape != (table.num_rows,):
                raise ValueError(f"table {name!r}: its record is damaged")
        inputs = [TensorSpec.from_state(state) for state in self.inputs]
        for argument in self.arguments:
            name, spec = argument
            if not isinstance(name, str):
                raise ValueError("an argument has no name")
            check_spec(spec, len(inputs))
        check_spec(self.outputs, len(self.program["outputs"]))
        if set(self.constants) != set(self.dense.arrays):
            raise ValueError("parameters and their file differ")
        if not all(dtype in DTYPES for dtype in self.constants.values()):
            raise ValueError("a parameter has an unknown dtype")
        texts = [self.save_id, self.model, *self.features]
        if not isinstance(self.features, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("a name is no text")


def _checksum(state: dict[str, Any]) -> str:
    text = json.dumps(state, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


__all__ = ["MANIFEST_FILE", "Manifest", "TableRecord"]
