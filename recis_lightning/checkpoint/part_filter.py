"""Choice of the parts that a checkpoint leaves out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from recis_lightning.checkpoint.name_patterns import (
    check_patterns,
    dense_tensors,
    matches,
    table_parts,
)
from recis_lightning.table.hash_table import HashTable

# Takes the names of parts, returns those to save.
SaveFilter = Callable[[list[str]], Iterable[str]]


class PartFilter:
    """Parts that saves leave out: tables, optimizer state of their rows, and dense tensors.

    Args:
        exclude: Names, or patterns as of files: "user" leaves a table out, "user.exp_avg" a part of
            its optimizer state, "*.exp_avg*" that of all tables, "tower.*" dense tensors.
        save_filter: Called at each save with the names that ``exclude`` left; returns those to
            save.

    Raises:
        TypeError: ``exclude`` is no list of names, or ``save_filter`` cannot be called.

    Example:
        >>> from recis_lightning import HashTable
        >>> tables = [HashTable(2, name="user"), HashTable(2, name="item")]
        >>> PartFilter(["us*"], None).excluded(tables, None)
        ['user']
    """

    def __init__(self, exclude: Iterable[str] | None, save_filter: SaveFilter | None) -> None:
        self.patterns = [] if exclude is None else check_patterns("exclude", exclude)
        if save_filter is not None and not callable(save_filter):
            raise TypeError(
                "save_filter: expected a function that takes the names of parts and returns those "
                f"to save, got {save_filter!r}"
            )
        self._save_filter = save_filter

    @property
    def is_used(self) -> bool:
        """Whether anything may be left out."""
        return bool(self.patterns) or self._save_filter is not None

    def excluded(self, tables: Sequence[HashTable], module: nn.Module | None) -> list[str]:
        """Return the names of the parts to leave out.

        Args:
            tables: That are saved.
            module: Whose dense tensors are saved; None if only tables are.

        Raises:
            TypeError: ``save_filter`` returned something else than names.
            ValueError: It returned names that are none of those that it was given.
        """
        if not self.is_used:
            return []
        names = _names(tables, module)
        kept = [name for name in names if not matches(name, self.patterns)]
        if self._save_filter is not None:
            chosen = check_patterns("save_filter", self._save_filter(list(kept)))
            unknown = sorted(set(chosen) - set(kept))
            if unknown:
                raise ValueError(
                    f"save_filter: expected some of the names that it was given, got {unknown} too"
                )
            kept = chosen
        left = set(kept)
        return [name for name in names if name not in left]

    def unused(self, tables: Sequence[HashTable], module: nn.Module | None) -> list[str]:
        """Return the patterns that no part matches: they may be misspelt."""
        names = _names(tables, module)
        return [
            pattern
            for pattern in self.patterns
            if not any(matches(name, [pattern]) for name in names)
        ]


def _names(tables: Sequence[HashTable], module: nn.Module | None) -> list[str]:
    return [*table_parts(tables), *(() if module is None else dense_tensors(module))]


__all__ = ["PartFilter", "SaveFilter"]
