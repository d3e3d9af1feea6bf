"""One lookup's way over the ranks: ids to their owners, rows home, gradients to the owners.

All tables of a group travel together. A message to a rank holds the ids of the first table, then
those of the second, and so on, each id once; a matrix of counts goes ahead and says how many of
each table come. So nothing but ids, rows and gradients travels with an id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from recis_lightning.distributed import collectives
from recis_lightning.lookup.dedup import DistinctIds
from recis_lightning.lookup.local import find_or_insert_rows
from recis_lightning.ops import backend, embedding_bag, hash_index, row_update
from recis_lightning.ops.async_copy import to_device_async
from recis_lightning.ops.embedding_bag import PLAN_SIZE, Plan
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import (
    BLOCK_SHIFT,
    BLOCKS,
    NUM_REFUSED,
    ROW_BYTES,
    SEGMENT_IDS,
    SEGMENT_SIZE,
    SEGMENT_START,
    UNKNOWN,
)
from recis_lightning.table.hash_table import HashTable, write_segment
from recis_lightning.table.pending_gradient import PendingGradient


class ShardExchange:
    """Where the ids of one lookup went, and how rows and gradients travel between.

    Args:
        tables: The group's tables; of each this rank has a shard.
        distinct: The distinct ids of this rank's lookup.
        training: Insert unknown ids and stamp rows; otherwise only read.
        signature: Says what is looked up and how; the ranks' must agree.

    Attributes:
        rows: dtype [u, embedding_dim], the rows of ``distinct.ids``, once ``steps`` are done.
        header: A table's header by which kernels find ``rows``.
    """

    def __init__(
        self, tables: Sequence[HashTable], distinct: DistinctIds, training: bool, signature: int
    ) -> None:
        self.tables, self.distinct, self.training = tables, distinct, training
        self.signature = signature
        self.embedding_dim, self.dtype = tables[0].embedding_dim, tables[0].dtype
        self.device = tables[0].device
        self.num_sent: list[int] = distinct.counts.sum(1).tolist()

    def steps(self) -> Iterator[None]:
        """Look up; pause while messages are under way, so that other groups can send theirs."""
        counts = self.distinct.counts
        told = np.append(counts, np.full((len(counts), 1), self.signature), 1)
        message, ones = to_device_async(told, self.device), [1] * len(counts)
        answer, work = collectives.all_to_all(message, ones, ones)
        yield
        work.wait()
        heard = answer.cpu().numpy()
        self._check_signatures(heard[:, -1].tolist())
        counts = heard[:, :-1]
        self.num_received: list[int] = counts.sum(1).tolist()
        ids = self.distinct.ids
        counting = self.training and any(
            table.admission is not None or table.stamps for table in self.tables
        )
        if counting:
            ids = torch.stack([ids, self.distinct.num_sighted()], 1)
        message, work = collectives.all_to_all(ids, self.num_received, self.num_sent)
        yield
        work.wait()
        self._note_parts(counts)
        ids, sightings = (message, None) if not counting else message.T.contiguous().unbind()
        self.owner_rows = self._find_rows(ids, sightings)
        found = self._gather_rows()
        self.rows, work = collectives.all_to_all(found, self.num_sent, self.num_received)
        yield
        work.wait()
        self.header, self._blocks = _header_over(self.rows)

    def _check_signatures(self, signatures: list[int]) -> None:
        for rank, signature in enumerate(signatures):
            if signature != self.signature:
                raise RuntimeError(
                    f"rank {rank} looks up other features or tables than this rank does (here: "
                    f"tables {[table.name for table in self.tables]}, "
                    f"{'training' if self.training else 'evaluation'}); all ranks must look up "
                    "the same features in the same order and mode, with empty ids where a rank "
                    "has none"
                )

    def _note_parts(self, counts: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> None:
        """Note which of the received ids are of which table: a line of a plan for each part."""
        sizes = counts.reshape(-1)
        starts = np.cumsum(sizes) - sizes
        used = np.flatnonzero(sizes)
        self.part_sizes = sizes
        self.part_tables = (used % len(self.tables)).tolist()
        plan = np.zeros((len(used), PLAN_SIZE), np.int64)
        headers = np.array([table.header.address for table in self.tables], np.int64)
        plan[:, embedding_bag.HEADER] = headers[self.part_tables]
        plan[:, embedding_bag.MODE] = embedding_bag.NONE
        plan[:, embedding_bag.FIRST_ID] = starts[used]
        plan[:, embedding_bag.NUM_BAGS] = plan[:, embedding_bag.NUM_IDS] = sizes[used]
        plan[:, embedding_bag.BAG_LENGTH] = 1
        self.plan: Plan = plan

    def _find_rows(self, ids: Tensor, sightings: Tensor | None) -> Tensor:
        """Return int64 [r], this shard's rows of the received ids."""
        segments = np.zeros((len(self.tables), SEGMENT_SIZE), np.int64)
        for line, table in zip(segments, self.tables, strict=True):
            write_segment(line, table, self.training, None)
        # Tables that got no ids too: a lookup is one of all shards.
        segments = np.tile(segments, (len(self.num_sent), 1))
        sizes = self.part_sizes
        segments[:, SEGMENT_START] = np.cumsum(sizes) - sizes
        segments[:, SEGMENT_IDS] = ids.data_ptr()
        if not self.training:
            return hash_index.find(segments, ids.numel(), self.device)
        owners = [*range(len(self.tables))] * len(self.num_sent)
        parts = ids.split(sizes.tolist())
        rows, _ = find_or_insert_rows(segments, parts, ids.numel(), self.tables, owners, sightings)
        if sightings is not None:
            self._count_refused(rows, sightings)
        return rows

    def _count_refused(self, rows: Tensor, sightings: Tensor) -> None:
        """Count occurrences that a table refuses unscreened: the index counts a rank's ids once."""
        missed = torch.where(rows == UNKNOWN, sightings - 1, 0)
        for number, part in enumerate(missed.split(self.part_sizes.tolist())):
            table = self.tables[number % len(self.tables)]
            if table.sightings is None:
                table.header.tensor[NUM_REFUSED] += part.sum()

    def _gather_rows(self) -> Tensor:
        rows, plan = self.owner_rows, self.plan
        found = torch.empty(rows.numel(), self.embedding_dim, dtype=self.dtype, device=self.device)
        plan[:, embedding_bag.ROWS] = rows.data_ptr() + 8 * plan[:, embedding_bag.FIRST_ID]
        _point_to(plan, found)
        embedding_bag.gather(plan, self.embedding_dim, self.dtype, self.device)
        return found

    def return_gradients(self, plan: Plan, touched: Tensor | None) -> list[HashTable]:
        """Send gradients to the owners, who keep them with their tables as pending.

        Gradients are added up by id, in the order of the lookup, before they travel, and divided by
        the number of ranks: the owner's sum over ranks is the average that DDP takes of dense ones.

        Args:
            plan: int64 [num_features, PLAN_SIZE] of the features that have a gradient; DATA holds
                it, ROWS the places of their ids in ``distinct.ids``.
            touched: bool [u], which ids have a gradient; None if all do.

        Returns:
            The tables that have a gradient to apply on this rank.
        """
        size, dim = self.rows.shape
        # Behind each gradient stands whether it is one: without a gradient a row is left alone,
        # with one of zeros its moments decay.
        sums = torch.zeros(size, dim + 1, device=self.device)
        if size and len(plan):
            _sum_gradients(plan, sums, 1 / len(self.num_sent))
        sums[:, dim] = 1.0 if touched is None else touched.to(sums.dtype)
        received, work = collectives.all_to_all(sums, self.num_received, self.num_sent)
        work.wait()
        return self._leave_pending(received)

    def _leave_pending(self, received: Tensor) -> list[HashTable]:
        rows, plan = self.owner_rows, self.plan.copy()
        is_used = np.array([self.tables[table].trainable for table in self.part_tables], bool)
        bare = received[:, -1] == 0
        if bool(bare.any()):
            rows = rows.masked_fill(bare, UNKNOWN)
            parts = bare.split(plan[:, embedding_bag.NUM_IDS].tolist())
            is_used &= ~torch.stack([part.all() for part in parts]).cpu().numpy()
        plan[:, embedding_bag.ROWS] = rows.data_ptr() + 8 * plan[:, embedding_bag.FIRST_ID]
        _point_to(plan, received)
        used = np.flatnonzero(is_used)
        part_tables = [self.tables[self.part_tables[part]] for part in used.tolist()]
        tables = list(dict.fromkeys(part_tables))
        record = PendingGradient(part_tables, plan[used], rows, [received])
        for table in tables:
            table.pending.append(record)
        return tables


def _point_to(plan: Plan, data: Tensor) -> None:
    """Let a plan's DATA be the rows of ``data``, the first of each line at its FIRST_ID."""
    stride = data.stride(0) * data.element_size()
    plan[:, embedding_bag.DATA] = data.data_ptr() + stride * plan[:, embedding_bag.FIRST_ID]
    plan[:, embedding_bag.DATA_STRIDE] = stride


def _header_over(rows: Tensor) -> tuple[Header, Tensor]:
    """Return a table's header for rows that lie one after the other, and what it points to."""
    header = Header(rows.device, backend.is_async(rows.device))
    blocks = to_device_async(np.array([rows.data_ptr()]), rows.device)
    header.fields[BLOCKS] = blocks.data_ptr()
    header.fields[BLOCK_SHIFT] = len(rows).bit_length()
    header.fields[ROW_BYTES] = rows.stride(0) * rows.element_size()
    header.publish()
    return header, blocks


def _sum_gradients(plan: Plan, sums: Tensor, scale: float) -> None:
    """Add gradients up by place into ``sums``, float32 [u, embedding_dim + 1], which is zeros.

    What the update does to a row of weights, it does here to a row of zeros: SGD with a learning
    rate of -1 adds the reduced gradient.
    """
    plan = plan.copy()
    sizes = plan[:, embedding_bag.NUM_IDS]
    if not sizes.sum():
        return
    plan[:, embedding_bag.FIRST_ID] = np.cumsum(sizes) - sizes
    plan[:, embedding_bag.FLAT_BASE] = 0
    hyper = np.zeros(row_update.HYPER_SIZE, np.float32)
    hyper[[row_update.LR, row_update.DECAY]] = -1, 1
    hyper[[row_update.SCALE, row_update.CLIP]] = scale, np.inf
    values = to_device_async(hyper, sums.device)
    blocks = np.array([[sums.data_ptr(), values.data_ptr()]], np.int64)
    size, width = sums.shape
    layout = row_update.RowLayout(
        width - 1, torch.float32, 4 * width, size.bit_length(), sums.device
    )
    row_update.update_rows_(row_update.sort_gradients(plan, blocks, layout), row_update.SGD)


__all__ = ["ShardExchange"]
