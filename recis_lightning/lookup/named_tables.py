"""Tables that recorded programs name: which one a name stands for when a program runs.

A program of ``torch.export`` keeps a table's name, and reads whatever table has that name where it
runs: one that was bound to it, or the only table alive that is called so. A program of
``torch.compile`` never leaves its process, and its keys name one table each.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from recis_lightning.table.hash_table import HashTable, live_hash_tables

_SERIAL = "@"  # between a table's name and its identity, in a key of this process


class RowReader(Protocol):
    """Rows of a table that only read, from wherever they lie.

    Attributes:
        embedding_dim: Weights in a row.
        dtype: Dtype of what it returns.
    """

    @property
    def embedding_dim(self) -> int:
        """Weights in a row."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of outputs."""

    def look_up(
        self,
        ids: Tensor,
        offsets: Tensor | None,
        weights: Tensor | None,
        mode: str,
        tile_len: int,
        padding_idx: int | None,
    ) -> Tensor:
        """Look a feature up, as the operator ``recis_lightning::look_up`` describes."""


_bound: dict[str, HashTable | RowReader] = {}
_lock = threading.Lock()


class Binding:
    """Tables bound to names for the programs of this process; as a context, until it ends.

    Args:
        tables: Name -> its table.

    Raises:
        ValueError: A name is bound to another table.
    """

    def __init__(self, tables: Mapping[str, HashTable | RowReader]) -> None:
        self._tables = dict(tables)
        with _lock:
            for name, table in self._tables.items():
                if _bound.get(name, table) is not table:
                    raise ValueError(
                        f"table {name!r} is bound already, to another table; release that one "
                        "first (binding.release()), or export under another name"
                    )
            _bound.update(self._tables)

    @property
    def names(self) -> list[str]:
        """Names of its tables."""
        return list(self._tables)

    def release(self) -> None:
        """Bind the names no more."""
        with _lock:
            for name, table in self._tables.items():
                if _bound.get(name) is table:
                    del _bound[name]

    def __enter__(self) -> Binding:
        return self

    def __exit__(self, *error: Any) -> None:
        self.release()


def key_of(table: HashTable, is_exported: bool) -> str:
    """Return the key by which a recorded program names a table.

    Args:
        table: The table.
        is_exported: Whether the program may leave this process; else the key is of this table.
    """
    return table.name if is_exported else f"{table.name}{_SERIAL}{id(table)}"


def find_table(key: str) -> HashTable | RowReader:
    """Return the table that a key of ``key_of`` stands for now.

    Raises:
        RuntimeError: There is none, or several have the name.
    """
    bound = _bound.get(key)
    if bound is not None:
        return bound
    alive = live_hash_tables()
    name, _, serial = key.rpartition(_SERIAL)
    if serial.isdecimal():
        for table in alive:
            if id(table) == int(serial) and table.name == name:
                return table
    named = [table for table in alive if table.name == key]
    originals = [table for table in named if table.original is None]
    if len(originals) == 1:
        return originals[0]
    found = "none is alive" if not named else f"{len(named)} alive are called so"
    raise RuntimeError(
        f"table {key!r}: a recorded program looks it up by its name, and {found}; bind one with "
        "recis_lightning.serving.bind(model_or_folder)"
    )


__all__ = ["Binding", "RowReader", "find_table", "key_of"]
