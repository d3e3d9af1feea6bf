"""All-to-all of gradients: those of all lookups of a step travel to the owners in one message.

All ranks send at the same time, for the same lookups in the same order, and nothing for those that
their loss did not use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.distributed import collectives
from recis_lightning.distributed.ahead_channel import channel_of
from recis_lightning.distributed.digest import digest
from recis_lightning.distributed.heads import (
    PAYLOAD_SIZE,
    Head,
    Kind,
    announce_failure,
    exchange_heads,
)
from recis_lightning.distributed.joined_messages import Message, exchange_messages
from recis_lightning.distributed.message_memory import MessageMemory
from recis_lightning.distributed.process_group import ProcessGroup, is_initialized
from recis_lightning.lookup.early_gradients import (
    EarlyGradients,
    counts_ids,
    early_of,
    set_pack,
)
from recis_lightning.lookup.exchange import Route
from recis_lightning.lookup.exchange_dtype import pack_gradients, unpack_gradients
from recis_lightning.lookup.features import FeatureLayout, listed, point_to_rows
from recis_lightning.lookup.gradient_ledger import (
    BITS,
    GradientLedger,
    LedgerEntry,
    UnsentGradient,
    ledger_of,
    split_bits,
    stack_bits,
)
from recis_lightning.lookup.gradient_sums import sum_gradients, with_zeros
from recis_lightning.lookup.lost_rows import check_rows
from recis_lightning.lookup.node_gradients import forward_gradients
from recis_lightning.lookup.owned_ids import point_to_data
from recis_lightning.lookup.row_source import OutputGradients
from recis_lightning.lookup.table_bits import TableBits
from recis_lightning.ops import backend
from recis_lightning.ops import layout as fields
from recis_lightning.ops.embedding_bag import Plan
from recis_lightning.ops.layout import UNKNOWN
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.lock import distinct_locks, write
from recis_lightning.table.pending_gradient import PendingGradient

_pending, _process_group = map(attrgetter, ("pending", "process_group"))
_NUMBERS = (PAYLOAD_SIZE - 1) // 4  # in a head, for the bits of each kind
_sums = MessageMemory()
_WINDOW = BITS * _NUMBERS  # lookups that a head has bits for


def send_gradients(
    tables: Sequence[HashTable], purpose: Callable[[], str], is_due: bool
) -> list[bool] | None:
    """Send all gradients that have not travelled: ``table.gradient_exchange.GradientExchange``.

    Raises:
        RuntimeError: Another rank does something else, or ran no backward pass where this one did,
            or a table lost rows that a gradient is for; says which rank, and is raised on every
            rank.
    """
    if not is_initialized():
        return None
    with backend.region("recis::send_gradients"):
        return _send_gradients(tables, purpose, is_due)


def _send_gradients(
    tables: Sequence[HashTable], purpose: Callable[[], str], is_due: bool
) -> list[bool] | None:
    waiting: list[bool] | None = None
    for process_group in dict.fromkeys(map(_process_group, tables)):
        ledger = ledger_of(process_group)
        has_ranks = collectives.world_size(process_group) > 1
        if not (is_due and has_ranks) and not ledger.has(tables):
            continue
        told, kept = purpose(), list[bool]()
        # Whose gradients travel now belong to the same tables afterwards.
        waiting = list(map(bool, map(_pending, tables)))
        entries = ledger.entries
        for first in range(0, max(len(entries), 1), _WINDOW):
            window = entries[first : first + _WINDOW]
            are_kept, waiting = _send_window(ledger, window, told, first, process_group, waiting)
            kept += are_kept
        ledger.keep(kept)
        ledger.note_sent()
        early_of(process_group).clear()
    return waiting


def _send_window(
    ledger: GradientLedger,
    entries: Sequence[LedgerEntry],
    purpose: str,
    first: int,
    process_group: ProcessGroup | None,
    waiting: list[bool],
) -> tuple[list[bool], list[bool]]:
    """Send the gradients of some lookups.

    Returns:
        For each lookup whether any rank may have more, and for each table whether any rank's
        ``waiting`` is set.
    """
    records = [entry.unsent() for entry in entries]
    try:
        for entry, unsent in zip(entries, records, strict=True):
            for record, for_tables in unsent.items():
                in_order = (t for t in entry.route.layout.tables if t in for_tables)
                record.check_unchanged(next(in_order).name)
    except RuntimeError as error:
        announce_failure(error, purpose, process_group)
        raise
    ran_backward = ledger.ran_backward or any(records)
    tables = TableBits(waiting, _NUMBERS, process_group)
    of_lookups = stack_bits(
        [entry.is_alive() for entry in entries],
        [bool(unsent) for unsent in records],
        [entry.is_stale() for entry in entries],
        size=_NUMBERS,
    )
    bits = np.append(of_lookups, tables.numbers())
    told = digest((purpose, first, len(waiting)))
    early, channel = early_of(process_group), channel_of(process_group)
    is_whole = len(entries) == len(ledger.entries)
    ahead = channel.tell(early.number(entries, records) if is_whole else 0)
    head = Head(Kind.GRADIENTS, told, lambda: purpose, ledger.num_lookups, 0, ahead)
    heads = exchange_heads(head, np.append(ran_backward, bits), process_group)
    numbers = channel.hear(heads.ahead, process_group)
    come = early if numbers.all() and (numbers == numbers[0]).all() else None
    received = heads.payloads[:, 1 : 1 + len(bits)]
    of_entries, of_tables = received[:, : 3 * _NUMBERS], received[:, 3 * _NUMBERS :]
    alive, sends, stale = split_bits(of_entries, 3, len(entries)).swapaxes(0, 1)
    of_any = tables.of_any(of_tables)
    ranks = collectives.global_ranks(process_group)
    _check_backward(entries, sends, heads.payloads[:, 0], purpose, ranks)
    check_rows(entries, records, sends, stale, process_group)
    used = np.flatnonzero(sends.any(0)).tolist()
    for device in dict.fromkeys(entries[i].route.layout.device for i in used):
        chosen = [i for i in used if entries[i].route.layout.device == device]
        some, of = [entries[i] for i in chosen], [records[i] for i in chosen]
        beside = [tables.message(device)] if of_any is None else []
        answers = _exchange(some, of, sends[:, chosen], purpose, beside, come)
        for entry in some:
            entry.note_received()
        of_any = tables.read(answers[0]) if beside else of_any
    return alive.any(0).tolist(), of_any or tables.ask(lambda: purpose)


def _check_backward(
    entries: Sequence[LedgerEntry],
    sends: npt.NDArray[Any],
    ran: Any,
    purpose: str,
    ranks: Sequence[int],
) -> None:
    if not sends.any() or ran.all():
        return
    without = np.flatnonzero(ran == 0).tolist()
    sender, number = np.argwhere(sends)[0].tolist()
    raise RuntimeError(
        f"rank {ranks[without[0]]} {purpose} without a backward pass since its last step, and rank "
        f"{ranks[sender]} ran one, for tables {_names(entries[number].route.layout)}; run as many "
        "backward passes on all ranks (what a loss uses may differ)"
    )


def _names(layout: FeatureLayout) -> str:
    return listed([table.name for table in layout.tables])


def _exchange(
    entries: Sequence[LedgerEntry],
    records: Sequence[dict[PendingGradient, set[HashTable]]],
    sends: npt.NDArray[Any],
    purpose: str,
    beside: Sequence[Message],
    early: EarlyGradients | None,
) -> Sequence[Tensor]:
    """Send the gradients of lookups of tables on one device.

    Args:
        entries: The lookups.
        records: For each, this rank's gradients and the tables that they are for.
        sends: bool [num_ranks, num_entries], whether the rank has gradients for it.
        purpose: What the rank does next.
        beside: What travels with them.
        early: Gradients that have travelled already; None if they have not.

    Returns:
        For each of ``beside`` what has come.
    """
    layouts, come = [entry.route.layout for entry in entries], None
    if early is not None:
        come = early.answers(entries, lambda: purpose, layouts[0].process_group)
    locks = layouts[0].current_locks()
    if len(layouts) > 1:
        locks = distinct_locks(lock for layout in layouts for lock in layout.current_locks())
    routes = [entry.route for entry in entries]
    return write(locks, _exchange_locked, routes, records, sends, purpose, beside, come)


def _exchange_locked(
    routes: Sequence[Route],
    records: Sequence[dict[PendingGradient, set[HashTable]]],
    sends: npt.NDArray[Any],
    purpose: str,
    beside: Sequence[Message],
    early: Sequence[Tensor] | None,
) -> Sequence[Tensor]:
    pairs = zip(routes, records, sends.T, strict=True)
    messages = [] if early is not None else [_message(*its) for its in pairs]
    process_group = routes[0].layout.process_group
    answers: Sequence[Tensor] = ()
    if messages or beside:
        answers = exchange_messages([*messages, *beside], lambda: purpose, process_group)
    first = answers[: len(routes)] if early is None else early
    come = [
        _complete(unpack_gradients(answer, route.layout.exchange_dtype), route, does_send)
        for answer, route, does_send in zip(first, routes, sends.T, strict=True)
    ]
    forward_gradients(routes, come, sends, purpose)
    for route, of, gradients in zip(routes, records, come, strict=True):
        # What was sent is gone from here, whatever comes next.
        for record, tables in of.items():
            for table in tables:
                table.pending.remove(record)
        _leave_pending(route, gradients, {table for tables in of.values() for table in tables})
    return answers[len(messages) :]


def _message(
    route: Route, records: dict[PendingGradient, set[HashTable]], sends: npt.NDArray[Any]
) -> Message:
    """Return the message of a lookup's gradients, which is empty if this rank has none.

    Args:
        route: Of the lookup.
        records: This rank's gradients.
        sends: bool [num_ranks], which ranks have some.
    """
    num_sent = route.first_sent if records else [0] * len(route.num_sent)
    num_received = (np.array(route.first_received) * sends).tolist()
    return Message(_packed(route, records), num_received, num_sent)


def _packed(route: Route, records: dict[PendingGradient, set[HashTable]]) -> Tensor:
    """Return the sums of a lookup's gradients as they travel, of no gradients none."""
    layout = route.layout
    if records:
        sums = _sums_of(route, records)
        if route.hop is not None:
            sums = sums[route.hop.order]
    else:
        sums = torch.empty(0, layout.embedding_dim + 1, device=layout.device)
    return pack_gradients(sums, layout.exchange_dtype)


def _complete(gradients: Tensor, route: Route, sends: npt.NDArray[Any]) -> Tensor:
    """Return what has come first for a lookup, with zeros for ranks that have sent nothing."""
    if sends.all():
        return gradients
    return with_zeros(gradients, route.first_received, sends)


def _sums_of(route: Route, records: dict[PendingGradient, set[HashTable]]) -> Tensor:
    """Return this rank's gradients of each id of a lookup, float32 [u, embedding_dim + 1].

    They are added up in the order of the lookup and divided by the number of ranks: the owner's sum
    over ranks is the average that DDP takes of dense ones. Behind each stands whether it is one:
    without a gradient a row is left alone, with one of zeros its moments decay. For an optimizer
    that asks it is the number of ids that it is of.
    """
    layout, size = route.layout, sum(route.num_sent)
    width = layout.embedding_dim + 1
    sums = _sums.empty(size, width, torch.float32, layout.device).zero_()
    plans: list[Plan] = []
    flags: list[Tensor | None] = []
    is_counted = any(counts_ids(tables) for tables in records.values())
    for record, tables in records.items():
        unsent = record.unsent
        assert isinstance(unsent, UnsentGradient)
        gradients = _of_tables(unsent.gradients, layout, tables)
        plans.append(gradients.plan)
        inverse = unsent.fetched.rows
        if is_counted:
            sums[:, -1] += _num_ids(gradients, layout, inverse, size)
        else:
            flags.append(_has_gradient(gradients, layout, inverse, size))
    plan = plans[0] if len(plans) == 1 else np.concatenate(plans)
    if size and len(plan):
        sum_gradients(plan, sums, 1 / len(route.num_sent))
    if is_counted:
        return sums
    given = [flag for flag in flags if flag is not None]
    if len(given) < len(flags):
        sums[:, -1] = 1.0
    else:
        sums[:, -1] = torch.stack(given).any(0).to(sums.dtype)
    return sums


def _of_tables(
    gradients: OutputGradients, layout: FeatureLayout, tables: set[HashTable]
) -> OutputGradients:
    """Return the gradients of the features of some tables; those of others were dropped."""
    kept = [layout.feature_tables[feature] in tables for feature in gradients.features]
    if all(kept):
        return gradients
    features = [f for f, is_kept in zip(gradients.features, kept, strict=True) if is_kept]
    return gradients._replace(features=features, plan=gradients.plan[np.array(kept, bool)])


def _has_gradient(
    gradients: OutputGradients, layout: FeatureLayout, inverse: Tensor, size: int
) -> Tensor | None:
    """Return bool [u], which deduplicated ids have a gradient; None if all do.

    Args:
        gradients: Of some features.
        layout: The group's features.
        inverse: int64 [n], positions of ids among the deduplicated.
        size: u.
    """
    features = layout.features
    is_tiled = any(features[index].mode == "tile" for index in gradients.features)
    if len(gradients.features) == len(features) and not is_tiled:
        return None
    has_gradient = torch.zeros(size + 1, dtype=torch.bool, device=inverse.device)
    for rows in _rows_with_gradient(gradients, layout, inverse, size):
        has_gradient[rows] = True
    return has_gradient[:size]


def _num_ids(
    gradients: OutputGradients, layout: FeatureLayout, inverse: Tensor, size: int
) -> Tensor:
    """Return float32 [u], how often each deduplicated id occurs where there is a gradient.

    Arguments as for ``_has_gradient``.
    """
    num_ids = torch.zeros(size + 1, dtype=torch.int64, device=inverse.device)
    for rows in _rows_with_gradient(gradients, layout, inverse, size):
        num_ids.scatter_add_(0, rows, torch.ones_like(rows))
    return num_ids[:size].float()


def _rows_with_gradient(
    gradients: OutputGradients, layout: FeatureLayout, inverse: Tensor, size: int
) -> Iterator[Tensor]:
    """Yield each feature's positions among the deduplicated ids; ``size`` without a gradient."""
    for line, index in zip(gradients.plan, gradients.features, strict=True):
        first = int(line[fields.PLAN_FIRST_ID])
        rows = inverse[first : first + int(line[fields.PLAN_NUM_IDS])]
        feature = layout.features[index]
        if feature.mode == "tile":
            _, position = gradients.batch.bags_of(index).positions()
            rows = rows.masked_fill(position >= feature.tile_len, -1)
        yield torch.where(rows < 0, size, rows)  # no mask: a GPU's would wait


def _leave_pending(route: Route, received: Tensor, sent: set[HashTable]) -> None:
    """Leave received gradients with the tables that own their rows.

    Args:
        route: Of the lookup.
        received: float32 [r, embedding_dim + 1], by rank.
        sent: Tables that this rank sent gradients of.
    """
    part_tables, plan, rows, parts, pooled = route.owned
    plan, received = plan.copy(), parts.arrange(received)
    is_used = np.ones(len(part_tables), bool)
    if not all(route.layout.trains()):
        is_used[:] = [table.trainable for table in part_tables]
    is_missing = received[:, -1] == 0
    if bool(is_missing.any()):
        if pooled is not None:
            is_missing = is_missing.repeat_interleave(pooled.sizes)
        rows = rows.masked_fill(is_missing, UNKNOWN)
        split = is_missing.split(plan[:, fields.PLAN_NUM_IDS].tolist())
        is_used &= ~torch.stack([part.all() for part in split]).cpu().numpy()
        point_to_rows(plan, rows)
    point_to_data(plan, received, None if pooled is None else pooled.firsts)
    plan[:, fields.PLAN_COUNTED] = pooled is None  # read only if the optimizer asks for counts
    used = np.flatnonzero(is_used)
    used_tables = [part_tables[part] for part in used.tolist()]
    kept = [received] if pooled is None else [received, pooled.bounds]
    record = PendingGradient(used_tables, plan[used], rows, kept)
    updated = list(dict.fromkeys(used_tables))
    for table in updated:
        table.pending.append(record)
    # Ids of other ranks: nothing to apply here, but the table's update has this rank's part.
    nothing = PendingGradient([], plan[:0], rows[:0], [])
    for table in sent.difference(updated):
        table.pending.append(nothing)


set_pack(_packed)

__all__ = ["send_gradients"]
