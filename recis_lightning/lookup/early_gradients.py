"""Gradients that travel as soon as a backward pass has left them, and not first at the step.

A message begins on all ranks with each backward pass: when every lookup that may get gradients has
them, else where the pass ends; it may have none. What has come is used where gradients are due, if
all ranks tell by their heads that it is what they have pending, neither more nor less. Otherwise
(a gradient was dropped since, a graph was used twice, ranks ran other passes) it is dropped, and
gradients are sent as without it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed

from recis_lightning.arguments import check_bool
from recis_lightning.distributed import collectives
from recis_lightning.distributed.ahead_channel import Begun, channel_of
from recis_lightning.distributed.digest import digest
from recis_lightning.distributed.heads import PAYLOAD_SIZE, Head, Kind, exchange_heads
from recis_lightning.distributed.joined_messages import Message, exchange_messages
from recis_lightning.distributed.process_group import ProcessGroup, is_initialized
from recis_lightning.lookup.exchange import Route
from recis_lightning.lookup.features import FeatureLayout
from recis_lightning.lookup.gradient_ledger import (
    LedgerEntry,
    call_after_backward,
    ledger_of,
    split_bits,
    stack_bits,
)
from recis_lightning.ops import backend
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.lock import TableLock, distinct_locks, write
from recis_lightning.table.pending_gradient import PendingGradient

Records = dict[PendingGradient, set[HashTable]]  # gradients, and the tables that they are for
PackSums = Callable[[Route, Records], Tensor]

_optimizer = attrgetter("optimizer")
_MOST_ENTRIES = 512
_MOST_SENT = 64  # messages without a step
_MOST_TOLD = (1 << 31) - 1  # of what a head has room for


class _Sent(NamedTuple):
    """Message that was begun.

    Attributes:
        begun: Its exchange; it answers which ranks send gradients of which entry, bool
            [num_ranks, num_entries], and what has come for each entry.
        told: Digest of the lookups, as the message's head has it.
        entries: The lookups.
        records: For each, this rank's gradients in the message.
        counts: For each, whether it is told how many ids they are of.
    """

    begun: Begun
    told: int
    entries: Sequence[LedgerEntry]
    records: Sequence[Records]
    counts: Sequence[bool]


class EarlyGradients:
    """Gradients of one process group that are on their way, or have come."""

    def __init__(self) -> None:
        self._sent: list[_Sent] = []
        self._is_void = False  # nothing of it can be used: gradients travel as they are due
        self._began = False  # in this backward pass
        self.num_used = 0

    def begin(
        self,
        process_group: ProcessGroup | None,
        pack: PackSums,
        within: FeatureLayout | None = None,
    ) -> None:
        """Send what a backward pass has left.

        Args:
            process_group: The ranks; None means all.
            pack: Returns the sums of a lookup's gradients, as they travel; of none, nothing.
            within: Lookup that has just got gradients, whose tables are locked: the pass goes on,
                and sends what there is if all lookups have got theirs. None means that it is over.
        """
        is_at_end = within is None
        entries = list(ledger_of(process_group).entries)
        began, self._began = self._began, self._began and not is_at_end
        if self._is_void or not entries or not _can_send(entries):
            return
        known = {record for sent in self._sent for of in sent.records for record in of}
        all_records = [entry.unsent() for entry in entries]
        fresh = [
            {record: tables for record, tables in of.items() if record not in known}
            for of in all_records
        ]
        if within is not None and not all(
            of or not entry.is_alive() for entry, of in zip(entries, all_records, strict=True)
        ):
            return
        if within is not None and not set(_locks(entries, fresh)) <= set(within.current_locks()):
            return  # they are taken in one order
        if began and not any(fresh):
            return
        pairs = zip(fresh, all_records, strict=True)
        is_twice = any(new and len(new) < len(of) for new, of in pairs)
        if is_twice or len(self._sent) >= _MOST_SENT:
            self._is_void = True
            return
        channel = channel_of(process_group)
        if not channel.is_open:
            channel.begin_none()  # it asks for it to be opened
            return
        self._began = not is_at_end
        told = digest([entry.number for entry in entries])
        begun = channel.begin(_exchange_of(entries, fresh, pack, told))
        assert begun is not None
        self._sent.append(_Sent(begun, told, entries, fresh, _counts(fresh)))

    def number(self, entries: Sequence[LedgerEntry], records: Sequence[Records]) -> int:
        """Return a number of the exchanges, if all that is pending has travelled; else 0.

        It is the same on ranks that began the same ones for the same lookups. These cannot be
        waited for here: a rank that began fewer learns of the others by the head that comes.

        Args:
            entries: The lookups that may have gradients.
            records: This rank's of each.
        """
        if self._is_void or not self._sent:
            return 0
        position = {entry: number for number, entry in enumerate(entries)}
        found: list[Records] = [{} for _ in entries]
        for sent in self._sent:
            if sent.begun.has_failed() or sent.counts != _counts(sent.records):
                return 0
            for entry, of in zip(sent.entries, sent.records, strict=True):
                if of and entry not in position:
                    return 0
                if of:
                    found[position[entry]].update(of)
        if found != list(records):
            return 0
        return 1 + digest([(sent.begun.number, sent.told) for sent in self._sent]) % _MOST_TOLD

    def answers(
        self,
        entries: Sequence[LedgerEntry],
        doing: Callable[[], str],
        process_group: ProcessGroup | None,
    ) -> list[Tensor]:
        """Return what has come for some lookups, by rank, as one exchange of them would.

        Args:
            entries: The lookups.
            doing: Returns what this rank does, for errors.
            process_group: The ranks; None means all.

        Raises:
            RuntimeError: A rank has gone; names it.
        """
        come = [(sent.entries, *sent.begun.wait(doing, process_group)) for sent in self._sent]
        self.num_used += 1
        return [_joined(entry, come) for entry in entries]

    def clear(self) -> None:
        """Forget all messages: what was pending has travelled, by this way or the other."""
        self._sent, self._is_void = [], False


def _joined(entry: LedgerEntry, come: Iterable[tuple[Any, ...]]) -> Tensor:
    """Return what has come for a lookup in all messages, by rank."""
    parts: dict[int, Tensor] = {}
    for entries, sends, answers in come:
        number = entries.index(entry) if entry in entries else -1
        if number in answers:
            senders = np.flatnonzero(sends[:, number]).tolist()
            sizes = [entry.route.first_received[rank] for rank in senders]
            if len(senders) == len(sends):
                answer: Tensor = answers[number]
                return answer
            parts.update(zip(senders, answers[number].split(sizes), strict=True))
    return torch.cat([parts[rank] for rank in sorted(parts)])


def _exchange_of(
    entries: Sequence[LedgerEntry], records: Sequence[Records], pack: PackSums, told: int
) -> Callable[[ProcessGroup], Any]:
    """Add gradients up; return what sends the sums of all lookups that any rank has some for."""

    def add_up() -> list[Tensor]:
        return [pack(entry.route, of) for entry, of in zip(entries, records, strict=True)]

    sums = write(_locks(entries, records), add_up)
    routes = [entry.route for entry in entries]
    has = list(map(bool, records))

    def work(carrier: ProcessGroup) -> tuple[Any, dict[int, Tensor]]:
        doing: Callable[[], str] = lambda: "sends gradients after a backward pass"  # noqa: E731
        with backend.region("recis::send_early"):
            bits = stack_bits(has, size=PAYLOAD_SIZE)
            head = Head(Kind.AHEAD, told, doing)
            payloads = exchange_heads(head, bits, carrier).payloads
            sends = split_bits(payloads, 1, len(has))[:, 0]
            used = np.flatnonzero(sends.any(0)).tolist()
            messages = [_message(routes[i], sums[i], has[i], sends[:, i]) for i in used]
            answers = exchange_messages(messages, doing, carrier) if used else []
        return sends, dict(zip(used, answers, strict=True))

    return work


def _locks(entries: Sequence[LedgerEntry], records: Sequence[Records]) -> Sequence[TableLock]:
    """Return the locks of the tables of lookups that have gradients."""
    layouts = [entry.route.layout for entry, of in zip(entries, records, strict=True) if of]
    return distinct_locks(lock for layout in layouts for lock in layout.current_locks())


def _message(route: Route, sums: Tensor, has_any: bool, sends: Any) -> Message:
    num_received = (np.array(route.first_received) * sends).tolist()
    return Message(sums, num_received, route.first_sent if has_any else [0] * len(route.num_sent))


def _counts(records: Sequence[Records]) -> list[bool]:
    return [any(map(counts_ids, of.values())) for of in records]


def counts_ids(tables: set[HashTable]) -> bool:
    """Return whether the optimizer of any table asks how many ids its gradients are of."""
    optimizers = set(map(_optimizer, tables))
    return any(getattr(optimizer, "cow_clip", None) is not None for optimizer in optimizers)


def _can_send(entries: Sequence[LedgerEntry]) -> bool:
    """Return whether the gradients of lookups travel early: those of tables on the CPU."""
    return len(entries) <= _MOST_ENTRIES and all(
        entry.route.layout.device.type == "cpu" and not backend.is_async(entry.route.layout.device)
        for entry in entries
    )


_early: weakref.WeakKeyDictionary[Any, tuple[Any, EarlyGradients]] = weakref.WeakKeyDictionary()


def early_of(process_group: ProcessGroup | None) -> EarlyGradients:
    """Return the early gradients of a process group that is there.

    Args:
        process_group: The group; None means all ranks.
    """
    group = process_group or distributed.distributed_c10d._get_default_group()
    if group not in _early:
        given = None if process_group is None else weakref.ref(process_group)
        _early[group] = given, EarlyGradients()
    return _early[group][1]


class _Overlap:
    """Whether gradients travel early in this process, and how they are packed."""

    def __init__(self) -> None:
        self.is_on = False
        self.pack: PackSums | None = None


_OVERLAP = _Overlap()


def set_pack(pack: PackSums) -> None:
    """Register who adds gradients up and packs them."""
    _OVERLAP.pack = pack
    call_after_backward(_end_backward)


def note_gradients(layout: FeatureLayout) -> None:
    """Send gradients if all lookups have theirs; a backward pass has just left one's.

    Args:
        layout: Of that lookup; its tables are locked.
    """
    if _OVERLAP.is_on and _OVERLAP.pack is not None:
        process_group = layout.process_group
        early_of(process_group).begin(process_group, _OVERLAP.pack, layout)


def _end_backward() -> None:
    """Send gradients of all process groups; a backward pass has ended."""
    if not _OVERLAP.is_on or _OVERLAP.pack is None or not is_initialized():
        return
    default = distributed.distributed_c10d._get_default_group()
    for group, (given, early) in list(_early.items()):
        if given is not None or group is default:
            process_group = None if given is None else given()
            if collectives.world_size(process_group) > 1:
                early.begin(process_group, _OVERLAP.pack)


def overlap_backward(enabled: bool = True) -> bool:
    """Let gradients of sharded tables travel from the backward pass on, in this process.

    A thread sends them in a process group of its own, while DDP's gradients travel and dense
    parameters are stepped; the optimizer of tables waits for them at its step. What it applies is
    the same to the bit. If gradients are dropped or come twice before the step, or ranks run other
    passes, they travel at the step, as without this.

    Call it on all ranks. ``Lookahead(gradients=True)`` does so in a Trainer.

    Args:
        enabled: Whether they travel early; they do not unless this is called.

    Returns:
        What was set before.

    Raises:
        TypeError: ``enabled`` is no bool.

    Example:
        >>> overlap_backward(), overlap_backward(False)
        (False, True)
    """
    before, _OVERLAP.is_on = _OVERLAP.is_on, check_bool("enabled", enabled)
    return before


__all__ = [
    "EarlyGradients",
    "Records",
    "counts_ids",
    "early_of",
    "note_gradients",
    "overlap_backward",
    "set_pack",
]
