"""Binding of tables to the names by which programs of ``torch.export`` look them up."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from recis_lightning.lookup.named_tables import Binding
from recis_lightning.serving.model import ServedModel
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.listing import hash_tables


def bind(tables: nn.Module | ServedModel | Mapping[str, HashTable]) -> Binding:
    """Bind tables to the names by which exported programs look them up.

    In the process that exported a program its tables are found by their names. Bind them where
    several have a name, and in a fresh process.

    Args:
        tables: A module or a model of ``serving.load``, of which every table is bound to its name,
            or name -> its table.

    Returns:
        What holds the names: leave its context, or call ``release()``, to free them.

    Raises:
        TypeError: ``tables`` is neither.
        ValueError: Another table is bound to a name.

    Example:
        >>> import torch
        >>> from recis_lightning import HashTable
        >>> with bind({"user": HashTable(4)}) as binding:
        ...     binding.names
        ['user']
    """
    if isinstance(tables, ServedModel):
        return Binding(tables.tables)
    if isinstance(tables, nn.Module):
        tables = {table.name: table for table in hash_tables(tables)}
    elif not isinstance(tables, Mapping) or not all(
        isinstance(table, HashTable) for table in tables.values()
    ):
        raise TypeError(
            f"tables: expected a module, a served model or a dict of HashTables, got {tables!r}"
        )
    return Binding(tables)


__all__ = ["bind"]
