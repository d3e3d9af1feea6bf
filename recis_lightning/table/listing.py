"""Tables of a module, and the names of those that were given none."""

from __future__ import annotations

import itertools
import warnings
import weakref

from torch import nn

from recis_lightning.table.hash_table import HashTable, live_hash_tables

# Tables of a name that another one has. Python's own rule, once a place, is void again whenever
# anybody changes a filter of warnings, as torch and Lightning do.
_warned_of: weakref.WeakSet[HashTable] = weakref.WeakSet()


def hash_tables(module: nn.Module) -> list[HashTable]:
    """List a module's tables, each once, and name the unnamed after their place in it.

    Warns once of two tables that were given one name: their rows begin alike, and no checkpoint can
    hold both. (Not of copies of a table, by ``deepcopy`` or a pickle, such as an average of a model
    has.)

    Example:
        >>> hash_tables(nn.Sequential(HashTable(4), HashTable(4, name="item")))[0].name
        '0'
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a module, got {type(module).__name__}")
    tables = []
    named: dict[str, tuple[str, HashTable]] = {}
    for path, child in module.named_modules():
        if isinstance(child, HashTable):
            place = path.removesuffix(".table") or "table"
            child.set_default_name(place)
            tables.append(child)
            first, other = named.setdefault(child.name, (place, child))
            if other.family != child.family and child not in _warned_of:
                _warned_of.add(child)
                warnings.warn(
                    f"{first} and {place} have two tables of one name, {child.name!r}: their rows "
                    "begin alike, and no checkpoint can hold both; give one another name, or use "
                    "one table in both places",
                    UserWarning,
                    stacklevel=1,
                )
    return tables


def name_before_use(table: HashTable) -> None:
    """Name a table that has no name when a training lookup begins.

    It is "table", or "table_2" and so on where another table alive has that name: the rows of two
    tables must not begin alike. Copies of a table are to begin as it does.

    Example:
        >>> one, other = HashTable(2), HashTable(2)
        >>> name_before_use(one), name_before_use(other)
        (None, None)
        >>> one.name == other.name
        False
    """
    if table.given_name is not None or table.default_name is not None:
        return
    taken = {
        other.given_name or other.default_name
        for other in live_hash_tables()
        if other.family != table.family
    }
    names = itertools.chain(["table"], (f"table_{count}" for count in itertools.count(2)))
    table.default_name = next(name for name in names if name not in taken)
    table.set_key(None, table.seed)


__all__ = ["hash_tables", "name_before_use"]
