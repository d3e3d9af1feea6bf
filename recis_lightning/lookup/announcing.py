"""Announcement of what fails on one rank before it asks the others.

Arguments are checked before a lookup's first message. A rank that raised there alone would leave
the others to wait until the process group's timeout.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from recis_lightning.arguments import is_recorded
from recis_lightning.distributed import collectives
from recis_lightning.distributed.heads import announce_failure


def announce_refusal(error: Exception, modules: Iterable[Any]) -> None:
    """Let the other ranks fail with this one, which refuses what modules were called with.

    Does nothing on one rank, where torch records a program, and where nobody can be told because
    no module knows its ranks.

    Args:
        error: What this rank raises.
        modules: What it was about to look up; some may be no modules of ours.
    """
    named, groups = [], None
    for module in modules:
        if not hasattr(module, "lookup_steps"):
            continue
        named.append(_describe(module))
        if groups is None:
            try:
                groups = module.current_groups()
            except Exception:  # the mistake may be in the module itself
                groups = None
    if not groups or is_recorded():
        return
    process_group = groups[0].process_group
    if collectives.world_size(process_group) > 1:
        shown = ", ".join(named[:4]) + (f" and {len(named) - 4} more" if len(named) > 4 else "")
        announce_failure(error, f"looks up {shown}", process_group)


def _describe(module: Any) -> str:
    """Describe a module and how it looks up: "DynamicEmbedding 'user' in training"."""
    table = getattr(module, "table", None)
    name = "" if table is None or table.name is None else f" {table.name!r}"
    return f"{type(module).__name__}{name} in {'training' if module.training else 'evaluation'}"


__all__ = ["announce_refusal"]
