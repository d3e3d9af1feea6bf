"""Reads and writes safetensors files of a checkpoint anew, with checksums that are right."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from zlib import crc32

_ITEM = {"I64": 8, "F64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "U8": 1, "I8": 1}
_SUMS = "checksums"


class Shard:
    """A file with each part as it was read, to be changed and written again.

    Attributes:
        metadata: Fields of the header, each of them JSON.
        tensors: Name -> [dtype, shape, bytes]; without ``checksums``.
    """

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        described = json.loads(data[8:start])
        self.path, self.metadata = path, described.pop("__metadata__")
        self.tensors: dict[str, list[Any]] = {}
        for name, entry in described.items():
            begin, end = (start + at for at in entry["data_offsets"])
            self.tensors[name] = [entry["dtype"], entry["shape"], data[begin:end]]
        self.tensors.pop(_SUMS)

    def write(self) -> tuple[int, int]:
        """Write the file with checksums of what it holds; return its size and its own checksum."""
        rows = json.loads(self.metadata["piece_rows"])
        rows = rows if isinstance(rows, dict) else {}
        sums = b"".join(
            crc32(part).to_bytes(8, "little")
            for name, (dtype, shape, data) in self.tensors.items()
            for part in _chunks(dtype, shape, data, rows.get(name, 0))
        )
        tensors = {_SUMS: ["I64", [len(sums) // 8], sums], **self.tensors}
        described: dict[str, Any] = {"__metadata__": self.metadata}
        end = 0
        for name, (dtype, shape, data) in tensors.items():
            described[name] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [end, end + len(data)],
            }
            end += len(data)
        text = json.dumps(described).encode()
        text += b" " * (-(8 + len(text)) % 64)
        header = len(text).to_bytes(8, "little") + text
        whole = header + b"".join(data for _, _, data in tensors.values())
        self.path.write_bytes(whole)
        return len(whole), crc32(sums, crc32(header))


def _chunks(dtype: str, shape: Any, data: bytes, rows: Any) -> list[bytes]:
    try:
        size = rows * _ITEM[dtype] * math.prod(shape[1:])
        return [data[at : at + size] for at in range(0, len(data), size)]
    except (KeyError, TypeError, ValueError):  # nothing that a reader could agree with
        return [data]


def commit_of(folder: Path) -> Any:
    """Return the JSON of a folder's commit."""
    return json.loads((folder / "checkpoint.json").read_text())


def write_commit(folder: Path, commit: Any) -> None:
    (folder / "checkpoint.json").write_text(json.dumps(commit))


def rewrite(shard: Shard) -> None:
    """Write a changed file, and its size and checksum into the commit beside it."""
    size, checksum = shard.write()
    commit = commit_of(shard.path.parent)

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("file") == shard.path.name:
                node.update(size=size, checksum=checksum)
            node = list(node.values())
        for child in node if isinstance(node, list) else ():
            visit(child)

    visit(commit)
    write_commit(shard.path.parent, commit)
