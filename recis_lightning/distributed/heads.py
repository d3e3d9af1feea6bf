"""Heads: messages of one size by which ranks see that they are about to do the same.

A message that a rank does not expect would be taken for another one, or end its process where the
sizes differ. So every exchange begins with a head, which all ranks send to all and which always has
one size. If the heads differ, all ranks see it at once, and raise the same error.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed

from recis_lightning.distributed.lost_ranks import name_ranks, naming_lost_ranks
from recis_lightning.distributed.process_group import (
    ProcessGroup,
    communicator,
    global_ranks,
    message_device,
    world_size,
)
from recis_lightning.distributed.stop_request import STOP_REQUEST
from recis_lightning.ops import backend
from recis_lightning.ops.async_copy import to_device_async

_NUM_FIELDS = 5
PAYLOAD_SIZE = 59  # numbers that travel with a head
_SIZE = _NUM_FIELDS + PAYLOAD_SIZE
_KIND_BITS = 8  # of a field that has a signal above them


class Kind(IntEnum):
    """Kind of an exchange."""

    FAILED = 1  # no exchange follows: the rank raises
    COLLECTIVE = 2
    TRAINING = 3
    EVALUATION = 4
    FINISHED = 5  # a rank that has no more evaluation lookups, and answers those of others
    ANSWER = 6
    GRADIENTS = 7
    AHEAD = 8  # in a channel of its own: see ``ahead_channel``


class Head(NamedTuple):
    """Head of an exchange.

    Attributes:
        kind: Its kind.
        digest: Number of what it is about, the same on all ranks.
        describe: Returns what the rank does, for errors: "steps SparseSGD".
        num_lookups: How many training lookups there were before, the same on all ranks.
        oldest: Number of the oldest of them that this rank may still have gradients for.
        ahead: What ``AheadChannel.tell`` returned.
    """

    kind: Kind
    digest: int
    describe: Callable[[], str]
    num_lookups: int = 0
    oldest: int = 0
    ahead: int = 0


class ReceivedHeads(NamedTuple):
    """Heads of all ranks.

    Attributes:
        kinds: int64 [num_ranks].
        digests: int64 [num_ranks].
        oldest: int64 [num_ranks].
        ahead: int64 [num_ranks].
        payloads: int64 [num_ranks, PAYLOAD_SIZE].
    """

    kinds: npt.NDArray[np.int64]
    digests: npt.NDArray[np.int64]
    oldest: npt.NDArray[np.int64]
    ahead: npt.NDArray[np.int64]
    payloads: npt.NDArray[np.int64]


def exchange_heads(
    head: Head,
    payload: npt.NDArray[np.int64] | None = None,
    process_group: ProcessGroup | None = None,
) -> ReceivedHeads:
    """Exchange heads with all ranks of a group.

    Args:
        head: This rank's.
        payload: int64 [m] for all ranks or [num_ranks, m], a line for each; m is at most
            PAYLOAD_SIZE.
        process_group: The group; None means all ranks.

    Raises:
        RuntimeError: Another rank does something else, or has failed; says which rank does what,
            and is raised on every rank. Or a rank has gone.
    """
    num_ranks = world_size(process_group)
    lines = np.zeros((num_ranks, _SIZE), np.int64)
    kind_and_signal = head.kind | STOP_REQUEST.own << _KIND_BITS
    fields = kind_and_signal, head.digest, head.num_lookups, head.oldest, head.ahead
    lines[:, :_NUM_FIELDS] = fields
    if payload is not None:
        lines[:, _NUM_FIELDS : _NUM_FIELDS + payload.shape[-1]] = payload
    sent = to_device_async(lines, message_device(process_group))
    received: Tensor = torch.empty_like(sent)
    with (
        naming_lost_ranks(head.describe, process_group),
        backend.region("recis::exchange_heads", lambda: lines.nbytes - lines[0].nbytes),
    ):
        distributed.all_to_all_single(received, sent, group=communicator(process_group))
        heads = received.cpu().numpy()
    if process_group is None:  # of other groups not all ranks hear
        STOP_REQUEST.known = int(heads[:, 0].max()) >> _KIND_BITS
    heads[:, 0] &= (1 << _KIND_BITS) - 1
    if _differ(heads[:, :3]):
        _raise_difference(head, process_group)
    kinds, digests, _, oldest, ahead = heads[:, :_NUM_FIELDS].T
    return ReceivedHeads(kinds, digests, oldest, ahead, heads[:, _NUM_FIELDS:])


def announce_failure(
    error: Exception, doing: str, process_group: ProcessGroup | None = None
) -> None:
    """Let the other ranks fail with this one, which raises an error before an exchange.

    Args:
        error: What it raises.
        doing: What it was about to do: "looks up tables ['user']".
        process_group: Whose ranks are told; None means all.
    """
    text = f"{doing} and failed with {type(error).__name__}: {error}"
    try:
        exchange_heads(Head(Kind.FAILED, 0, lambda: text), None, process_group)
    except RuntimeError:
        return  # that of the other ranks; this one has its own


def _differ(heads: npt.NDArray[np.int64]) -> bool:
    """Return whether heads (kind, digest, count) differ; all ranks have the same, and agree."""
    kinds = heads[:, 0]
    if (kinds == Kind.FAILED).any():
        return True
    going_on = heads[kinds != Kind.FINISHED]
    if not len(going_on):
        return False
    if len(going_on) < len(heads) and (going_on[:, 0] != Kind.EVALUATION).any():
        return True
    return bool((going_on != going_on[0]).any())


def _raise_difference(own: Head, process_group: ProcessGroup | None) -> None:
    texts: list[Any] = [None] * world_size(process_group)
    with naming_lost_ranks(own.describe, process_group):
        told = own.describe(), own.num_lookups
        distributed.all_gather_object(texts, told, group=communicator(process_group))
    distinct = {text for text, _ in texts}
    ranks_of: dict[str, list[int]] = {}
    for rank, (text, count) in zip(global_ranks(process_group), texts, strict=True):
        text = text if len(distinct) > 1 else f"{text} (after {count} training lookups)"
        ranks_of.setdefault(text, []).append(rank)
    parts = [f"{name_ranks(ranks)} {text}" for text, ranks in ranks_of.items()]
    raise RuntimeError(
        f"ranks do different things: {'; '.join(parts)}. All ranks must look up the same features "
        "in the same order and mode, with empty ids where a rank has none, and step and evict at "
        "the same places"
    )


__all__ = [
    "PAYLOAD_SIZE",
    "Head",
    "Kind",
    "ReceivedHeads",
    "announce_failure",
    "exchange_heads",
]
