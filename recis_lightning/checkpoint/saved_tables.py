"""Interface of the two forms in which a checkpoint holds tables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from recis_lightning.checkpoint.progress import Progress
from recis_lightning.table.hash_table import HashTable


class TableContents(NamedTuple):
    """Size and layout of a table in a checkpoint.

    Attributes:
        rows: Number of rows, by the rank that wrote them.
        embedding_dim: Weights in a row.
        dtype: Of the weights.
        slots: Optimizer state of a row: name -> float32 words.
        step: Of the table.
        num_updates: Optimizer steps that had a gradient for it.
        num_bytes: Of its files; of its tensors where they are in Lightning's checkpoint itself.
    """

    rows: list[int]
    embedding_dim: int
    dtype: torch.dtype
    slots: dict[str, int]
    step: int
    num_updates: int
    num_bytes: int


class FitRules(NamedTuple):
    """Ways in which a table may differ from the saved one.

    Attributes:
        strict: Whether dtype and optimizer state must be equal, but for the following.
        optimizer_state: Whether optimizer state is loaded; else it starts afresh.
        cast: Dtype of tables that rows saved in another one are converted to; None for an error.
    """

    strict: bool = True
    optimizer_state: bool = True
    cast: torch.dtype | None = None


def check_layout(
    where: str,
    table: HashTable,
    dim: int,
    dtype: torch.dtype,
    slots: Mapping[str, int],
    how: FitRules,
) -> None:
    """Raise ValueError unless a table can hold rows of a layout.

    Args:
        where: Path of the checkpoint.
        table: The table.
        dim: Weights in a saved row.
        dtype: Of the weights.
        slots: Optimizer state of a row: name -> float32 words.
        how: What may differ.
    """
    where = f"table {table.name!r}: the checkpoint's ({where})"
    if dim != table.embedding_dim:
        raise ValueError(f"{where} has embedding_dim={dim}, the model's {table.embedding_dim}")
    if how.strict and dtype is not table.dtype and table.dtype is not how.cast:
        raise ValueError(
            f"{where} has dtype {dtype}, the model's {table.dtype}; "
            f"checkpoint.load(..., cast={str(table.dtype)[6:]!r}) converts it"
        )
    compared = how.strict and how.optimizer_state and table.optimizer is not None
    if compared and slots != table.storage.rows.slots:
        raise ValueError(
            f"{where} has optimizer state {slots or 'of no kind'}, "
            f"{type(table.optimizer).__name__} keeps {table.storage.rows.slots or 'none'}: "
            "resume with the optimizer that the checkpoint was trained with, or load rows "
            "alone: checkpoint.load(..., optimizer_state=False)"
        )


@contextmanager
def all_or_none(tables: Iterable[HashTable]) -> Iterator[None]:
    """Give all tables back what they held if the block, which loads them, is left by an exception.

    Until then, memory holds what there was and what comes.
    """
    with ExitStack() as stack:
        for table in tables:
            stack.enter_context(table.undo())
        yield


class SavedTables(ABC):
    """Tables of one checkpoint, by name; every read raises ValueError if a byte is damaged.

    ``StateTables`` are in Lightning's file itself, ``ShardTables`` in files of each rank.
    """

    @property
    @abstractmethod
    def save_id(self) -> str | None:
        """Random name of the save; None if it has none."""

    @abstractmethod
    def names(self) -> list[str]:
        """List the tables."""

    @abstractmethod
    def contents(self, name: str) -> TableContents:
        """Return the size and layout of a table, without reading its rows."""

    def excluded(self) -> list[str]:
        """List the parts that were left out on purpose: tables, their state, dense tensors."""
        return []

    @abstractmethod
    def chunks(self, name: str, num_rows: int) -> Iterator[dict[str, Tensor]]:
        """Read all ranks' rows of a table, checked, about ``num_rows`` at a time.

        Yields:
            Ids, weights, slots and policies' columns, by name; at least once, so that a table
            without rows has columns too.
        """

    @abstractmethod
    def pinned(self, name: str) -> Tensor:
        """Read the pinned ids of a table, int64 [n], checked."""

    @abstractmethod
    def check_fit(self, name: str, table: HashTable, how: FitRules) -> None:
        """Raise ValueError unless a table can hold the saved one.

        Args:
            name: Name of the saved table.
            table: Table to load it into.
            how: What may differ.
        """

    @abstractmethod
    def load(self, tables: dict[str, HashTable], how: FitRules, progress: Progress) -> None:
        """Replace all rows of tables that passed ``check_fit``; all ranks call it together.

        After any exception, also one of another rank, the tables hold what they held.
        """


__all__ = ["FitRules", "SavedTables", "TableContents", "all_or_none", "check_layout"]
