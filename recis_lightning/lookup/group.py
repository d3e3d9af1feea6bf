"""Lookup of a group: features of one device, dtype and dim, together.

However many features ask the group's tables and however these pool, a lookup is one index op and
one gather; backward leaves the gradients where they are and only notes them as pending.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from itertools import compress, repeat
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from recis_lightning.arguments import check_not_traced
from recis_lightning.distributed import collectives
from recis_lightning.distributed.heads import announce_failure
from recis_lightning.distributed.joined_messages import Message, exchange_messages
from recis_lightning.jagged import Bags, FeatureBags
from recis_lightning.lookup import transfer
from recis_lightning.lookup.agreement import Counts, agree_on_lookup, describe
from recis_lightning.lookup.autograd import Lookup, record_lookup
from recis_lightning.lookup.batch import (
    Batch,
    SizedLines,
    join_occurrences,
    join_offsets,
    join_weights,
    malformed_feature,
)
from recis_lightning.lookup.buffers import Columns
from recis_lightning.lookup.features import FeatureLayout, listed
from recis_lightning.lookup.local import LocalRows
from recis_lightning.lookup.prepared import prepared_of
from recis_lightning.lookup.row_source import PreparedIds, RowSource
from recis_lightning.lookup.surroundings import Runner
from recis_lightning.ops import backend, embedding_bag
from recis_lightning.ops.embedding_bag import Plan
from recis_lightning.table.lock import distinct_locks, read, write

_Result = TypeVar("_Result")

# For maps over hundreds of tables and tensors.
_device, _is_cpu, _local = map(attrgetter, ("device", "is_cpu", "local"))


class LookupGroup:
    """Features of one device, dtype and dim, and the source of their rows.

    Args:
        layout: The features.
        rows: The source of their rows.
        runner: The loop that runs the lookups.

    Attributes:
        process_group: Ranks that the tables are sharded over; None means all.
        num_ranks: Number of ranks that the group was made for.
        local: The source of their rows if all are on this rank, else None.
    """

    def __init__(self, layout: FeatureLayout, rows: RowSource, runner: Runner) -> None:
        self.layout, self.rows, self.runner = layout, rows, runner
        self.local = rows if isinstance(rows, LocalRows) else None
        self.process_group = layout.process_group
        self.num_ranks = collectives.world_size(self.process_group)

    def is_current(self) -> bool:
        """Return whether the tables' storage and the ranks are as they were for the layout."""
        num_ranks = collectives.world_size(self.process_group)
        return self.layout.is_current() and self.num_ranks == num_ranks

    def prepare(self, bags: FeatureBags, training: bool) -> Batch:
        """Check a batch, and copy what must not change; nothing of a table changes.

        Args:
            bags: One for each feature.
            training: As for ``look_up``.

        Raises:
            RuntimeError: The tables cannot train as things are.
            ValueError: A feature is on another device, or its offsets are malformed (beside a GPU
                that is found out later).
        """
        came_from = bags.ids[0].device
        layout, given = self.layout, bags.occurrences
        if layout.device.type == "cpu" and came_from.type == "cuda":
            bags = transfer.bags_from_device(bags, came_from)
        if training:
            self._check_trained()
        self._check_devices(bags)
        lines = layout.lines_for(bags)
        occurrences = join_occurrences(bags, given, layout.device) if given and training else None
        if not bags.details:
            return Batch(bags, lines, None, [], None, came_from, occurrences)
        weighted = [i for i, bag in enumerate(bags.details) if bag.weights is not None]
        # Backward and update read them too; by then the caller may have overwritten its own.
        is_recorded = torch.is_grad_enabled() and (
            training or any(map(_needs_gradient, map(bags.details.__getitem__, weighted)))
        )
        offsets = join_offsets(bags, lines) if is_recorded else None
        # Evaluation changes nothing before its gather finds them, where there are bags.
        may_wait = not backend.is_async(layout.device)
        before = training or layout.pools_at_owner or len(lines.pooled) < len(lines.ragged)
        if may_wait and lines.ragged and before:
            self._check_offsets(bags, lines, offsets)
        if weighted and layout.pools_at_owner:
            raise ValueError(
                f"{layout.names[weighted[0]]}: pool_at_owner takes no weights, which would travel "
                "with each id; set use_weights=False, or pool_at_owner=False"
            )
        weights = join_weights(bags, weighted) if is_recorded else None
        return Batch(bags, lines, offsets, weighted, weights, came_from, occurrences)

    def look_up(
        self,
        batch: Batch,
        training: bool,
        columns: Columns | None,
        prepared: PreparedIds | None = None,
    ) -> Generator[Any, Any, Lookup]:
        """Look features up and pool their rows; pause as ``RowSource.fetch`` does.

        Args:
            batch: From ``prepare``.
            training: Insert unknown ids, stamp rows and leave gradients; otherwise only read.
            columns: What to fill; None means outputs of their own, for each feature [n, dim]
                ("none"), [B, dim] or [B, tile_len * dim] ("tile").
            prepared: As for ``RowSource.fetch``.
        """
        outputs, plan = self._allocate(batch, columns)
        inserts = training and not _is_repeated()
        try:
            fetched = yield from self.rows.fetch(batch, plan, inserts, training, prepared)
        except embedding_bag.MalformedOffsetsError as error:
            self._raise_malformed(error.feature, batch.bags)
            raise
        return Lookup(self.layout, batch, plan, fetched, outputs, training)

    def look_up_at_once(
        self, local: LocalRows, batch: Batch, training: bool, columns: Columns | None
    ) -> Lookup:
        """Look features up as ``look_up`` does, in rows that are all here: there are no pauses."""
        outputs, plan = self._allocate(batch, columns)
        inserts = training and not _is_repeated()
        try:
            fetched = local.fetch_at_once(batch, plan, inserts, training)
        except embedding_bag.MalformedOffsetsError as error:
            self._raise_malformed(error.feature, batch.bags)
            raise
        return Lookup(self.layout, batch, plan, fetched, outputs, training)

    def _allocate(self, batch: Batch, columns: Columns | None) -> tuple[list[Tensor], Plan]:
        """Return the outputs, none if there are columns to fill, and the plan that fills them."""
        layout = self.layout
        layout.check_current()
        if columns is None:
            return layout.allocate(batch)
        return [], layout.fill_columns(batch, columns)

    def _check_devices(self, bags: FeatureBags) -> None:
        """Raise if a feature is not where its table is."""
        device = self.layout.device
        if device.type == "cpu":
            if all(map(_is_cpu, bags.ids)) and _are_on_cpu(bags.details):
                return
        elif not bags.details and set(map(_device, bags.ids)) == {device}:
            return
        # Kernels are given addresses: nothing else would tell.
        for name, bag in zip(self.layout.names, bags, strict=True):
            for argument, tensor in (
                ("ids", bag.ids),
                ("offsets", bag.offsets),
                ("weights", bag.weights),
            ):
                if tensor is not None and tensor.device != device:
                    raise ValueError(
                        f"{name}: its table is on {device}, its {argument} on {tensor.device}"
                    )

    def _check_offsets(self, bags: FeatureBags, lines: SizedLines, joined: Tensor | None) -> None:
        """Raise if a feature has malformed offsets.

        Args:
            bags: On the CPU.
            lines: Of ``bags``.
            joined: A copy of all offsets, if there is one.
        """
        joined = join_offsets(bags, lines) if joined is None else joined
        assert joined is not None
        feature = malformed_feature(joined, lines)
        if feature is not None:
            self._raise_malformed(feature, bags)

    def _raise_malformed(self, feature: int, all_bags: FeatureBags) -> None:
        bags: Bags = all_bags[feature]
        offsets, name = bags.offsets, self.layout.names[feature]
        assert offsets is not None
        # An embedding's one feature has the name of its argument.
        argument = "offsets" if name == "ids" else f"{name}.offsets"
        got = ", ".join(map(str, offsets[:8].tolist())) + (", ..." if len(offsets) > 8 else "")
        raise ValueError(
            f"{argument}: must start at 0, never descend and end at the number of ids, "
            f"{bags.ids.numel()}; got [{got}], which ends at {int(offsets[-1])}; did you pass "
            "lengths?"
        )

    def _check_trained(self) -> None:
        for table in compress(self.layout.tables, self.layout.pending):
            if table.optimizer is None:
                raise RuntimeError(
                    f"table {table.name!r} has a gradient and no optimizer that would use it; add "
                    "SparseAdamW(hash_tables(self), lr=...) to configure_optimizers, as in "
                    "SparseDenseOptimizer(torch.optim.AdamW(self.parameters()), "
                    "SparseAdamW(hash_tables(self))), or make the table trainable=False"
                )
        kind = self.layout.device.type
        if (
            torch.is_autocast_enabled(kind)
            and torch.get_autocast_dtype(kind) is torch.float16
            and torch.is_grad_enabled()
        ):
            raise RuntimeError(
                "precision '16-mixed' scales the loss, and its GradScaler cannot unscale the "
                "gradients of tables; use precision='bf16-mixed' or '32-true'"
            )


def _is_repeated() -> bool:
    """Return whether a backward pass repeats a lookup that was made, as torch's checkpoints do."""
    return torch._C._current_graph_task_id() != -1


def _needs_gradient(bags: Bags) -> bool:
    return bags.weights is not None and bags.weights.requires_grad


def _are_on_cpu(details: Sequence[Bags]) -> bool:
    """Return whether all offsets and weights are."""
    for bag in details:
        offsets, weights = bag.offsets, bag.weights
        if offsets is not None and not offsets.is_cpu:
            return False
        if weights is not None and not weights.is_cpu:
            return False
    return True


def look_up_groups(
    groups: Sequence[LookupGroup], bags: Sequence[FeatureBags], training: bool
) -> list[list[Tensor]]:
    """Look groups up together: the messages of all travel together.

    Args:
        groups: The groups of a module.
        bags: For each group, those of its features.
        training: As for ``LookupGroup.look_up``.

    Returns:
        For each group, the outputs of its features.
    """
    return look_up_with(groups, bags, training, None, _record_each)


def _record_each(lookups: Sequence[Lookup]) -> list[list[Tensor]]:
    return [_record_outputs(lookup) for lookup in lookups]


def _record_outputs(lookup: Lookup) -> list[Tensor]:
    """Return the outputs of a lookup as autograd knows them, where the caller has its tensors."""
    outputs = lookup.outputs
    if lookup.training or lookup.batch.weighted:
        outputs = record_lookup(lookup)
    if is_transferred(lookup):
        return transfer.outputs_to_device(outputs, lookup.batch.came_from)
    return outputs


def is_transferred(lookup: Lookup) -> bool:
    """Return whether the caller's tensors are on a GPU and the tables on the CPU."""
    return lookup.batch.came_from.type == "cuda" and lookup.layout.device.type == "cpu"


def look_up_with(
    groups: Sequence[LookupGroup],
    bags: Sequence[FeatureBags],
    training: bool,
    columns: Sequence[Columns] | None,
    record: Callable[[Sequence[Lookup]], _Result],
) -> _Result:
    """Look groups up as ``look_up_groups`` does; return what ``record`` makes of the lookups.

    Args:
        groups: The groups of a module.
        bags: For each group, those of its features.
        training: As for ``LookupGroup.look_up``.
        columns: For each group, the columns to fill; None means outputs of their own.
        record: Called with the groups' lookups while their tables are locked.
    """
    check_not_traced("lookup", bags[0].ids)
    if not training and groups[0].num_ranks > 1:
        for group in groups:
            group.runner.join_evaluation()
    return run_lookups(groups, bags, training, columns, record)


def run_lookups(
    groups: Sequence[LookupGroup],
    bags: Sequence[FeatureBags],
    training: bool,
    columns: Sequence[Columns] | None,
    record: Callable[[Sequence[Lookup]], _Result],
    agree: Callable[[Sequence[Counts]], Sequence[Counts]] | None = None,
) -> _Result:
    """Run the groups' lookups in turn, each up to its next pause, until all are done.

    All batches are checked before any table changes. Other threads may evaluate the same tables
    meanwhile; they wait while one trains.

    Args:
        groups: As for ``look_up_with``, and so what follows.
        bags: The features.
        training: Whether rows are inserted and get gradients.
        columns: What to fill.
        record: Makes the result.
        agree: Given how many ids of each group go to each rank, returns how many come from each;
            None asks the other ranks, which must look up the same.
    """
    with backend.region("recis::lookup"):
        return _run_lookups(groups, bags, training, columns, record, agree)


def _run_lookups(
    groups: Sequence[LookupGroup],
    bags: Sequence[FeatureBags],
    training: bool,
    columns: Sequence[Columns] | None,
    record: Callable[[Sequence[Lookup]], _Result],
    agree: Callable[[Sequence[Counts]], Sequence[Counts]] | None,
) -> _Result:
    try:
        batches = list(map(LookupGroup.prepare, groups, bags, repeat(training)))
    except Exception as error:
        if groups[0].num_ranks > 1:
            announce_failure(error, describe(groups, training), groups[0].process_group)
        raise
    locks = groups[0].layout.locks
    if len(groups) > 1 and any(group.layout.locks != locks for group in groups):
        locks = distinct_locks(lock for group in groups for lock in group.layout.locks)
    filled = [None] * len(groups) if columns is None else columns
    local = groups[0].local
    if local is not None:  # and so it is in all groups of a module

        def look_up_here() -> _Result:
            trains = repeat(training)
            rows = map(_local, groups)
            lookups = list(map(LookupGroup.look_up_at_once, groups, rows, batches, trains, filled))
            return record(lookups)

        return write(locks, look_up_here) if training else read(locks, look_up_here)
    exchange = partial(
        exchange_messages,
        doing=lambda: f"looks up tables {listed(_table_names(groups))}",
        process_group=groups[0].process_group,
    )

    def look_up() -> _Result:
        prepared = _claim(groups, batches, training) if agree is None else None
        its = [None] * len(groups) if prepared is None else prepared
        trains = [training] * len(groups)
        running = list(map(LookupGroup.look_up, groups, batches, trains, filled, its))
        # Where ids came ahead, rows are the first message.
        first = exchange if prepared else agree or partial(agree_on_lookup, groups, training)
        return record(_take_turns(running, first, exchange))

    # Ranks answer one another in a fixed order, and so do the threads of each.
    if training or groups[0].num_ranks > 1:
        return write(locks, look_up)
    return read(locks, look_up)


def _claim(
    groups: Sequence[LookupGroup], batches: Sequence[Batch], training: bool
) -> list[PreparedIds] | None:
    """Return what came ahead for a lookup; None if nothing did."""
    if not training or groups[0].num_ranks == 1 or torch._C._current_graph_task_id() != -1:
        return None
    return prepared_of(groups[0].process_group).claim(groups, batches)


def _table_names(groups: Sequence[LookupGroup]) -> list[str]:
    return [table.name for group in groups for table in group.layout.tables]


def _take_turns(
    running: Sequence[Generator[Any, Any, Lookup]],
    begin: Callable[[Sequence[Any]], Any],
    exchange: Callable[[Sequence[Message]], Sequence[Tensor]],
) -> list[Lookup]:
    """Run lookups until all are done; return them in their order.

    Args:
        running: The lookups.
        begin: Answers their first pauses: ``agree`` of ``run_lookups``, or ``exchange``.
        exchange: Sends the lookups' messages together; returns what has come for each.
    """
    found: list[Any] = [None] * len(running)
    left, asked = [], []
    for i, lookup in enumerate(running):
        try:
            asked.append(next(lookup))
        except StopIteration as end:
            found[i] = end.value
        else:
            left.append((i, lookup))
    answers: Any = begin(asked) if left else ()
    while left:
        paused, messages = [], []
        for (i, lookup), answer in zip(left, answers, strict=True):
            try:
                messages.append(lookup.send(answer))
            except StopIteration as end:
                found[i] = end.value
            else:
                paused.append((i, lookup))
        left, answers = paused, exchange(messages) if messages else ()
    return found


__all__ = [
    "LookupGroup",
    "is_transferred",
    "look_up_groups",
    "look_up_with",
    "run_lookups",
]
