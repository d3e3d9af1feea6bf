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
from recis_lightning.distributed.process_group import ProcessGroup, is_initialized
from recis_lightning.lookup.early_gradients import (
    EarlyGradients,
    counts_ids,
    early_of,
    set_pack,
)
from recis_lightning.lookup.exchange import Route, point_to_data
from recis_lightning.lookup.exchange_dtype import pack_gradients, unpack_gradients
from recis_lightning.lookup.features import FeatureLayout, listed, point_to_rows
from recis_lightning.lookup.gradient_ledger import (
    GradientLedger,
    LedgerEntry,
    UnsentGradient,
    ledger_of,
    split_bits,
    stack_bits,
)
from recis_lightning.lookup.row_source import OutputGradients
from recis_lightning.ops import backend, row_update
from recis_lightning.ops import layout as fields
from recis_lightning.ops.async_copy import to_device_async
from recis_lightning.ops.embedding_bag import Plan
from recis_lightning.ops.layout import UNKNOWN
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.lock import distinct_locks, write
from recis_lightning.table.pending_gradient import PendingGradient

_pending, _process_group = map(attrgetter, ("pending", "process_group"))
_NUMBERS = (PAYLOAD_SIZE - 1) // 4  # in a head, for the bits of each kind
_WINDOW = 56 * _NUMBERS  # lookups, and tables, that a head has bits for


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
    return waiting if len(tables) <= _WINDOW else None


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
        For each lookup whether any rank may have more, and for each table that a head has bits for
        whether any rank's ``waiting`` is set.
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
    bits = stack_bits(
        [entry.is_alive() for entry in entries],
        [bool(unsent) for unsent in records],
        [entry.is_stale() for entry in entries],
        waiting[:_WINDOW],
        size=_NUMBERS,
    )
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
    of_any = np.bitwise_or.reduce(of_tables, 0, keepdims=True)
    ranks = collectives.global_ranks(process_group)
    _check_backward(entries, sends, heads.payloads[:, 0], purpose, ranks)
    _check_rows(entries, sends, stale, ranks)
    used = np.flatnonzero(sends.any(0)).tolist()
    for device in dict.fromkeys(entries[i].route.layout.device for i in used):
        chosen = [i for i in used if entries[i].route.layout.device == device]
        some, of = [entries[i] for i in chosen], [records[i] for i in chosen]
        _exchange(some, of, sends[:, chosen], purpose, come)
        for entry in some:
            entry.note_received()
    return alive.any(0).tolist(), split_bits(of_any, 1, len(waiting[:_WINDOW])).ravel().tolist()


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


def _check_rows(
    entries: Sequence[LedgerEntry],
    sends: npt.NDArray[Any],
    stale: npt.NDArray[Any],
    ranks: Sequence[int],
) -> None:
    wrong = sends.any(0) & stale
    if wrong.any():
        rank, number = np.argwhere(wrong)[0].tolist()
        raise RuntimeError(
            f"one of tables {_names(entries[number].route.layout)} lost rows on rank "
            f"{ranks[rank]} between a lookup and the step that uses its gradients (evict, delete, "
            "clear or load); run backward and step first, or look up again"
        )


def _names(layout: FeatureLayout) -> str:
    return listed([table.name for table in layout.tables])


def _exchange(
    entries: Sequence[LedgerEntry],
    records: Sequence[dict[PendingGradient, set[HashTable]]],
    sends: npt.NDArray[Any],
    purpose: str,
    early: EarlyGradients | None,
) -> None:
    """Send the gradients of lookups of tables on one device.

    Args:
        entries: The lookups.
        records: For each, this rank's gradients and the tables that they are for.
        sends: bool [num_ranks, num_entries], whether the rank has gradients for it.
        purpose: What the rank does next.
        early: Gradients that have travelled already; None if they have not.
    """
    layouts, come = [entry.route.layout for entry in entries], None
    if early is not None:
        come = early.answers(entries, lambda: purpose, layouts[0].process_group)
    locks = layouts[0].current_locks()
    if len(layouts) > 1:
        locks = distinct_locks(lock for layout in layouts for lock in layout.current_locks())
    routes = [entry.route for entry in entries]
    write(locks, _exchange_locked, routes, records, sends, purpose, come)


def _exchange_locked(
    routes: Sequence[Route],
    records: Sequence[dict[PendingGradient, set[HashTable]]],
    sends: npt.NDArray[Any],
    purpose: str,
    come: Sequence[Tensor] | None,
) -> None:
    answers = come
    if answers is None:
        messages = [
            _message(route, of, does_send)
            for route, of, does_send in zip(routes, records, sends.T, strict=True)
        ]
        answers = exchange_messages(messages, lambda: purpose, routes[0].layout.process_group)
    for number, (route, of) in enumerate(zip(routes, records, strict=True)):
        gradients = unpack_gradients(answers[number], route.layout.exchange_dtype)
        if not sends[:, number].all():
            gradients = _with_zeros(gradients, route, sends[:, number])
        # What was sent is gone from here, whatever comes next.
        for record, tables in of.items():
            for table in tables:
                table.pending.remove(record)
        _leave_pending(route, gradients, {table for tables in of.values() for table in tables})


def _message(
    route: Route, records: dict[PendingGradient, set[HashTable]], sends: npt.NDArray[Any]
) -> Message:
    """Return the message of a lookup's gradients, which is empty if this rank has none.

    Args:
        route: Of the lookup.
        records: This rank's gradients.
        sends: bool [num_ranks], which ranks have some.
    """
    num_sent = route.num_sent if records else [0] * len(route.num_sent)
    num_received = (np.array(route.num_received) * sends).tolist()
    return Message(_packed(route, records), num_received, num_sent)


def _packed(route: Route, records: dict[PendingGradient, set[HashTable]]) -> Tensor:
    """Return the sums of a lookup's gradients as they travel, of no gradients none."""
    layout = route.layout
    if records:
        sums = _sums_of(route, records)
    else:
        sums = torch.empty(0, layout.embedding_dim + 1, device=layout.device)
    return pack_gradients(sums, layout.exchange_dtype)


def _with_zeros(gradients: Tensor, route: Route, sends: Any) -> Tensor:
    """Return gradients with lines of zeros, which are none, for ids of ranks that sent nothing."""
    is_sent = np.repeat(sends, route.num_received)
    full = gradients.new_zeros(len(is_sent), gradients.shape[1])
    full[to_device_async(np.flatnonzero(is_sent), gradients.device)] = gradients
    return full


def _sums_of(route: Route, records: dict[PendingGradient, set[HashTable]]) -> Tensor:
    """Return this rank's gradients of each id of a lookup, float32 [u, embedding_dim + 1].

    They are added up in the order of the lookup and divided by the number of ranks: the owner's sum
    over ranks is the average that DDP takes of dense ones. Behind each stands whether it is one:
    without a gradient a row is left alone, with one of zeros its moments decay. For an optimizer
    that asks it is the number of ids that it is of.
    """
    layout, size = route.layout, sum(route.num_sent)
    sums = torch.zeros(size, layout.embedding_dim + 1, device=layout.device)
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
        _sum_gradients(plan, sums, 1 / len(route.num_sent))
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
    part_tables, plan, rows, parts = route.owned
    plan, received = plan.copy(), parts.arrange(received)
    is_used = np.ones(len(part_tables), bool)
    if not all(route.layout.trains()):
        is_used[:] = [table.trainable for table in part_tables]
    is_missing = received[:, -1] == 0
    if bool(is_missing.any()):
        rows = rows.masked_fill(is_missing, UNKNOWN)
        split = is_missing.split(plan[:, fields.PLAN_NUM_IDS].tolist())
        is_used &= ~torch.stack([part.all() for part in split]).cpu().numpy()
        point_to_rows(plan, rows)
    point_to_data(plan, received)
    plan[:, fields.PLAN_COUNTED] = 1  # read only if the optimizer asks for counts
    used = np.flatnonzero(is_used)
    used_tables = [part_tables[part] for part in used.tolist()]
    record = PendingGradient(used_tables, plan[used], rows, [received])
    updated = list(dict.fromkeys(used_tables))
    for table in updated:
        table.pending.append(record)
    # Ids of other ranks: nothing to apply here, but the table's update has this rank's part.
    nothing = PendingGradient([], plan[:0], rows[:0], [])
    for table in sent.difference(updated):
        table.pending.append(nothing)


def _sum_gradients(plan: Plan, sums: Tensor, scale: float) -> None:
    """Add up the gradients of each id into ``sums``, float32 [u, embedding_dim + 1] of zeros.

    The row update does it, on rows of zeros: SGD with a learning rate of -1 adds the gradient.
    """
    plan = plan.copy()
    sizes = plan[:, fields.PLAN_NUM_IDS]
    if not sizes.sum():
        return
    plan[:, fields.PLAN_FIRST_ID] = np.cumsum(sizes) - sizes
    plan[:, fields.PLAN_FLAT_BASE] = 0
    hyper = np.zeros(fields.HYPER_SIZE, np.float32)
    hyper[[fields.HYPER_LR, fields.HYPER_DECAY]] = -1, 1
    hyper[[fields.HYPER_SCALE, fields.HYPER_CLIP]] = scale, np.inf
    hyper_on_device = to_device_async(hyper, sums.device)
    blocks = np.array([[sums.data_ptr(), hyper_on_device.data_ptr()]], np.int64)
    size, width = sums.shape
    layout = row_update.RowLayout(
        width - 1, torch.float32, 4 * width, size.bit_length(), sums.device
    )
    row_update.update_rows_(row_update.sort_gradients(plan, blocks, layout), fields.SGD)


set_pack(_packed)

__all__ = ["send_gradients"]
