"""Plan of a load: which saved table goes to which table of a model, and what of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from recis_lightning.arguments import check_dtype
from recis_lightning.checkpoint.saved_tables import FitRules, TableContents
from recis_lightning.table.hash_table import HashTable


class LoadPlan(NamedTuple):
    """Tables to load, and how they may differ from the saved ones.

    Attributes:
        tables: Tables of the model, by the name of the saved one.
        how: In what they may differ.
    """

    tables: dict[str, HashTable]
    how: FitRules

    def describe(
        self, path: str, contents: Mapping[str, TableContents], model: Iterable[str]
    ) -> str:
        """Return the plan as lines of text.

        Args:
            path: The checkpoint.
            contents: Its tables.
            model: Names of the model's tables.
        """
        lines = [f"Loading {len(self.tables)} of {len(contents)} tables of {path}:"]
        for name, table in self.tables.items():
            saved = contents[name]
            source = "" if name == table.name else f" <- {name}"
            parts = [f"{sum(saved.rows):,} rows of dim {saved.embedding_dim}"]
            if saved.dtype is not table.dtype:
                parts.append(f"{saved.dtype} -> {table.dtype}".replace("torch.", ""))
            if saved.slots and not self.how.optimizer_state:
                parts.append(f"without optimizer state ({', '.join(saved.slots)})")
            lines.append(f"  {table.name}{source}: {', '.join(parts)}")
        loaded = {table.name for table in self.tables.values()}
        for label, names in (
            ("not loaded", [name for name in contents if name not in self.tables]),
            ("left as they are", [name for name in model if name not in loaded]),
        ):
            if names:
                lines.append(f"  {label}: {', '.join(names)}")
        return "\n".join(lines)


def plan_load(
    path: str,
    saved: Sequence[str],
    model: Mapping[str, HashTable],
    names: Iterable[str] | None,
    rename: Mapping[str, str],
    optimizer_state: bool,
    cast: torch.dtype | str | None,
) -> LoadPlan:
    """Return the plan that the arguments of ``checkpoint.load`` ask for.

    Args:
        path: The checkpoint, for errors.
        saved: Names of its tables.
        model: Tables of the model, by name.
        names: Saved tables to load; None for all.
        rename: Names of the model's tables, by the name of the saved one.
        optimizer_state: As for ``FitRules``.
        cast: As for ``FitRules``; or its name.

    Raises:
        TypeError: ``rename`` is no mapping.
        ValueError: A name that is not there, or two saved tables for one of the model.
    """
    if not isinstance(rename, Mapping):
        raise TypeError(
            "rename: expected a dict, name that was saved -> name in the model, got "
            f"{type(rename).__name__}"
        )
    wanted = list(saved) if names is None else list(dict.fromkeys(names))
    for argument, given in (("tables", wanted), ("rename", rename)):
        unknown = [name for name in given if name not in saved]
        if unknown:
            raise ValueError(f"{argument}: {path} has the tables {sorted(saved)}, got {unknown}")
    unused = [name for name in rename if name not in wanted]
    if unused:
        raise ValueError(f"rename: expected names among tables={wanted}, got {unused} too")
    unknown = [name for name in rename.values() if name not in model]
    if unknown:
        raise ValueError(f"rename: the model has the tables {sorted(model)}, got {unknown}")
    targets = {name: rename.get(name, name) for name in wanted}
    loaded = list(targets.values())
    if len(set(loaded)) < len(loaded):
        raise ValueError(f"rename: expected one saved table for each of the model, got {targets}")
    missing = [] if names is not None else sorted(set(model) - set(loaded))
    homeless = sorted(name for name, target in targets.items() if target not in model)
    if missing or homeless:
        raise ValueError(
            f"{path}: it holds the tables {sorted(saved)}, the model has {sorted(model)}: "
            f"{missing} would get no rows, {homeless} have no place; give tables=[...] to load "
            "some of them, or rename={...}"
        )
    tables = {name: model[target] for name, target in targets.items()}
    dtype = None if cast is None else check_dtype(cast, "cast")
    return LoadPlan(tables, FitRules(True, optimizer_state, dtype))


__all__ = ["LoadPlan", "plan_load"]
