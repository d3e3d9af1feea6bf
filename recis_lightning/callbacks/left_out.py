"""Parts that a checkpoint leaves out, for Lightning, which expects them all."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from recis_lightning.checkpoint.name_patterns import dense_tensors
from recis_lightning.checkpoint.reader import CheckpointReader
from recis_lightning.distributed import collectives

__all__ = ["keep_left_out", "without_left_out"]

_log = logging.getLogger(__name__)


def without_left_out(checkpoint: dict[str, Any], commit: dict[str, Any]) -> dict[str, Any]:
    """Return the content of Lightning's file without the dense tensors that are left out.

    Args:
        checkpoint: The content; it stays as it is.
        commit: Names of the parts in ``excluded``, if any are left out.
    """
    excluded = set(commit.get("excluded", ()))
    states = checkpoint.get("state_dict")
    if not excluded or not isinstance(states, dict):
        return checkpoint
    return {
        **checkpoint,
        "state_dict": {key: value for key, value in states.items() if key not in excluded},
    }


def keep_left_out(
    path: Path, module: nn.Module, checkpoint: dict[str, Any], reader: CheckpointReader
) -> None:
    """Let the module keep what a checkpoint left out on purpose, and log it on rank 0.

    Args:
        path: Lightning's file.
        module: That loads it.
        checkpoint: Its content; gets the module's own dense tensors where they were left out.
        reader: Of its tables.
    """
    excluded = reader.excluded()
    if not excluded:
        return
    states = checkpoint.get("state_dict")
    if isinstance(states, dict):
        own = dense_tensors(module)
        for name in excluded:
            if name in own and name not in states:
                states[name] = own[name].detach().clone()
    if collectives.rank() == 0:
        _log.warning(
            "%s was saved without %s: tables and tensors among these stay as they are, optimizer "
            "state starts afresh",
            *(path, ", ".join(excluded)),
        )
