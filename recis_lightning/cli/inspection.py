"""``recis-lightning inspect``: the tables of a checkpoint or a served folder, as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recis_lightning.checkpoint.commit import COMMIT_FILE, FOLDER_SUFFIX
from recis_lightning.checkpoint.folder_listing import checkpoints_in
from recis_lightning.checkpoint.reader import CheckpointReader
from recis_lightning.embedding_option import EmbeddingOption
from recis_lightning.serving.manifest import MANIFEST_FILE, Manifest

_MIB = 1 << 20


def inspection(path: Path) -> str:
    """Return the tables of a checkpoint or a served folder, without reading all of their rows.

    Args:
        path: Lightning's checkpoint, or the folder of shards beside it; a folder that
            ``checkpoint.save`` wrote to, or one of ``serving.export``; or a folder that has
            checkpoints in it or below: these are listed, and the tables are those of the newest
            that is whole.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: It is none of these, or is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    if path.is_dir() and (path / MANIFEST_FILE).exists():
        return _served(path)
    if path.is_dir() and not (path / COMMIT_FILE).exists():
        if path.name.endswith(FOLDER_SUFFIX):
            return _checkpoint(path)
        return _newest_in(path)
    return _checkpoint(path)


def _newest_in(folder: Path) -> str:
    """Return the list of a folder's checkpoints, and the tables of the newest whole one."""
    found = checkpoints_in(folder)
    if not found:
        raise ValueError(
            f"{folder}: expected a checkpoint, a served folder or a folder with checkpoints; it "
            f"has neither {COMMIT_FILE} nor {MANIFEST_FILE}, and no *.ckpt in it or below"
        )
    lines, text = [f"{folder}: checkpoints, the newest first", ""], None
    for path in found:
        about = ""
        if text is None:
            try:
                text, about = _checkpoint(path), "  (the newest that is whole: see below)"
            except (OSError, ValueError) as error:
                about = f"  (left out: {' '.join(str(error).split())})"
        lines.append(f"{path.relative_to(folder)}{about}")
    if text is None:
        reasons = "; ".join(lines[2:])
        raise ValueError(f"{folder}: none of its checkpoints has tables and is whole: {reasons}")
    return "\n".join([*lines, "", text])


def _checkpoint(path: Path) -> str:
    reader = CheckpointReader.open(path)
    rows = []
    for name in reader.names():
        table = reader.contents(name)
        first = next(reader.chunks(name, 1))
        kept = [column for column in first if column not in ("ids", "weights", *table.slots)]
        ranks = f" on {len(table.rows)} ranks" if len(table.rows) > 1 else ""
        rows.append(
            [
                name,
                f"{sum(table.rows):,}{ranks}",
                str(table.embedding_dim),
                str(table.dtype).removeprefix("torch."),
                ", ".join(table.slots) or "-",
                ", ".join(kept) or "-",
                f"{table.step:,}",
                f"{table.num_updates:,}",
                f"{table.num_bytes / _MIB:,.1f}",
            ]
        )
    kind = "tables of checkpoint.save" if path.is_dir() else "checkpoint of Lightning"
    heads = ["table", "rows", "dim", "dtype", "optimizer state", "kept for policies"]
    lines = [f"{path}: {kind}", "", *_columns([*heads, "step", "updates", "MiB"], rows)]
    if excluded := reader.excluded():
        lines += ["", f"left out when it was saved: {', '.join(excluded)}"]
    if path.is_file() and (policies := dict(_policies(_hyper_parameters(path)))):
        pairs = [[name, *map(str, both)] for name, both in policies.items()]
        lines += ["", "policies, of the saved hyperparameters:"]
        lines += _columns(["table", "admission", "eviction"], pairs)
    return "\n".join(lines)


def _served(path: Path) -> str:
    manifest = Manifest.read(path)
    rows = [
        [
            *(name, f"{table.num_rows:,}", str(table.embedding_dim), table.dtype),
            *(table.row_format, f"{table.file.size / _MIB:,.1f}"),
        ]
        for name, table in manifest.tables.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    lines = [
        f"{path}: served folder of {manifest.model} ({versions})",
        "",
        *_columns(["table", "rows", "dim", "dtype", "rows kept as", "MiB"], rows),
        "",
        f"features: {', '.join(manifest.features) or '-'}",
        f"raw records: {'no' if manifest.transforms is None else 'yes'}",
    ]
    return "\n".join(lines)


def _hyper_parameters(path: Path) -> Any:
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return saved.get("hyper_parameters") if isinstance(saved, Mapping) else None


def _policies(value: Any, name: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the policies of each table that hyperparameters describe."""
    if isinstance(value, EmbeddingOption):
        if value.admission is not None or value.eviction is not None:
            yield value.table or name, (value.admission or "-", value.eviction or "-")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _policies(inner, str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _policies(inner, name)


def _columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with columns below one another; those of numbers to the right.

    Example:
        >>> print(*_columns(["table", "rows"], [["user", "1,234"]]), sep="|")
        table   rows|user   1,234
    """
    every = [list(heads), *map(list, rows)]
    widths = [max(len(row[n]) for row in every) for n in range(len(heads))]
    is_number = [
        bool(rows) and all(row[n][:1].isdigit() for row in rows) for n in range(len(heads))
    ]
    return [
        "  ".join(
            word.rjust(width) if number else word.ljust(width)
            for word, width, number in zip(row, widths, is_number, strict=True)
        ).rstrip()
        for row in every
    ]
