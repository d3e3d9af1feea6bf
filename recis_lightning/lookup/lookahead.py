"""Lookups of the next batch, begun while this one computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recis_lightning import compiler
from recis_lightning.distributed import collectives
from recis_lightning.lookup.prepared import can_prepare, prepared_of, refuse_to_prepare
from recis_lightning.lookup.together import ask_together, is_plain


@compiler.disable  # a kernel reads the ids
def look_ahead(*lookups: Sequence[Any]) -> int:
    """Begin training lookups of the next batch: their ids are deduplicated and sent to the owners.

    Call it with the next batch before this one's forward pass. A thread does the work, and sends
    its messages in a process group of its own. No table has a part in it: ids are found, admitted
    and inserted in the lookups themselves, as without it, and results are the same to the bit. A
    lookup uses what was begun if it has the same ids on every rank, by value; else that is dropped.
    So it does no harm to skip the batch, to change it, to evaluate before it, or to call this on
    some of the ranks only.

    Each lookup must be called by itself or with others as it is given here. Nothing happens on one
    rank, in evaluation, for tables or ids on a GPU, and before the first training lookup.

    Args:
        lookups: For each a sequence: a ``DynamicEmbedding``, ``DynamicEmbeddingBag`` or
            ``EmbeddingEngine``, and what it will be called with; or, for one call of
            ``look_up_together``, a sequence of these. The same on all ranks.

    Returns:
        How many were begun.

    Raises:
        TypeError: A lookup is none of these (names its position).

    Example:
        >>> from recis_lightning import DynamicEmbedding
        >>> import torch
        >>> user = DynamicEmbedding(4, name="user")
        >>> batches = [torch.tensor([5, 6]), torch.tensor([6, 7])]
        >>> for batch, following in zip(batches, [*batches[1:], None]):
        ...     begun = 0 if following is None else look_ahead((user, following))
        ...     rows = user(batch)  # and the loss, backward, step
    """
    joint = [_as_joint(position, lookup) for position, lookup in enumerate(lookups)]
    return sum(_begin(part) for parts in joint for part in parts)


def _as_joint(position: int, lookup: Any) -> list[Sequence[Sequence[Any]]]:
    """Return lookups as sequences of those that are done together."""
    is_sequence = isinstance(lookup, (tuple, list)) and len(lookup) > 0
    if is_sequence and hasattr(lookup[0], "lookup_steps"):
        return [[lookup]]
    parts = list(lookup) if is_sequence else [lookup]
    for part in parts:
        if not isinstance(part, (tuple, list)) or not part or not hasattr(part[0], "lookup_steps"):
            got = part[0] if isinstance(part, (tuple, list)) and part else part
            raise TypeError(
                f"lookups[{position}]: expected (module, *arguments) of a DynamicEmbedding, "
                "DynamicEmbeddingBag or EmbeddingEngine, or a sequence of these for "
                f"look_up_together, got {type(got).__name__}"
            )
    if all(is_plain(part[0]) for part in parts):
        return [parts]
    return [[part] for part in parts]  # look_up_together calls them one after the other


def _begin(lookups: Sequence[Sequence[Any]]) -> bool:
    """Begin lookups that are done together; return whether their ids are on their way."""
    first = lookups[0][0]
    if not all(module.training for module, *_ in lookups):
        return False
    process_group = first.current_groups()[0].process_group
    if collectives.world_size(process_group) == 1:
        return False
    try:
        groups, bags = ask_together(lookups)
    except Exception:  # the lookup itself says so, on all ranks
        refuse_to_prepare(process_group)
        return False
    if not can_prepare(groups, bags):
        return False
    return prepared_of(process_group).begin(groups, bags)


__all__ = ["look_ahead"]
