"""Rows of tables that lie on this rank: find ids, insert unknown ones, initialise their rows."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recis_lightning.lookup.batch import Batch, SizedLines
from recis_lightning.lookup.features import FeatureLayout
from recis_lightning.lookup.room import RoomMaker
from recis_lightning.lookup.row_source import OutputGradients, PreparedIds
from recis_lightning.ops import embedding_bag, hash_index, row_init
from recis_lightning.ops.embedding_bag import Plan
from recis_lightning.ops.hash_index import Segments
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import NUM_REJECTED, SEGMENT_START, UNKNOWN
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.pending_gradient import PendingGradient

_readmissions = attrgetter("evictor.readmissions")  # for maps over hundreds of tables


class LocalRows:
    """``RowSource`` of tables whose rows all lie on this rank.

    One pass finds ids and fills the outputs wherever no id has to be inserted. In training that
    shows only at its end, so it is tried when the last lookup found every id known.

    Args:
        layout: The group's features.
    """

    is_sharded: ClassVar[bool] = False
    can_prepare: ClassVar[bool] = False

    def __init__(self, layout: FeatureLayout) -> None:
        self._layout = layout
        policies = [
            feature.table.admission for feature in layout.features if feature.admits == "policy"
        ]
        reads_only = any(feature.admits == "none" for feature in layout.features)
        admissions = [policy for policy in policies if policy is not None]
        self._may_reject = reads_only or bool(admissions)
        self._all_tables_admit = not reads_only and all(policy.admits for policy in admissions)
        self._counts_occurrences = layout.counts_occurrences
        self._is_prepared = False  # for training
        self._all_known = False  # whether the last training lookup found nothing to insert

    def fetch(
        self,
        batch: Batch,
        plan: Plan,
        training: bool,
        learns: bool,
        prepared: PreparedIds | None = None,
    ) -> Generator[None, None, FetchedLocalRows]:
        """Look ids up and fill the outputs, without a pause."""
        yield from ()
        return self.fetch_at_once(batch, plan, training, learns)

    def fetch_at_once(
        self, batch: Batch, plan: Plan, training: bool, learns: bool
    ) -> FetchedLocalRows:
        """Do what ``fetch`` does, for a caller that has nothing else to do meanwhile."""
        layout, lines, ids = self._layout, batch.lines, batch.bags.ids
        if training and not self._is_prepared:
            embedding_bag.prepare_training(*layout.row_type)
            self._is_prepared = True
        num_ids = lines.num_ids
        segments = lines.segments(ids, training)
        occurrences = batch.occurrences if self._counts_occurrences else None
        fuses = occurrences is None and (self._all_known or not training)
        # Rows in a mapped file are brought in between: one pass would wait for each of them.
        fuses = fuses and not layout.mapped_headers()
        if fuses and embedding_bag.fuses(layout.device, training):
            rows = torch.empty(num_ids, dtype=torch.int64, device=layout.device)
            lines.point_to_rows(plan, rows)
            row_type, kept = layout.row_type, lines.kept
            if not embedding_bag.find_and_gather(plan, segments, training, *row_type, kept):
                if training:
                    tables = layout.storages
                    hash_index.note_known(segments, rows, tables, layout.segment_tables)
                return FetchedLocalRows(rows, layout)
        if training:
            rows = self._find_or_insert(segments, ids, lines, occurrences, plan)
        else:
            rows = hash_index.find(segments, num_ids, layout.device)
            lines.point_to_rows(plan, rows)
        layout.bring_in(plan, rows, writes=learns and torch.is_grad_enabled())
        embedding_bag.gather(plan, *layout.row_type)
        return FetchedLocalRows(rows, layout)

    def _find_or_insert(
        self,
        segments: Segments,
        ids: Sequence[Tensor],
        lines: SizedLines,
        occurrences: Tensor | None,
        plan: Plan,
    ) -> Tensor:
        layout = self._layout
        rows, new = find_or_insert_rows(
            layout,
            *(segments, ids, lines.num_ids, layout.segment_tables, occurrences),
            *(plan, lines.kept),
        )
        if occurrences is not None:
            _count_rejections(layout, list(map(Tensor.numel, ids)), rows, occurrences)
        # That a frozen table does not know an id is counted only here, not in the one pass.
        fuses = embedding_bag.fuses(layout.device, training=True)
        self._all_known = fuses and new is None and self._all_tables_admit
        if self._all_known and self._may_reject:
            self._all_known = not bool((rows == UNKNOWN).any())
        return rows


def _count_rejections(
    layout: FeatureLayout, sizes: list[int], rows: Tensor, occurrences: Tensor
) -> None:
    """Count occurrences that a table rejects unseen: the index counts each position once."""
    rejected = torch.where(rows == UNKNOWN, occurrences - 1, 0)
    for feature, part in zip(layout.features, rejected.split(sizes), strict=True):
        storage = feature.table.storage
        if feature.admits == "none" or storage.admission_counter is None:
            storage.header.tensor[NUM_REJECTED] += part.sum()


class FetchedLocalRows(NamedTuple):
    """``FetchedRows`` in the tables' own blocks.

    Attributes:
        rows: int64 [n].
        layout: The group's features.
    """

    rows: Tensor
    layout: FeatureLayout

    @property
    def is_own(self) -> bool:
        """True: an eviction on this rank may take these rows."""
        return True

    def header_of(self, feature: int) -> Header:
        """Return the header of the feature's table."""
        return self.layout.feature_tables[feature].storage.header

    def version_of(self, feature: int) -> int:
        """Return the version of the weights of the feature's table."""
        return self.layout.feature_tables[feature].storage.weights_version

    def return_gradients(self, gradients: OutputGradients) -> None:
        """Leave gradients with the tables as pending."""
        features = gradients.features
        if not features:
            return
        tables, pending = self.layout.feature_tables, self.layout.pending
        is_whole = len(features) == len(tables)
        if not is_whole:
            tables = [tables[feature] for feature in features]
            pending = [table.pending for table in dict.fromkeys(tables)]
        kept = gradients.batch.lines.kept if is_whole else None
        record = PendingGradient(tables, gradients.plan, self.rows, gradients.buffers(), kept)
        for records in pending:
            records.append(record)


def find_or_insert_rows(
    layout: FeatureLayout,
    segments: Segments,
    ids: Sequence[Tensor],
    num_ids: int,
    segment_tables: Sequence[int],
    occurrences: Tensor | None = None,
    plan: Plan | None = None,
    kept: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the rows of ids, and insert and initialise those that are admitted and have none.

    Args:
        layout: The group's features.
        segments: int64 [num_segments, SEGMENT_SIZE], which say where the ids lie.
        ids: int64 [n_i] for each segment.
        num_ids: n, in all segments together.
        segment_tables: For each segment, its table's position in ``layout.tables``.
        occurrences: int64 [n], how many each position stands for; None means 1.
        plan: As for ``hash_index.find_or_insert``, and so ``kept``.
        kept: Of a backend.

    Returns:
        As ``hash_index.find_or_insert``: rows, int64 [n], and which positions are new.
    """

    def write_new(rows: Tensor, new: Tensor) -> None:
        bfloat16 = layout.dtype is torch.bfloat16
        shape = layout.embedding_dim, bfloat16
        row_init.init_rows_(rows, new, segments, *shape, lambda: _row_bytes(layout))

    def find_or_insert(make_room: RoomMaker | None) -> tuple[Tensor, Tensor | None]:
        return hash_index.find_or_insert(
            segments,
            *(num_ids, layout.storages, segment_tables, layout.device),
            *(occurrences, write_new, make_room),
            *(plan, layout.embedding_dim, kept),
        )

    if layout.limited:
        with ExitStack() as undo:
            rows, new = find_or_insert(RoomMaker(layout, segments, ids, segment_tables, undo))
    else:
        rows, new = find_or_insert(None)
    if new is not None and set(map(_readmissions, layout.tables)) != {None}:
        _note_new(segments, ids, new, [layout.tables[table] for table in segment_tables])
    return rows, new


def _row_bytes(layout: FeatureLayout) -> int:
    """Return the bytes of a row, of the table that has the largest."""
    return max(4 * table.storage.rows.row_words for table in layout.tables)


def _note_new(
    segments: Segments, ids: Sequence[Tensor], new: Tensor, tables: Sequence[HashTable]
) -> None:
    """Tell the tables that track readmissions which of their ids are new."""
    starts, new = segments[:, SEGMENT_START], new[new >= 0]
    ends = [*np.searchsorted(new.cpu().numpy(), starts), new.numel()]
    for i, table in enumerate(tables):
        tracker = table.evictor.readmissions
        if tracker is not None:
            new_of_segment = new[ends[i] : ends[i + 1]] - int(starts[i])
            tracker.note_new(ids[i][new_of_segment].cpu())


__all__ = ["FetchedLocalRows", "LocalRows", "find_or_insert_rows"]
