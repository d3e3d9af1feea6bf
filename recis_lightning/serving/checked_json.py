"""Small files of JSON with a checksum, each written aside and renamed into its place."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from recis_lightning.checkpoint.commit import sync_folder
from recis_lightning.checkpoint.regular_file import read_text

_MAX_BYTES = 1 << 28


def write_checked(path: Path, state: dict[str, Any]) -> None:
    """Make a file hold a state, all of it or none, and durably.

    Args:
        path: The file; an older one is replaced.
        state: Of what JSON has.
    """
    text = json.dumps({**state, "checksum": _checksum(state)})
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with aside.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)  # what the state names, too
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_checked(path: Path, form: str, version: int) -> dict[str, Any]:
    """Read what ``write_checked`` wrote.

    Args:
        path: The file.
        form: What its field "format" must be.
        version: What its field "version" must be.

    Raises:
        ValueError: It is missing, no regular file, damaged, too large, or of another format.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path}: larger than {_MAX_BYTES} bytes")
    except OSError:
        raise ValueError(f"{path}: this file is missing or cannot be read") from None
    try:
        state = json.loads(read_text(path))
    except RecursionError:
        raise ValueError(f"{path}: damaged") from None
    except json.JSONDecodeError:
        raise ValueError(f"{path}: damaged") from None
    if not isinstance(state, dict) or state.get("format") != form:
        raise ValueError(f"{path}: expected a file of format {form!r}")
    if state.get("version") != version:
        raise ValueError(f"{path}: expected version {version}, got {state.get('version')!r}")
    if state.pop("checksum", None) != _checksum(state):
        raise ValueError(f"{path}: damaged (its checksum)")
    return state


def _checksum(state: dict[str, Any]) -> str:
    text = json.dumps(state, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


__all__ = ["read_checked", "write_checked"]
