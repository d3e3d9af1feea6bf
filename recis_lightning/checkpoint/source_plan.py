"""Plan of a load from sources: which part of a model comes from which of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from recis_lightning.checkpoint.commit import slot_name
from recis_lightning.checkpoint.name_patterns import matches, renamed
from recis_lightning.checkpoint.saved_tables import FitRules
from recis_lightning.checkpoint.source import Source
from recis_lightning.checkpoint.source_content import SourceContent
from recis_lightning.table.hash_table import HashTable

_SHOWN = 6  # dense tensors named in a plan


@dataclass
class SourcePlan:
    """Parts of a model that come from one source.

    Attributes:
        source: The source.
        content: What it holds; None if it is not there, and that is passed over.
        tables: Tables of the model, by the names of the saved ones.
        with_state: Names of the saved tables whose optimizer state comes along.
        dense: Names of dense tensors of the model, by those in the source.
        left: Names in the source that have no place in the model, or were not chosen.
        overridden: Names in the model that a later source brings.
    """

    source: Source
    content: SourceContent | None
    tables: dict[str, HashTable] = field(default_factory=dict)
    with_state: set[str] = field(default_factory=set)
    dense: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    overridden: list[str] = field(default_factory=list)

    def targets(self) -> set[str]:
        """Return the names of the parts of the model that it brings."""
        return {table.name for table in self.tables.values()} | set(self.dense.values())

    def describe(self, number: int) -> list[str]:
        """Return the plan as lines of text.

        Args:
            number: Of the source in its list.
        """
        if self.content is None:
            return [f"  {number}. {self.source}: not there, passed over"]
        lines = [f"  {number}. {self.content.path}:"]
        for name, table in self.tables.items():
            lines.append(f"    {self._describe_table(name, table)}")
        if self.dense:
            pairs = [
                target if name == target else f"{target} <- {name}"
                for name, target in self.dense.items()
            ]
            more = "" if len(pairs) <= _SHOWN else f" and {len(pairs) - _SHOWN} more"
            lines.append(f"    dense: {', '.join(pairs[:_SHOWN])}{more}")
        for label, names in (("not loaded", self.left), ("from a later one", self.overridden)):
            if names:
                lines.append(f"    {label}: {', '.join(names)}")
        return lines

    def _describe_table(self, name: str, table: HashTable) -> str:
        assert self.content is not None
        saved = self.content.tables.contents(name)
        parts = [f"{sum(saved.rows):,} rows of dim {saved.embedding_dim}"]
        if saved.dtype is not table.dtype:
            parts.append(f"{saved.dtype} -> {table.dtype}".replace("torch.", ""))
        if saved.slots:
            which = "with" if name in self.with_state else "without"
            parts.append(f"{which} optimizer state ({', '.join(saved.slots)})")
        if not self.source.clear:
            parts.append("other rows stay")
        arrow = "" if name == table.name else f" <- {name}"
        return f"{table.name}{arrow}: {', '.join(parts)}"


def plan_source(
    source: Source,
    content: SourceContent | None,
    tables: Mapping[str, HashTable],
    dense: Mapping[str, Tensor],
) -> SourcePlan:
    """Return what a source brings to a model, and check that it fits.

    Args:
        source: The source.
        content: What it holds; None if it is not there.
        tables: Of the model, by name.
        dense: Of the model, by name.

    Raises:
        ValueError: A name or pattern is in neither source nor model, or a part does not fit.
    """
    plan = SourcePlan(source, content)
    if content is None:
        return plan
    saved, where = content.tables.names(), f"source {content.path}"
    names = [*saved, *(name for name in content.dense if name not in saved)]
    chosen = [
        name for name in names if matches(name, source.load) and not matches(name, source.exclude)
    ]
    problems = [
        f"load: it has no {pattern!r}"
        for pattern in source.load
        if not any(matches(name, [pattern]) for name in names)
    ]
    used, taken = set(), dict[str, str]()
    for name in chosen:
        target, rule = renamed(name, source.rename)
        used.add(rule)
        here = target in tables if name in saved else target in dense
        if not here:
            plan.left.append(name)
            if rule is not None or name in source.load:
                problems.append(f"the model has no {target!r} for its {name!r}")
            continue
        if target in taken:
            raise ValueError(f"{where}: both {taken[target]!r} and {name!r} are for {target!r}")
        taken[target] = name
        if name in saved:
            _add_table(plan, name, tables[target])
        else:
            _check_shape(where, name, content.dense[name], dense[target])
            plan.dense[name] = target
    problems += [f"rename: it has no {rule!r}" for rule in source.rename if rule not in used]
    if not plan.targets():
        problems.append("nothing of it has a place in the model")
    if problems and not source.skip_missing:
        raise ValueError(
            f"{where}: {'; '.join(problems)}; it has {_list(names)}, the model has "
            f"{_list([*tables, *dense])} (skip_missing=True passes over what is missing)"
        )
    plan.left += [name for name in names if name not in chosen]
    return plan


def _add_table(plan: SourcePlan, name: str, table: HashTable) -> None:
    assert plan.content is not None
    reader = plan.content.tables
    reader.check_tables({name: table}, FitRules(strict=False), whole=False)
    slots = reader.contents(name).slots
    excluded = any(matches(slot_name(name, slot), plan.source.exclude) for slot in slots)
    fits = table.optimizer is None or slots == table.storage.rows.slots
    plan.tables[name] = table
    if slots and fits and not excluded:
        plan.with_state.add(name)


def _check_shape(where: str, name: str, saved: Tensor, own: Tensor) -> None:
    if saved.shape != own.shape:
        raise ValueError(
            f"{where}: its {name!r} has shape {list(saved.shape)}, the model's {list(own.shape)}"
        )


def let_later_win(plans: Sequence[SourcePlan], claimed: Sequence[Collection[str]]) -> None:
    """Take from each plan what a later one brings too.

    Args:
        plans: In the order of their sources; rows of a source with ``clear=False`` come on top of
            those before it.
        claimed: For each, names of parts that it is not to bring in any case.
    """
    later: set[str] = set()
    for plan, of_others in zip(reversed(plans), reversed(claimed), strict=True):
        taken = later.union(of_others)
        tables = {name for name, table in plan.tables.items() if table.name in taken}
        dense = {name for name, target in plan.dense.items() if target in taken}
        plan.overridden += sorted(
            [plan.tables[name].name for name in tables] + [plan.dense[name] for name in dense]
        )
        plan.tables = {name: of for name, of in plan.tables.items() if name not in tables}
        plan.dense = {name: of for name, of in plan.dense.items() if name not in dense}
        later |= set(plan.dense.values())
        if plan.source.clear:
            later |= {table.name for table in plan.tables.values()}


def describe(plans: Sequence[SourcePlan], model: Iterable[str], own: str | None = None) -> str:
    """Return the plans of a load as lines of text.

    Args:
        plans: In the order of their sources.
        model: Names of the model's tables.
        own: Checkpoint that is loaded after them; None without one.
    """
    one = len(plans) == 1
    lines = [f"Loading from {len(plans)} {'source' if one else 'sources, later ones win'}:"]
    for number, plan in enumerate(plans, 1):
        lines += plan.describe(number)
    if own is not None:
        lines.append(f"  then this run's own checkpoint: {own}")
    brought = set().union(*(plan.targets() for plan in plans))
    kept = [name for name in model if name not in brought]
    if kept and own is None:
        lines.append(f"  tables left as they are: {', '.join(kept)}")
    return "\n".join(lines)


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return f"[{shown}{', ...' if len(names) > 20 else ''}]"


__all__ = ["SourcePlan", "describe", "let_later_win", "plan_source"]
