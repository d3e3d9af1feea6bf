"""Agreement of ranks on a lookup: before any ids travel, all know that they look up the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from recis_lightning.distributed import collectives
from recis_lightning.distributed.ahead_channel import channel_of
from recis_lightning.distributed.digest import digest
from recis_lightning.distributed.heads import (
    PAYLOAD_SIZE,
    Head,
    Kind,
    ReceivedHeads,
    exchange_heads,
)
from recis_lightning.distributed.process_group import ProcessGroup, message_device
from recis_lightning.lookup.exchange import Counts
from recis_lightning.lookup.features import FeatureLayout, listed
from recis_lightning.lookup.gradient_ledger import ledger_of
from recis_lightning.ops.async_copy import to_device_async

_NAMED = 6  # features that an error lists


class Group(Protocol):
    """Group of features of one device, dtype and dim."""

    layout: FeatureLayout
    process_group: ProcessGroup | None


def agree_on_lookup(
    groups: Sequence[Group], training: bool, counts: Sequence[Counts]
) -> list[Counts]:
    """Return how many ids of each source come from each rank, once all ranks look up the same.

    Args:
        groups: What is looked up.
        training: Whether the module trains.
        counts: For each group int64 [num_ranks, num_sources], how many ids go to each rank.

    Returns:
        As ``read_counts``.

    Raises:
        RuntimeError: Another rank does something else; says which rank does what.
    """
    process_group = groups[0].process_group
    payload = counts_in_head(counts)
    head = _head_of(groups, training)
    heads = exchange_heads(head, payload, process_group)
    if training:
        if _hear(groups, heads).any():  # those who would use what came ahead told no counts
            heads = exchange_heads(_head_of(groups, training), payload, process_group)
    elif (heads.kinds == Kind.FINISHED).any():
        exchange_heads(head._replace(kind=Kind.ANSWER), None, process_group)
    return read_counts(groups, heads, counts)


def agree_on_prepared(groups: Sequence[Group], numbers: Sequence[int]) -> int:
    """Return which exchange all ranks can use for a training lookup, once all do the same.

    Args:
        groups: What is looked up.
        numbers: Those of the exchanges in the channel of the process group that this rank can use:
            one or more, ascending; at most PAYLOAD_SIZE.

    Returns:
        The first that all ranks can use; 0 if there is none.

    Raises:
        RuntimeError: Another rank does something else; says which rank does what.
    """
    head = _head_of(groups, training=True, used=numbers[0])
    heads = exchange_heads(head, np.array(numbers, np.int64), groups[0].process_group)
    if not _hear(groups, heads).all():
        return 0
    offered = [set(line.tolist()) for line in heads.payloads]
    return min(set.intersection(*offered) - {0}, default=0)


def agree_ahead(
    groups: Sequence[Group],
    told: int,
    describe: Callable[[], str],
    channel: ProcessGroup,
    counts: Sequence[Counts],
) -> list[Counts]:
    """Return how many ids of each source come from each rank, in a channel.

    Args:
        groups: What will be looked up.
        told: Digest of that, the same on all ranks.
        describe: Returns what this rank does, for errors.
        channel: Group that carries the channel's messages.
        counts: As for ``agree_on_lookup``.

    Raises:
        RuntimeError: Another rank does something else; says which rank does what.
    """
    heads = exchange_heads(Head(Kind.AHEAD, told, describe), counts_in_head(counts), channel)
    return read_counts(groups, heads, counts, channel)


def _head_of(groups: Sequence[Group], training: bool, used: int = 0) -> Head:
    process_group = groups[0].process_group
    ledger = ledger_of(process_group)
    return Head(
        Kind.TRAINING if training else Kind.EVALUATION,
        lookup_digest(groups, training),
        lambda: describe(groups, training),
        ledger.num_lookups,
        ledger.oldest(),
        channel_of(process_group).tell(used),
    )


def _hear(groups: Sequence[Group], heads: ReceivedHeads) -> Any:
    """Take note of heads of a training lookup; return what each rank would use, int64."""
    process_group = groups[0].process_group
    ledger_of(process_group).drop_before(int(heads.oldest.min()))
    return channel_of(process_group).hear(heads.ahead, process_group)


def read_counts(
    groups: Sequence[Group],
    heads: ReceivedHeads,
    counts: Sequence[Counts],
    channel: ProcessGroup | None = None,
) -> list[Counts]:
    """Return how many ids come from each rank, for each group, once all ranks agree.

    Args:
        groups: What is looked up.
        heads: Of all ranks.
        counts: How many go to each rank, for each group.
        channel: Group that carries a message of their own; None means the groups' own.

    Returns:
        For each group int64 [num_ranks, num_sources]; or, where the counts of all do not fit into
        a head, [num_ranks, 1], for all sources together.
    """
    told = _told(counts)
    if told is None:
        return _exchange_counts(groups, counts, channel)
    received = heads.payloads[:, : sum(part.shape[1] for part in told)]
    return np.split(received, _ends(told), axis=1)


def counts_in_head(counts: Sequence[Counts]) -> Counts | None:
    """Return what a head has of counts, int64 [num_ranks, m]; None for nothing."""
    told = _told(counts)
    return None if told is None else np.concatenate(told, 1)


def _told(counts: Sequence[Counts]) -> Sequence[Counts] | None:
    """Return the counts of each group, or their sums, whichever fit into a head."""
    if sum(part.shape[1] for part in counts) <= PAYLOAD_SIZE:
        return counts
    return [part.sum(1, keepdims=True) for part in counts] if len(counts) <= PAYLOAD_SIZE else None


def _ends(counts: Sequence[Counts]) -> Any:
    return np.cumsum([part.shape[1] for part in counts])[:-1]


def _exchange_counts(
    groups: Sequence[Group], counts: Sequence[Counts], channel: ProcessGroup | None
) -> list[Counts]:
    """Exchange the counts of more groups than a head has room for, in a message of their own."""
    ones, process_group = [1] * len(counts[0]), channel or groups[0].process_group
    message = to_device_async(np.concatenate(counts, 1), message_device(process_group))
    names = [table.name for group in groups for table in group.layout.tables]
    answer = collectives.all_to_all(
        message, ones, ones, lambda: f"looks up tables {listed(names)}", process_group
    )
    return np.split(answer.cpu().numpy(), _ends(counts), axis=1)


def lookup_digest(groups: Sequence[Group], training: bool) -> int:
    """Return a number by which ranks recognise what is looked up, and how."""
    told: list[Any] = [group.layout.signature for group in groups]
    if training:
        learns = torch.is_grad_enabled()
        told.append(torch._C._current_graph_task_id() == -1)  # a lookup, not one made again
        for group in groups:
            layout = group.layout
            told += [layout.counts_occurrences, learns and layout.trains()]
    return digest(told)


def describe(groups: Sequence[Group], training: bool) -> str:
    """Describe a lookup, for errors: "looks up ids (table 't', mode none) in training"."""
    features = [feature for group in groups for feature in group.layout.features]
    named = [f"{f.name} (table {f.table.name!r}, mode {f.mode})" for f in features[:_NAMED]]
    if len(features) > _NAMED:
        named.append(f"{len(features) - _NAMED} more")
    mode = "evaluation"
    if training:
        mode = "training" if torch.is_grad_enabled() else "training without gradients"
        if torch._C._current_graph_task_id() != -1:
            mode += ", again in a backward pass"
        frozen = [
            table.name
            for group in groups
            for table, trains in zip(group.layout.tables, group.layout.trains(), strict=True)
            if not trains
        ]
        mode += f", with tables {frozen} frozen" if frozen else ""
    rounded = [
        table.name
        for group in groups
        for table in group.layout.tables
        if table.exchange_dtype is not None
    ]
    mode += f", with exchange_dtype 'bfloat16' of {listed(rounded)}" if rounded else ""
    per_node = {table.ranks_per_node for group in groups for table in group.layout.tables}
    if per_node != {None}:
        mode += f", with ranks_per_node {', '.join(sorted(map(str, per_node)))}"
    return f"looks up {', '.join(named)} in {mode}"


__all__ = [
    "Counts",
    "agree_ahead",
    "agree_on_lookup",
    "agree_on_prepared",
    "counts_in_head",
    "describe",
    "lookup_digest",
    "read_counts",
]
