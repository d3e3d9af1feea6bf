"""Lookups of several modules together, as one module that had all their features would do them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.modules import module as module_hooks

from recis_lightning import compiler
from recis_lightning.distributed import collectives
from recis_lightning.distributed.process_group import ProcessGroup
from recis_lightning.jagged import FeatureBags
from recis_lightning.lookup.announcing import announce_refusal
from recis_lightning.lookup.current_groups import CurrentGroups
from recis_lightning.lookup.features import Feature, kind_of
from recis_lightning.lookup.group import LookupGroup, look_up_groups
from recis_lightning.lookup.kept_groups import KeptGroups

_Result = TypeVar("_Result")
_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


class Asked(NamedTuple):
    """Features that a module looks up.

    Attributes:
        groups: Its groups.
        bags: For each group, those of its features.
    """

    groups: Sequence[LookupGroup]
    bags: Sequence[FeatureBags]


LookupSteps = Generator[Asked, list[list[Tensor]], _Result]
"""Lookup of a module: yields what it asks, and is sent the rows of each group's features."""


class LookupModule(Protocol):
    """Module whose lookups may be done with those of others.

    Attributes:
        training: Whether it trains.
    """

    training: bool

    def lookup_steps(self, *arguments: Any) -> LookupSteps[Any]:
        """Look up what ``forward`` is given, in steps; nothing changes before the first yield."""

    def __call__(self, *arguments: Any) -> Any:
        """Look up."""


def run_steps(steps: LookupSteps[_Result], module: LookupModule) -> _Result:
    """Do a module's lookup by itself."""
    try:
        groups, bags = next(steps)
    except Exception as error:
        announce_refusal(error, [module])
        raise
    return _finish(steps, look_up_groups(groups, bags, module.training))


def look_up_together(*lookups: Sequence[Any]) -> list[Any]:
    """Look up several modules, which share the passes and messages of one ``EmbeddingEngine``.

    Outputs, gradients and updates are those of calling the modules one after the other; only a
    table that several of them look up takes all their ids for one lookup, as an engine's does: an
    admission policy sees them together, and gradients are added up in that order. Where a module
    has hooks or a ``forward`` of its own, all are called one after the other. On several ranks all
    modules take three messages in training, where each would take three of its own; in evaluation
    they are called one after the other, so that a rank without a batch can answer.

    Args:
        lookups: For each a sequence: a ``DynamicEmbedding``, ``DynamicEmbeddingBag`` or
            ``EmbeddingEngine``, and what it is called with. A module may occur several times.

    Returns:
        What each returns, in their order.

    Raises:
        TypeError: A module is of another kind (names its position).
        ValueError: Some modules train and others do not, or their tables are sharded over several
            process groups.

    Example:
        >>> from recis_lightning import DynamicEmbedding, DynamicEmbeddingBag
        >>> user, tags = DynamicEmbedding(4, name="user"), DynamicEmbeddingBag(2, name="tags")
        >>> ids, bags = torch.tensor([5, 6, 5]), torch.tensor([[1, 2], [2, 2], [3, 1]])
        >>> [tuple(rows.shape) for rows in look_up_together((user, ids), (tags, bags))]
        [(3, 4), (3, 2)]
    """
    try:
        trains = _check(lookups)
    except Exception as error:
        announce_refusal(error, [given[0] for given in lookups if _is_call(given)])
        raise
    modules = [lookup[0] for lookup in lookups]
    if not all(map(is_plain, modules)) or (not all(trains) and torch.compiler.is_compiling()):
        return [module(*arguments) for module, *arguments in lookups]
    return _look_up_together(lookups)


def _is_call(lookup: Any) -> bool:
    return isinstance(lookup, (tuple, list)) and len(lookup) > 0


def _check(lookups: Sequence[Sequence[Any]]) -> list[bool]:
    """Return for each lookup whether its module trains; raise as ``look_up_together`` does."""
    trains: list[bool] = []
    for position, lookup in enumerate(lookups):
        if not _is_call(lookup) or not hasattr(lookup[0], "lookup_steps"):
            got = type(lookup[0] if _is_call(lookup) else lookup).__name__
            raise TypeError(
                f"lookups[{position}]: expected (module, *arguments) of a DynamicEmbedding, "
                f"DynamicEmbeddingBag or EmbeddingEngine, got {got}"
            )
        trains.append(lookup[0].training)
    if any(trains) and not all(trains):
        raise ValueError(
            f"lookups[{trains.index(False)}]: expected modules that all train or none does, got "
            f"one in eval() beside lookups[{trains.index(True)}], which trains"
        )
    return trains


def is_plain(module: Any) -> bool:
    """Return whether calling a module does nothing but its lookup: no hook, no other forward."""
    kind = type(module)
    owner: Any = next(base for base in kind.__mro__ if "lookup_steps" in vars(base))
    own = kind.forward is owner.forward and "forward" not in vars(module)
    return own and not any(
        getattr(module, f"_{name}") or getattr(module_hooks, f"_global_{name}") for name in _HOOKS
    )


@compiler.disable  # kernels read and change memory
def _look_up_together(lookups: Sequence[Sequence[Any]]) -> list[Any]:
    if not lookups:
        return []
    first: Any = lookups[0][0]
    process_group = first.current_groups()[0].process_group
    is_sharded = collectives.world_size(process_group) > 1
    if is_sharded and not first.training:
        return [module(*arguments) for module, *arguments in lookups]
    try:
        steps = [module.lookup_steps(*arguments) for module, *arguments in lookups]
        asked = list(map(next, steps))
        groups, features = _groups_together(lookups, asked, process_group)
    except Exception as error:
        announce_refusal(error, [lookup[0] for lookup in lookups])
        raise
    rows = iter(_look_up(groups, features, asked, first.training))
    outputs = [
        [[next(rows) for _ in group.layout.features] for group in part.groups] for part in asked
    ]
    return list(map(_finish, steps, outputs))


def _finish(steps: LookupSteps[_Result], outputs: list[list[Tensor]]) -> _Result:
    try:
        steps.send(outputs)
    except StopIteration as end:
        result: _Result = end.value
        return result
    raise AssertionError("it yields once")


def _features_of(asked: Sequence[Asked], process_group: ProcessGroup | None) -> tuple[Feature, ...]:
    """Return the features of all modules; that of an embedding is named after its table.

    Raises:
        ValueError: Their tables are sharded over several process groups.
    """
    features: list[Feature] = []
    for position, part in enumerate(asked):
        for group in part.groups:
            if group.process_group is not process_group:
                raise ValueError(
                    f"lookups[{position}]: expected tables that are sharded over the ranks of the "
                    "same process group as those of lookups[0]"
                )
            features += group.layout.features
    return tuple(f._replace(name=f.table.name) if f.name == "ids" else f for f in features)


_kept = KeptGroups()


def _groups_of(lookups: Sequence[Sequence[Any]], features: tuple[Feature, ...]) -> CurrentGroups:
    return _kept.of([lookup[0] for lookup in lookups], features)


def _groups_together(
    lookups: Sequence[Sequence[Any]],
    asked: Sequence[Asked],
    process_group: ProcessGroup | None,
) -> tuple[Sequence[LookupGroup], tuple[Feature, ...]]:
    """Return the groups of what several modules ask, and all features in their order.

    Raises:
        ValueError: Their tables are sharded over several process groups.
    """
    features = _features_of(asked, process_group)
    return _groups_of(lookups, features).of(lambda: features), features


def ask_together(lookups: Sequence[Sequence[Any]]) -> Asked:
    """Return what ``look_up_together`` would look up; nothing changes.

    Args:
        lookups: As for ``look_up_together``, one or more.

    Raises:
        Exception: As ``look_up_together``.
    """
    asked: list[Asked] = [next(module.lookup_steps(*given)) for module, *given in lookups]
    if len(asked) == 1:
        return asked[0]
    process_group = lookups[0][0].current_groups()[0].process_group
    groups, features = _groups_together(lookups, asked, process_group)
    joined, _ = _join_all(groups, features, asked)
    return Asked(groups, joined)


def _look_up(
    groups: Sequence[LookupGroup],
    features: Sequence[Feature],
    asked: Sequence[Asked],
    training: bool,
) -> list[Tensor]:
    """Return the rows of each feature, in their order."""
    joined, places = _join_all(groups, features, asked)
    found = look_up_groups(groups, joined, training)
    rows: list[Any] = [None] * len(features)
    for its, outputs in zip(places, found, strict=True):
        for position, output in zip(its, outputs, strict=True):
            rows[position] = output
    return rows


def _join_all(
    groups: Sequence[LookupGroup], features: Sequence[Feature], asked: Sequence[Asked]
) -> tuple[list[FeatureBags], list[list[int]]]:
    """Return the bags of each group, and the positions of its features among all."""
    number_of = {kind_of(group.layout.features[0]): number for number, group in enumerate(groups)}
    places: list[list[int]] = [[] for _ in groups]
    for position, feature in enumerate(features):
        places[number_of[kind_of(feature)]].append(position)
    parts = [(bags, i) for part in asked for bags in part.bags for i in range(len(bags))]
    return [_join([parts[position] for position in its]) for its in places], places


def _join(parts: Sequence[tuple[FeatureBags, int]]) -> FeatureBags:
    """Return features of several modules together.

    Args:
        parts: For each, the features of its module's group, and its position there.
    """
    if any(bags.details for bags, _ in parts):
        joined = FeatureBags.of([bags[i] for bags, i in parts])
    else:
        joined = FeatureBags([bags.ids[i] for bags, i in parts])
    for position, (bags, i) in enumerate(parts):
        if i in bags.occurrences:
            joined.occurrences[position] = bags.occurrences[i]
    return joined


__all__ = ["Asked", "LookupSteps", "ask_together", "is_plain", "look_up_together", "run_steps"]
