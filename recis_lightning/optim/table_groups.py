"""Parameter groups of optimizers of tables: how they are given and named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from recis_lightning.table.anchor import Anchor
from recis_lightning.table.hash_table import HashTable, live_hash_tables

ADVICE = "pass hash_tables(module)"
_NAMED = 3  # tables of a group that its name lists


def listed(tables: Any) -> list[Any]:
    """Return what an iterable of tables yields, else raise."""
    if isinstance(tables, (HashTable, torch.Tensor)):
        raise TypeError(f"tables: expected an iterable of HashTable, got {tables!r}")
    if isinstance(tables, (nn.Module, str, dict)) or not isinstance(tables, Iterable):
        raise TypeError(
            f"tables: expected an iterable of HashTable, got {type(tables).__name__}; {ADVICE}"
        )
    return list(tables)


def different(name: str, taken: Sequence[str]) -> str:
    """Return a name that is not taken: the given one, or that with a number.

    Example:
        >>> different("user", ["user", "user-2"])
        'user-3'
    """
    number, answer = 1, name
    while answer in taken:
        number += 1
        answer = f"{name}-{number}"
    return answer


def name_of(tables: Sequence[HashTable]) -> str:
    """Return the name of a group of tables, for loggers: those of a few tables, the first of many.

    Example:
        >>> name_of([HashTable(2, name=name) for name in ("user", "item", "tags", "city")])
        'user+3 more'
    """
    names = [table.name for table in tables]
    return "+".join(names) if len(names) <= _NAMED else f"{names[0]}+{len(names) - 1} more"


def read_tables(tables: Any, known: Sequence[HashTable]) -> list[HashTable]:
    """Return the tables of a group.

    Args:
        tables: A table or several.
        known: Tables of other groups.

    Raises:
        TypeError: Something is no table.
        ValueError: A table is there twice.
    """
    members = [tables] if isinstance(tables, HashTable) else listed(tables)
    for table in members:
        if not isinstance(table, HashTable):
            raise TypeError(
                f"tables: expected HashTable, got {type(table).__name__}; {ADVICE}, not "
                "module.parameters()"
            )
        if table in known or members.count(table) > 1:
            raise ValueError(f"tables: table {table.name!r} is there twice")
    return members


def read_parameters(params: Any, known: Sequence[HashTable]) -> list[HashTable]:
    """Return the tables of a group that is added later: tables, or their modules' parameters.

    Args:
        params: A table, or several, or anchors, which is how Lightning passes the parameters of a
            module that it unfreezes; each may be a pair with its name.
        known: Tables that the optimizer has.

    Raises:
        TypeError: Something is neither (names it).
        ValueError: A table is there twice, or there is none.
    """
    given = [params] if isinstance(params, (HashTable, Anchor)) else listed(params)
    of_anchors: dict[Any, HashTable] = {table.anchor: table for table in live_hash_tables()}
    tables: list[Any] = []
    for entry in given:
        item: Any = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
        if isinstance(item, torch.Tensor) and item not in of_anchors:
            raise TypeError(
                f"params: expected tables, got a parameter of shape {tuple(item.shape)}; a dense "
                "optimizer trains it, and SparseDenseOptimizer joins the two"
            )
        tables.append(of_anchors.get(item, item))
    if not tables:
        raise ValueError(f"params: expected at least one HashTable, got none; {ADVICE}")
    return read_tables(tables, known)


__all__ = ["ADVICE", "different", "listed", "name_of", "read_parameters", "read_tables"]
