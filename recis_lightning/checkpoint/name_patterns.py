"""Names of a checkpoint's parts, and the patterns that choose and rename them.

A part is a table ("user"), the optimizer state of its rows ("user.exp_avg") or a dense tensor of
the ``state_dict`` ("tower.0.weight").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from recis_lightning.checkpoint.commit import slot_name
from recis_lightning.table.hash_table import HashTable


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a name is one of the patterns, or matches it as a file name would.

    Example:
        >>> matches("user.exp_avg_sq", ["item", "*.exp_avg*"]), matches("user", ["*.exp_avg*"])
        (True, False)
    """
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def renamed(name: str, rules: Mapping[str, str]) -> tuple[str, str | None]:
    """Return the name that the first rule for it gives, and this rule; itself without one.

    Args:
        name: A name.
        rules: Names, or patterns with ``*``, to names with as many ``*``, which take what those of
            the pattern matched.

    Example:
        >>> renamed("old_item", {"old_*": "new_*"})
        ('new_item', 'old_*')
        >>> renamed("user", {"old_*": "new_*"})
        ('user', None)
    """
    for pattern, target in rules.items():
        expression = "(.*)".join(map(re.escape, pattern.split("*")))
        found = re.fullmatch(expression, name, re.DOTALL)
        if found is not None:
            first, *others = target.split("*")
            pairs = zip(found.groups(), others, strict=True)
            return first + "".join(star + text for star, text in pairs), pattern
    return name, None


def check_patterns(argument: str, patterns: Any) -> list[str]:
    """Return patterns as a list; TypeError unless they are str.

    Example:
        >>> check_patterns("exclude", "user")
        Traceback (most recent call last):
        TypeError: exclude: expected a list of names or patterns, got 'user'; write ['user']
    """
    if isinstance(patterns, str):
        raise TypeError(
            f"{argument}: expected a list of names or patterns, got {patterns!r}; write "
            f"[{patterns!r}]"
        )
    found = list(patterns) if isinstance(patterns, Iterable) else [patterns]
    if isinstance(patterns, Mapping) or not all(isinstance(pattern, str) for pattern in found):
        raise TypeError(f"{argument}: expected a list of names or patterns, got {patterns!r}")
    return found


def table_parts(tables: Iterable[HashTable]) -> list[str]:
    """List the names of tables, each followed by those of its rows' optimizer state."""
    names = []
    for table in tables:
        names.append(table.name)
        names += [slot_name(table.name, slot) for slot in table.storage.rows.slots]
    return names


def dense_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters and saved buffers by their names in its ``state_dict``.

    Tables have none: their anchors are not saved.
    """
    found: dict[str, Tensor] = {}
    for place, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, HashTable):
            continue
        kept = {
            name: tensor
            for name, tensor in part._buffers.items()
            if name not in part._non_persistent_buffers_set
        }
        for name, tensor in {**part._parameters, **kept}.items():
            if isinstance(tensor, torch.Tensor):
                found[f"{place}.{name}" if place else name] = tensor
    return found


__all__ = ["check_patterns", "dense_tensors", "matches", "renamed", "table_parts"]
