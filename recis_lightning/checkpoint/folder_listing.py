"""Checkpoints that lie in a folder."""

from __future__ import annotations

import os
from pathlib import Path

from recis_lightning.checkpoint.commit import COMMIT_FILE

__all__ = ["checkpoints_in"]


def checkpoints_in(folder: str | os.PathLike[str]) -> list[Path]:
    """List the checkpoints in a folder and below it, the newest first; whole or not.

    They are Lightning's files ``*.ckpt``, and folders that ``checkpoint.save`` wrote to.

    Args:
        folder: The folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     Path(name, "epoch=1.ckpt").touch()
        ...     [path.name for path in checkpoints_in(name)]
        ['epoch=1.ckpt']
    """
    found = [(file, file) for file in Path(folder).rglob("*.ckpt") if file.is_file()]
    found += [(file, file.parent) for file in Path(folder).rglob(COMMIT_FILE)]
    return [path for _, path in sorted(found, key=_age)]


def _age(found: tuple[Path, Path]) -> tuple[float, str]:
    """Return the order of a checkpoint, by its file; one that is removed meanwhile comes last."""
    try:
        return -found[0].stat().st_mtime, str(found[1])
    except OSError:
        return float("inf"), str(found[1])
