"""Every op in plain torch: the oracle of the kernels.

It works on the same memory as they do, so a table may be used under both backends in turn. Sums
are taken in float64 and rounded once: what a kernel may differ by is its own rounding. Clear comes
before fast; what a contract promises is said in the contract's file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import embedding_bag as bags
from recis_lightning.ops import row_init, row_update
from recis_lightning.ops import table_header as fields
from recis_lightning.ops.admission import Screen
from recis_lightning.ops.embedding_bag import Plan
from recis_lightning.ops.hash_index import Segments, Table
from recis_lightning.ops.reference_admission import forget_, screen, stamp_
from recis_lightning.ops.reference_index import Index, mix, segments_of, shift_right, signed
from recis_lightning.ops.reference_storage import (
    Rows,
    count_distinct,
    float_field,
    header_at,
    memory,
    read_columns,
    state_of,
    weights_of,
    write_columns_,
)
from recis_lightning.ops.row_update import Gradients, RowLayout
from recis_lightning.ops.table_header import CLAIMED, EMPTY, MISSING, NO_ROW, PADDING, UNKNOWN

# ---- hash_index (admission: reference_admission)


def allocate_entries(capacity: int, device: torch.device) -> Tensor:
    """See ``hash_index.empty_entries``: entries without ids."""
    return torch.tensor([[EMPTY, NO_ROW]], device=device).repeat(capacity + 1, 1)


def _look_up(segments: Segments, num_ids: int, missing: int) -> Tensor:
    rows = torch.empty(num_ids, dtype=torch.int64)
    for segment in segments_of(segments, num_ids):
        found = Index.of(segment.header).rows(segment.ids)
        found[found == NO_ROW] = missing if segment.inserts else UNKNOWN
        if segment.padding is not None:
            found[segment.ids == segment.padding] = PADDING
        rows[segment.start : segment.start + segment.ids.numel()] = found
    return rows


def find(segments: Segments, num_ids: int, device: torch.device) -> Tensor:
    """See ``hash_index.find``."""
    return _look_up(segments, num_ids, UNKNOWN)


def find_or_insert(
    segments: Segments,
    num_ids: int,
    tables: Sequence[Table],
    segment_tables: Sequence[int],
    screen: Screen | None,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """See ``hash_index.find_or_insert``; room is made for all tables before an id is added."""
    rows = _look_up(segments, num_ids, MISSING)
    for segment in segments_of(segments, num_ids):
        refused = rows[segment.start : segment.start + segment.ids.numel()] == UNKNOWN
        segment.header[fields.NUM_REFUSED] += refused.sum()
    if screen is not None:
        screen((rows == MISSING).nonzero().squeeze(1), rows)
    owner = torch.tensor(segment_tables)[_segment_of(torch.arange(num_ids), segments)]
    ids = torch.cat([segment.ids for segment in segments_of(segments, num_ids)])
    new = {}
    for number in range(len(tables)):
        misses = ((rows == MISSING) & (owner == number)).nonzero().squeeze(1)
        _, first = np.unique(ids[misses].numpy(), return_index=True)
        if len(first):
            new[number] = misses[np.sort(first)]
    for number, positions in new.items():
        tables[number].reserve_ids(positions.numel())
        tables[number].reserve_rows(positions.numel())
    for number, positions in new.items():
        header = tables[number].header
        Index.of(header).add(ids[positions], _take_rows(header, positions.numel()))
    found = _look_up(segments, num_ids, UNKNOWN)
    rows = torch.where(rows == MISSING, found, rows)
    for segment in segments_of(segments, num_ids):
        if int(segment.header[fields.LAST_SEEN]):
            seen = rows[segment.start : segment.start + segment.ids.numel()]
            seen = seen[seen >= 0]
            count = int(seen.max()) + 1 if seen.numel() else 0
            stamps = memory(int(segment.header[fields.LAST_SEEN]), count, torch.int64)
            stamps[seen] = segment.header[fields.STEP]
    return rows, torch.cat(list(new.values())).sort().values if new else None


def _segment_of(positions: Tensor, segments: Segments) -> Tensor:
    """Return the segment of each position; an empty segment has none."""
    starts = torch.from_numpy(segments[:, fields.SEGMENT_START].copy())
    return torch.searchsorted(starts, positions, right=True) - 1


def _take_rows(header: Tensor, count: int) -> Tensor:
    """Hand out rows: freed ones from the top of the stack, then those never used."""
    num_free, next_row = int(header[fields.NUM_FREE]), int(header[fields.NEXT_ROW])
    reused = min(num_free, count)
    stack = memory(int(header[fields.FREE_ROWS]), num_free, torch.int64)
    fresh = torch.arange(next_row, next_row + count - reused)
    header[fields.NUM_FREE] -= reused
    header[fields.NEXT_ROW] += count - reused
    header[fields.NUM_IDS] += count
    return torch.cat([stack[num_free - reused :].flip(0), fresh])


def rebuild(old: tuple[int, int], header: Tensor, evicted: Tensor | None) -> int:
    """See ``hash_index.rebuild``; ``old`` is (address, capacity) of the entries to move."""
    entries = Index(*old).entries
    entries = entries[entries[:, 1] < CLAIMED]
    leaving = torch.zeros(len(entries), dtype=torch.bool)
    if evicted is not None:
        leaving = evicted[entries[:, 1]]
        evicted.zero_()
        evicted[entries[leaving, 1]] = True
    Index.of(header).add(entries[~leaving, 0], entries[~leaving, 1])
    return int(leaving.sum())


def id_of_row(header: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """See ``hash_index.id_of_row``."""
    entries = Index.of(header).entries
    entries = entries[entries[:, 1] != NO_ROW]
    ids, occupied = (
        torch.zeros(num_rows, dtype=torch.int64),
        torch.zeros(num_rows, dtype=torch.bool),
    )
    ids[entries[:, 1]], occupied[entries[:, 1]] = entries[:, 0], True
    return ids, occupied


# ---- row_init

_COLUMN = signed(0x9E3779B97F4A7C15)


def _initial_weights(header: Tensor, ids: Tensor, embedding_dim: int) -> Tensor:
    """Return the first weights of ids, float64 [n, embedding_dim]."""
    bits = mix(mix(ids) ^ header[fields.INIT_KEY])[:, None] + torch.arange(embedding_dim) * _COLUMN
    uniform = (2 * shift_right(mix(bits), 41) + 1).double() * 2.0**-24
    kind = int(header[fields.INIT_KIND])
    first, second, low, high = (float_field(header, fields.INIT_ARGS + i) for i in range(4))
    if kind == row_init.CONSTANT:
        return torch.full_like(uniform, first)
    if kind == row_init.UNIFORM:
        return first + (second - first) * uniform
    # x is uniform over the values of erf that the distribution reaches.
    start, end = -1.0, 1.0
    if kind == row_init.TRUNCATED_NORMAL:
        start, end = math.erf(low * math.sqrt(0.5)), math.erf(high * math.sqrt(0.5))
    else:
        low, high = -math.inf, math.inf
    x = start + (end - start) * uniform
    return first + second * (math.sqrt(2) * torch.erfinv(x)).clamp(low, high)


def init_rows_(
    rows: Tensor, new: Tensor, segments: Segments, embedding_dim: int, bfloat16: bool
) -> None:
    """See ``row_init.init_rows_``."""
    owner = _segment_of(new, segments)
    for number, (start, ids, header, *_) in enumerate(segments_of(segments, rows.numel())):
        positions = new[owner == number]
        mine = rows[positions]
        store = Rows.of(header, mine)
        words = torch.zeros(mine.numel(), store.words)
        initial = _initial_weights(header, ids[positions - start], embedding_dim)
        weights_of(words, embedding_dim, bfloat16).copy_(initial.float())
        state_of(words, embedding_dim, bfloat16).fill_(float_field(header, fields.STATE_FILL))
        store.write(mine, words)


# ---- embedding_bag


class _Feature:
    """One line of a plan, with its rows and how they fall into bags."""

    def __init__(self, line: npt.NDArray[np.int64]) -> None:
        self.line = line
        self.mode, self.num_bags = int(line[bags.MODE]), int(line[bags.NUM_BAGS])
        self.rows = memory(int(line[bags.ROWS]), int(line[bags.NUM_IDS]), torch.int64)
        self.tile_len = int(line[bags.TILE_LEN])
        count = self.rows.numel()
        length = int(line[bags.BAG_LENGTH])
        if length >= 0:
            self.offsets = torch.arange(self.num_bags + 1) * length
        else:
            self.offsets = memory(int(line[bags.OFFSETS]), self.num_bags + 1, torch.int64)
        sizes = self.offsets.diff()
        ends = (int(self.offsets[0]), int(self.offsets[-1]))
        self.is_whole = ends == (0, count) and bool((sizes >= 0).all())
        if self.is_whole:
            self.bag = torch.repeat_interleave(torch.arange(self.num_bags), sizes)
            self.place = torch.arange(count) - self.offsets[self.bag]
            self.used = self.rows >= 0
            if self.mode == bags.TILE:
                self.used &= self.place < self.tile_len

    def scales(self) -> Tensor:
        """Return what each id's row is multiplied by on its way into the output, float64 [n]."""
        scales = torch.ones(self.rows.numel(), dtype=torch.float64)
        if self.line[bags.WEIGHTS]:
            scales *= memory(int(self.line[bags.WEIGHTS]), scales.numel(), torch.float32)
        if self.mode == bags.MEAN:
            counted = scales * (self.rows != PADDING)
            total = torch.zeros(self.num_bags, dtype=torch.float64).index_add_(0, self.bag, counted)
            scales = torch.where(total == 0, 0.0, 1 / total)[self.bag] * scales
        return scales

    def data(self, embedding_dim: int, dtype: torch.dtype) -> Tensor:
        """View the output, or its gradient, [num_bags, tile_len or 1, embedding_dim]."""
        tiles = self.tile_len if self.mode == bags.TILE else 1
        width, stride = tiles * embedding_dim, int(self.line[bags.DATA_STRIDE]) // dtype.itemsize
        reach = (self.num_bags - 1) * stride + width if self.num_bags else 0
        flat = memory(int(self.line[bags.DATA]), reach, dtype)
        return flat.as_strided((self.num_bags, tiles, embedding_dim), (stride, embedding_dim, 1))

    def tile(self) -> Tensor:
        """Return which of its bag's tiles each id goes to; 0 where there is but one."""
        return self.place if self.mode == bags.TILE else torch.zeros_like(self.place)


def gather(plan: Plan, embedding_dim: int, bfloat16: bool, device: torch.device) -> int:
    """See ``embedding_bag.gather``; returns a feature with malformed offsets, or -1."""
    features = [_Feature(line) for line in plan]
    for number, feature in enumerate(features):
        if not feature.is_whole:
            return number
    for feature in features:
        header = header_at(int(feature.line[bags.HEADER]))
        words = Rows.of(header, feature.rows).read(feature.rows)
        values = weights_of(words, embedding_dim, bfloat16).double() * feature.scales()[:, None]
        out = feature.data(embedding_dim, torch.bfloat16 if bfloat16 else torch.float32)
        total = torch.zeros(out.shape, dtype=torch.float64)
        used = feature.used
        places = (feature.bag[used], feature.tile()[used])
        out.copy_(total.index_put_(places, values[used], accumulate=True).float())
    return -1


def write_rows_(header: Tensor, rows: Tensor, values: Tensor) -> None:
    """See ``embedding_bag.write_rows_``."""
    store = Rows.of(header, rows)
    words = store.read(rows)
    num_bytes = values.shape[1] * values.element_size()
    words.view(torch.uint8)[:, :num_bytes] = values.view(torch.uint8)
    store.write(rows, words)


# ---- row_update


class _Reduced(NamedTuple):
    """Rows that have a gradient, int64 [n] ascending, and their gradients, float64 [n, dim]."""

    rows: Tensor
    gradients: Tensor


def sort_gradients(
    plan: Plan,
    blocks: npt.NDArray[np.int64],
    layout: RowLayout,
    blocks_on_device: Tensor | None,
) -> _Reduced:
    """See ``row_update.sort_gradients``; here the gradients are reduced at once."""
    rows, gradients = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, layout.embedding_dim)]
    for feature in (_Feature(line) for line in plan):
        used = feature.used
        data = feature.data(layout.embedding_dim, torch.float32)
        picked = data[feature.bag[used], feature.tile()[used]]
        gradients.append(picked * feature.scales()[used, None])
        rows.append(feature.rows[used] + int(feature.line[bags.FLAT_BASE]))
    distinct, which = torch.unique(torch.cat(rows), return_inverse=True)
    total = torch.zeros(distinct.numel(), layout.embedding_dim, dtype=torch.float64)
    return _Reduced(distinct, total.index_add_(0, which, torch.cat(gradients).double()))


def squared_norm(gradients: Gradients) -> float:
    """See ``row_update.squared_norm``."""
    assert isinstance(gradients.work, _Reduced)
    return float(gradients.work.gradients.square().sum())


def update_rows_(gradients: Gradients, rule: int) -> None:
    """See ``row_update.update_rows_``."""
    layout, dim = gradients.layout, gradients.layout.embedding_dim
    bfloat16 = layout.dtype is torch.bfloat16
    assert isinstance(gradients.work, _Reduced)
    rows, g = gradients.work
    blocks = torch.from_numpy(gradients.blocks)
    store = Rows(blocks[:, 0], layout.block_shift, layout.row_bytes)
    hypers = [memory(int(at), row_update.HYPER_SIZE, torch.float32) for at in blocks[:, 1]]
    hyper = torch.stack(hypers)[rows >> layout.block_shift]
    words = store.read(rows)
    weights, state = weights_of(words, dim, bfloat16), state_of(words, dim, bfloat16)
    w, field = weights.double(), hyper.double().unbind(1)
    lr, eps, share1, share2, inv_sqrt_bias2, decay, scale, clip = (f[:, None] for f in field)
    g = torch.minimum(torch.maximum(g * scale, -clip), clip)
    if rule == row_update.SGD:
        w = w * decay - lr * g
    elif rule in (row_update.ADAGRAD, row_update.ROWWISE_ADAGRAD):
        squares = g.square()
        s = state.double()
        s = s + (squares if rule == row_update.ADAGRAD else squares.mean(1, keepdim=True))
        state.copy_(s)
        w = w - lr * g / (s.sqrt() + eps)
    else:
        m, v = state[:, :dim].double(), state[:, dim:].double()
        m, v = m + share1 * (g - m), v + share2 * (g.square() - v)
        state.copy_(torch.cat([m, v], 1))
        w = w * decay - lr * m / (v.sqrt() * inv_sqrt_bias2 + eps)
    weights.copy_(w.float())
    store.write(rows, words)


__all__ = [
    "allocate_entries",
    "count_distinct",
    "find",
    "find_or_insert",
    "forget_",
    "gather",
    "id_of_row",
    "init_rows_",
    "read_columns",
    "rebuild",
    "screen",
    "sort_gradients",
    "squared_norm",
    "stamp_",
    "update_rows_",
    "write_columns_",
    "write_rows_",
]
