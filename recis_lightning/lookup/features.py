"""Features of a group, described as the ops take them: by segments and by a plan."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.distributed.digest import digest
from recis_lightning.distributed.nodes import nodes_of
from recis_lightning.jagged import FeatureBags
from recis_lightning.lookup.batch import Batch, SizedLines
from recis_lightning.lookup.buffers import Columns, allocate_outputs, output_runs
from recis_lightning.ops import layout as fields
from recis_lightning.ops import mapped_rows
from recis_lightning.ops.embedding_bag import MODES, Plan
from recis_lightning.ops.hash_index import Segments, point_to_rows
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import SEGMENT_SIZE
from recis_lightning.table.anchor import Anchor
from recis_lightning.table.anchor_hub import AnchorHub
from recis_lightning.table.hash_table import HashTable
from recis_lightning.table.lock import TableLock, distinct_locks
from recis_lightning.table.segment import write_segment
from recis_lightning.table.storage import Storage
from recis_lightning.table.versions import block_version, layout_version, removal_version

# For maps over hundreds of tables.
_generation, _num_rooms = map(attrgetter, ("generation", "num_rooms"))


class Feature(NamedTuple):
    """Settings of a feature's lookup.

    Attributes:
        name: The feature's name, for errors.
        table: The table that has its rows.
        mode: "none", "sum", "mean" or "tile".
        padding_idx: An id that reads as zeros, or None.
        tile_len: Rows of a bag for "tile".
        trainable: Whether gradients of its rows reach the table; the table must train, too.
        admits: Unknown ids that it inserts: those that the table's policy admits, all, or none.
        use_weights: Whether weights that come with its ids count.
        pool_at_owner: Whether ranks add up the rows that they own of its bags.
    """

    name: str
    table: HashTable
    mode: str
    padding_idx: int | None = None
    tile_len: int = 0
    trainable: bool = True
    admits: Literal["policy", "all", "none"] = "policy"
    use_weights: bool = True
    pool_at_owner: bool = False


class Source(NamedTuple):
    """A table as features with the same admission ask it: other ranks are asked once for each.

    Attributes:
        table: The table's position in ``FeatureLayout.tables``.
        admits: As for ``Feature``.
    """

    table: int
    admits: Literal["policy", "all", "none"]


class Removals(NamedTuple):
    """Counts of rows that went, to be compared with later ones.

    Attributes:
        generations: Of each table's storage.
        num_rooms: Of each table's storage.
    """

    generations: list[int]
    num_rooms: list[int]


class FeatureLayout:
    """Features of one device, dtype and dim, laid out for the ops.

    Segments (``ops.hash_index``) and plan (``ops.embedding_bag``) have a line a feature. Those for
    the sizes of the last batch are kept. Any number of threads may use a layout: a lookup writes
    to copies of its own.

    Args:
        features: They must agree on what ``kind_of`` returns, and on the process group.

    Attributes:
        names: Name of each feature.
        feature_tables: Table of each feature; always the same list, by which an update knows it.
        tables: The tables, each once.
        anchors: Of ``tables``; they say which are trained.
        storages: Of ``tables``, as index ops take them.
        pending: Pending gradients of ``tables``, the lists themselves.
        limited: Those of ``tables`` whose number of rows is limited.
        segment_tables: For each feature, its table's position in ``tables``.
        sources: Tables, each once for each of its features' ways to admit ids.
        segment_sources: For each feature, its source's position in ``sources``.
        frozen: Positions of the features that do not train, though their table does.
        unweighted: Positions of the features whose weights do not count.
        process_group: Of the tables: the ranks that they are sharded over; None means all.
        exchange_dtype: In which rows and gradients travel; None means their own.
        nodes: The nodes that they travel between, of which each asks together; or None.
        pools_at_owner: Whether owners add up rows of bags.
        row_type: (embedding_dim, dtype, device), as ops take them.
        widths: Columns of each feature's output.
        locks: Of the tables, as ``table.lock`` takes them.
        training: Segments that insert, without sizes.
        evaluation: Segments that only read, without sizes.
    """

    def __init__(self, features: Sequence[Feature]) -> None:
        self._layout_version = layout_version()
        self.features = list(features)
        self.names = [feature.name for feature in features]
        self.feature_tables = [feature.table for feature in features]
        self.tables = list(dict.fromkeys(self.feature_tables))
        self.locks = distinct_locks(table.lock for table in self.tables)
        self.anchors = [table.anchor for table in self.tables]
        self._num_changes, self._trains = -1, [True]
        self._hub: tuple[list[bool], AnchorHub] | None = None
        self.storages: Sequence[Storage] = [table.storage for table in self.tables]
        self.pending = [table.pending for table in self.tables]
        self.limited = [table for table in self.tables if table.evictor.limit is not None]
        self._mapped: tuple[int, dict[int, Header]] = (-1, {})
        self._removals: tuple[int, Removals] = (-1, Removals([], []))
        positions = {table: position for position, table in enumerate(self.tables)}
        self.segment_tables = [positions[table] for table in self.feature_tables]
        asked = [
            Source(table, feature.admits)
            for table, feature in zip(self.segment_tables, self.features, strict=True)
        ]
        numbers = {source: number for number, source in enumerate(dict.fromkeys(asked))}
        self.sources = list(numbers)
        self.segment_sources = [numbers[source] for source in asked]
        self.frozen = frozenset(i for i, feature in enumerate(features) if not feature.trainable)
        self.unweighted = [i for i, feature in enumerate(features) if not feature.use_weights]
        first = self.tables[0]
        self.embedding_dim, self.dtype, self.device = first.embedding_dim, first.dtype, first.device
        self.process_group, self.exchange_dtype = first.process_group, first.exchange_dtype
        self.nodes = nodes_of(first.ranks_per_node, first.process_group)
        self.pools_at_owner = self.features[0].pool_at_owner
        self.row_type = (self.embedding_dim, self.dtype, self.device)
        self.training = self._segments(insert=True)
        self.evaluation = self._segments(insert=False)
        self._last: SizedLines | None = None  # of the last batch
        self._has_row_per_id = np.array([feature.mode == "none" for feature in features])
        self.widths = [
            self.embedding_dim * (feature.tile_len if feature.mode == "tile" else 1)
            for feature in features
        ]
        self._prototype = torch.empty(0, dtype=self.dtype, device=self.device)
        self._plan = self._plan_without_sizes()

    def _segments(self, insert: bool) -> Segments:
        segments = np.zeros((len(self.features), SEGMENT_SIZE), np.int64)
        for line, feature in zip(segments, self.features, strict=True):
            write_segment(line, feature.table, insert, feature.padding_idx, feature.admits)
        return segments

    def _plan_without_sizes(self) -> Plan:
        plan = np.zeros((len(self.features), fields.PLAN_SIZE), np.int64)
        headers = header_addresses(self.tables)
        plan[:, fields.PLAN_HEADER] = headers[self.segment_tables]
        plan[:, fields.PLAN_MODE] = [MODES[feature.mode] for feature in self.features]
        plan[:, fields.PLAN_TILE_LEN] = [feature.tile_len for feature in self.features]
        plan[:, fields.PLAN_DATA_STRIDE] = np.array(self.widths) * self.dtype.itemsize
        return plan

    def trains(self) -> list[bool]:
        """Return for each table whether lookups leave gradients, as its anchor says now."""
        num_changes = Anchor.num_changes
        if self._num_changes != num_changes:
            self._trains = [anchor.requires_grad for anchor in self.anchors]
            self._num_changes = num_changes
        return self._trains

    def hub(self) -> AnchorHub:
        """Return what autograd knows the tables by, of which at least one trains."""
        trains, found = self.trains(), self._hub
        if found is None or found[0] != trains:
            found = self._hub = trains, AnchorHub(self.anchors)
        return found[1]

    def mapped_headers(self) -> dict[int, Header]:
        """Return the headers, by address, of tables that have rows in a mapped file."""
        version, found = self._mapped
        now = block_version()
        if version != now:
            headers = [storage.header for storage in self.storages]
            found = {header.address: header for header in filter(mapped_rows.has_any, headers)}
            self._mapped = now, found
        return found

    def bring_in(self, plan: Plan, rows: Tensor, writes: bool) -> None:
        """Read rows of a lookup that lie in mapped files into memory, many at once.

        Args:
            plan: Of the lookup, with FIRST_ID, NUM_IDS and HEADER of each line.
            rows: int64 [n], those of all lines.
            writes: Whether an update of the rows will follow.
        """
        headers = self.mapped_headers()
        if not headers:
            return
        asked = []
        columns = (fields.PLAN_HEADER, fields.PLAN_FIRST_ID, fields.PLAN_NUM_IDS)
        for address, first, count in plan[:, columns].tolist():
            if address in headers:
                asked.append((headers[address], rows[first : first + count]))
        mapped_rows.bring_in(asked, writes)

    def removals(self) -> Removals:
        """Return what the tables say of rows that went; the same object until any table says more.

        The caller has locked the tables.
        """
        version, found = self._removals
        now = removal_version()
        if version != now:
            generations = list(map(_generation, self.storages))
            found = Removals(generations, list(map(_num_rooms, self.storages)))
            self._removals = now, found
        return found

    def is_current(self) -> bool:
        """Return whether the tables' storage and locks are as they were for the layout."""
        return self._layout_version == layout_version()

    def current_locks(self) -> Sequence[TableLock]:
        """Return the locks of the tables, which an engine may have replaced since."""
        if self.is_current():
            return self.locks
        return distinct_locks(table.lock for table in self.tables)

    def check_current(self) -> None:
        """Raise if a table got another storage since; nobody else changes it from now on.

        Raises:
            RuntimeError: Another thread moved a table after this one's lookup had begun.
        """
        if self._layout_version == layout_version():
            return
        for table, storage in zip(self.tables, self.storages, strict=True):
            if table.storage is not storage:
                raise RuntimeError(
                    f"table {table.name!r} was moved by another thread while this one looked it "
                    "up; look it up again"
                )

    @cached_property
    def source_tables(self) -> list[HashTable]:
        """Table of each source."""
        return [self.tables[source.table] for source in self.sources]

    @cached_property
    def source_segments(self) -> dict[bool, Segments]:
        """Segments of the sources without padding or sizes, by whether they insert."""
        segments = np.zeros((2, len(self.sources), SEGMENT_SIZE), np.int64)
        for insert, lines in enumerate(segments):
            for line, table, source in zip(lines, self.source_tables, self.sources, strict=True):
                write_segment(line, table, bool(insert), None, source.admits)
        segments.flags.writeable = False
        return {False: segments[0], True: segments[1]}

    @cached_property
    def counts_occurrences(self) -> bool:
        """Whether it matters to a training lookup how often each id occurs."""
        return any(
            source.admits == "none"
            or self.tables[source.table].admission is not None
            or self.tables[source.table].storage.keeps_access_metadata
            for source in self.sources
        )

    @cached_property
    def signature(self) -> int:
        """Number by which ranks recognise the features."""
        settings = [
            (f.table.name, f.table.seed, f.mode, f.padding_idx, f.tile_len, f.admits, f.trainable)
            for f in self.features
        ]
        exchanged = kind_of(self.features[0])[3:]
        return digest((settings, self.embedding_dim, self.dtype, *exchanged))

    def lines_for(self, bags: FeatureBags) -> SizedLines:
        """Return segments and plan for a batch: those of the last one, if it had the same sizes."""
        shapes = [(bag.num_bags, bag.bag_length) for bag in bags.details]
        lines = self._last
        if lines is not None and bags.sizes == lines.sizes and shapes == lines.shapes:
            return lines
        if lines is not None and shapes and shapes == lines.shapes:  # of ragged ones, as a rule
            lines = lines.resized(bags.sizes, self._has_row_per_id)
        else:
            lines = self._make_lines(bags.sizes, shapes)
        self._last = lines  # other threads may do the same; whose are kept does not matter
        return lines

    def _make_lines(self, sizes: Sequence[int], shapes: Sequence[tuple[int, int]]) -> SizedLines:
        num_ids = num_bags = np.array(sizes, np.int64)
        lengths = np.ones_like(num_ids)
        if shapes:
            num_bags, lengths = np.array(shapes, np.int64).T
        plan = self._plan.copy()
        plan[:, fields.PLAN_NUM_BAGS] = num_bags
        plan[:, fields.PLAN_BAG_LENGTH] = np.where(self._has_row_per_id, 1, lengths)
        ragged = np.flatnonzero(lengths < 0)
        offset_counts = num_bags[ragged] + 1
        offset_ends = np.cumsum(offset_counts)
        lines = SizedLines(
            [],
            shapes,
            0,
            plan,
            self.training,
            self.evaluation,
            [],
            num_ids,
            ragged.tolist(),
            ragged[~self._has_row_per_id[ragged]].tolist(),
            offset_ends - offset_counts,
            offset_ends - 1,
            num_ids,
            {},
        )
        return lines.resized(sizes, self._has_row_per_id)

    def allocate(self, batch: Batch) -> tuple[list[Tensor], Plan]:
        """Return uninitialised outputs, and the plan that fills them once it points to rows."""
        lines = batch.lines
        plan, runs = lines.plan.copy(), lines.kept.get("runs")
        if runs is None:
            runs = output_runs(lines.num_bags, self.widths, self.dtype.itemsize)
            lines.kept["runs"] = runs
        outputs = allocate_outputs(runs, self._prototype)
        plan[:, fields.PLAN_DATA] = list(map(Tensor.data_ptr, outputs))
        if batch.bags.details:
            batch.enter_arguments(plan)
        return outputs, plan

    def fill_columns(self, batch: Batch, columns: Columns) -> Plan:
        """Return the plan that fills columns once it points to rows."""
        plan = batch.lines.plan.copy()
        plan[:, fields.PLAN_DATA] = columns.addresses()
        plan[:, fields.PLAN_DATA_STRIDE] = columns.stride_bytes()
        if batch.bags.details:
            batch.enter_arguments(plan)
        return plan


def kind_of(feature: Feature) -> tuple[Any, ...]:
    """Return what the features of a group have in common."""
    table = feature.table
    exchanged = table.exchange_dtype, table.ranks_per_node, feature.pool_at_owner
    return table.device, table.dtype, table.embedding_dim, *exchanged


def header_addresses(tables: Sequence[HashTable]) -> npt.NDArray[np.int64]:
    """Return where kernels find the header of each table, int64 [num_tables]."""
    return np.array([table.storage.header.address for table in tables], np.int64)


def listed(names: Sequence[str]) -> str:
    """Name tables, a few of many.

    Example:
        >>> listed(["user"]), listed(list("abcdef"))
        ("['user']", "['a', 'b', 'c'] and 3 more")
    """
    return repr(names) if len(names) <= 4 else f"{names[:3]} and {len(names) - 3} more"


__all__ = [
    "Feature",
    "FeatureLayout",
    "Source",
    "header_addresses",
    "kind_of",
    "listed",
    "point_to_rows",
]
