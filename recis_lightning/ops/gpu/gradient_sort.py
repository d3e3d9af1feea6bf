"""Sorting of an update's positions by row, and their split into pieces, in Triton.

torch sorts (a stable radix sort). A row's positions are then contiguous, in the order of the batch.
Every ``PIECE``-th index of the sorted positions starts a new piece, so that many programs share a
row that has very many of them, and always in the same way.
"""

from typing import NamedTuple

import numpy as np
import torch
import triton.language as tl

from recis_lightning.ops import layout as fields
from recis_lightning.ops.gpu.embedding_bag import (
    bag_ends,
    is_aligned,
    scale_of,
    share_of,
    split_plan,
)
from recis_lightning.ops.gpu.layout import (
    MEAN,
    MEAN_BY_COUNT,
    PADDING,
    PLAN_BYTES,
    PLAN_DATA,
    PLAN_DATA_STRIDE,
    PLAN_FIRST_CHUNK,
    PLAN_FIRST_ID,
    PLAN_FLAT_BASE,
    PLAN_MODE,
    PLAN_NUM_BAGS,
    PLAN_ROWS,
    PLAN_TILE_LEN,
    PLAN_WEIGHTS,
    TILE,
)
from recis_lightning.ops.gpu.prefix_sum import add_up_
from recis_lightning.ops.gpu.runtime import (
    device_function,
    field,
    float_at,
    int64_at,
    kernel,
    lanes,
    largest,
    line_of,
    stage,
    sum_over,
    sums_up_to,
)

PIECE = 32
_BAGS = lanes(128, 4096)
_LANES = lanes(256, 1 << 16)


@device_function
def key_at(keys, i, mask, WIDE: tl.constexpr):
    """Load sorted rows, int64."""
    if WIDE:
        return tl.load(int64_at(keys + 8 * i), mask, -1)
    return tl.load((keys + 4 * i).to(tl.pointer_type(tl.int32)), mask, -1).to(tl.int64)


@kernel(
    *(
        {"SCALED": scaled, "WIDE": wide, "BAGS": 128}
        for scaled, wide in ((True, True), (False, False))
    )
)
def _key_kernel(
    plan: tl.int64,
    num_features: tl.int64,
    keys: tl.int64,
    addresses: tl.int64,
    scales: tl.int64,
    num_rows: tl.int64,
    dim_bytes: tl.int64,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    BAGS: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    line = line_of(plan, num_features, PLAN_BYTES, PLAN_FIRST_CHUNK, chunk)
    mode, rows, weights = field(line, PLAN_MODE), field(line, PLAN_ROWS), field(line, PLAN_WEIGHTS)
    tile_len, first = field(line, PLAN_TILE_LEN), field(line, PLAN_FIRST_ID)
    bag = (chunk - field(line, PLAN_FIRST_CHUNK)) * BAGS + tl.arange(0, BAGS)
    start, end = bag_ends(line, bag, bag < field(line, PLAN_NUM_BAGS))
    most = largest(end - start)
    divisor = tl.full((BAGS,), 1.0, tl.float32)
    if SCALED:
        if (mode == MEAN) | (mode == MEAN_BY_COUNT):
            divisor = divisor - 1
            step = most * 0
            while step < most:
                on = start + step < end
                row = tl.load(int64_at(rows + 8 * (start + step)), on, PADDING)
                scale = scale_of(weights, start + step, on)
                divisor += tl.where(row != PADDING, share_of(mode, scale, on), 0.0)
                step += 1
    address = field(line, PLAN_DATA) + bag * field(line, PLAN_DATA_STRIDE)
    step = most * 0
    while step < most:
        i = start + step
        on = i < end
        row = tl.load(int64_at(rows + 8 * i), on, -1)
        used = (row >= 0) & ((mode != TILE) | (step < tile_len))
        key = tl.where(used, row + field(line, PLAN_FLAT_BASE), num_rows)
        if WIDE:
            tl.store(int64_at(keys + 8 * (first + i)), key, on)
        else:
            at = (keys + 4 * (first + i)).to(tl.pointer_type(tl.int32))
            tl.store(at, key.to(tl.int32), on)
        tl.store(int64_at(addresses + 8 * (first + i)), address, on)
        if mode == TILE:
            address += dim_bytes
        if SCALED:
            scale = scale_of(weights, i, on)
            scale = tl.where(divisor == 0, 0.0, scale / tl.where(divisor == 0, 1.0, divisor))
            tl.store(float_at(scales + 4 * (first + i)), scale, on)
        step += 1


@device_function
def _starts_piece(keys, i, n, num_rows, WIDE: tl.constexpr, PIECE: tl.constexpr):
    inside = i < n
    key = key_at(keys, i, inside, WIDE)
    before = key_at(keys, i - 1, inside & (i > 0), WIDE)
    return inside & ((key != before) | (i % PIECE == 0)) & (key < num_rows)


_PIECE_VARIANTS = [{"WIDE": wide, "PIECE": PIECE, "LANES": 256} for wide in (True, False)]


@kernel(*_PIECE_VARIANTS)
def _count_pieces_kernel(
    keys: tl.int64,
    counts: tl.int64,
    n: tl.int64,
    num_rows: tl.int64,
    WIDE: tl.constexpr,
    PIECE: tl.constexpr,
    LANES: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    starts = _starts_piece(keys, chunk * LANES + tl.arange(0, LANES), n, num_rows, WIDE, PIECE)
    tl.store(int64_at(counts + 8 * chunk), sum_over(starts.to(tl.int64), 0))


@kernel(*({**variant, "SCALED": variant["WIDE"]} for variant in _PIECE_VARIANTS))
def _list_pieces_kernel(
    keys: tl.int64,
    counts: tl.int64,
    n: tl.int64,
    num_rows: tl.int64,
    pieces: tl.int64,
    order: tl.int64,
    addresses: tl.int64,
    sorted_addresses: tl.int64,
    scales: tl.int64,
    sorted_scales: tl.int64,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    PIECE: tl.constexpr,
    LANES: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    i = chunk * LANES + tl.arange(0, LANES)
    starts = _starts_piece(keys, i, n, num_rows, WIDE, PIECE)
    piece = field(counts, chunk) + sums_up_to(starts.to(tl.int64))
    tl.store(int64_at(pieces + 8 * (piece - 1)), i, starts)
    # Behind the last piece follows its end: the first id without a row, or the end of all.
    key = key_at(keys, i, i < n, WIDE)
    following = key_at(keys, i + 1, i + 1 < n, WIDE)
    is_last = (i < n) & (key < num_rows) & ((i + 1 == n) | (following >= num_rows))
    tl.store(int64_at(pieces + 8 * piece), i + 1, is_last)
    # The update then asks for a gradient as soon as it knows its piece.
    has_row = (i < n) & (key < num_rows)
    position = tl.load(int64_at(order + 8 * i), has_row, 0)
    address = tl.load(int64_at(addresses + 8 * position), has_row, 0)
    tl.store(int64_at(sorted_addresses + 8 * i), address, has_row)
    if SCALED:
        scale = tl.load(float_at(scales + 4 * position), has_row, 0)
        tl.store(float_at(sorted_scales + 4 * i), scale, has_row)


class _Traits(NamedTuple):
    """Traits that plans share which differ in addresses alone."""

    num_ids: int
    is_ragged: bool
    has_means: bool


def _traits_of(plan):
    return _Traits(
        int(plan[:, fields.PLAN_NUM_IDS].sum()),
        bool(plan[:, fields.PLAN_BAG_LENGTH].min(initial=0) < 0),
        bool(np.isin(plan[:, fields.PLAN_MODE], (fields.MEAN, fields.MEAN_BY_COUNT)).any()),
    )


class SortedGradients:
    """Gradients on the device between sorting and updating.

    Attributes:
        n: Number of positions.
        num_rows: Number of rows in all blocks, and the key of ids without a row.
        keys: int32 or int64 [n], rows in ascending order; ids without one are at the end.
        wide: Whether keys are int64.
        sorted_addresses: Address of int64 [n], each key's gradient's address.
        sorted_scales: Address of float32 [n], each key's gradient's factor; 0 if all are 1.
        pieces: int64 [num_pieces + 1], start of each piece and end of the last one; the
            tensor is longer.
        num_pieces: Address of int64 [1].
        blocks: int64 [num_blocks, 2].
        hypers: What is added to the second column of ``blocks`` for a table's hyperparameters.
        aligned: Whether all gradients lie at multiples of 16 bytes.
    """

    def __init__(self, plan, blocks, layout, blocks_on_device, hyper, kept):
        self.device = device = layout.device
        traits = None if kept is None else kept.get("traits")
        if traits is None:
            traits = _traits_of(plan)
            if kept is not None:
                kept["traits"] = traits
        self.n = n = traits.num_ids
        self.num_rows = num_rows = len(blocks) << layout.block_shift
        self.blocks = stage(blocks, device) if blocks_on_device is None else blocks_on_device
        self.aligned = is_aligned(plan, 4 * layout.embedding_dim)
        self.wide = num_rows >= 2**31 - 1
        dtype = torch.int64 if self.wide else torch.int32
        if traits.is_ragged:
            # Malformed offsets, which are reported later, may leave ids out: these have no row.
            keys = torch.full((n,), num_rows, dtype=dtype, device=device)
        else:
            keys = torch.empty(n, dtype=dtype, device=device)
        is_scaled = traits.has_means or any(plan[:, fields.PLAN_WEIGHTS].tolist())
        # One allocation each for what the sort reads and what it leads to.
        unsorted = torch.empty(n + (n + 1) // 2 * is_scaled, dtype=torch.int64, device=device)
        addresses = unsorted.data_ptr()
        scales = addresses + 8 * n if is_scaled else 0
        num_programs = split_plan(plan, _BAGS)
        address = self._send(plan, hyper)
        _key_kernel.launch(
            device,
            num_programs,
            address,
            len(plan),
            keys.data_ptr(),
            addresses,
            scales,
            num_rows,
            4 * layout.embedding_dim,
            SCALED=is_scaled,
            WIDE=self.wide,
            BAGS=_BAGS,
        )
        self.keys, order = torch.sort(keys, stable=True)
        self._split(order, unsorted, addresses, scales)

    def _send(self, plan, hyper):
        """Send plan and hyperparameters in one copy; return where the plan is."""
        if hyper is None:
            self._sent, self.hypers = stage(plan, self.device), 0
            return self._sent.data_ptr()
        sent = np.empty(plan.size + hyper.size // 2, np.int64)
        sent[: plan.size] = plan.reshape(-1)
        sent[plan.size :] = hyper.view(np.int64).reshape(-1)
        self._sent = stage(sent, self.device)
        address = self._sent.data_ptr()
        self.hypers, self._hyper_shape = address + 8 * plan.size, hyper.shape
        return address

    @property
    def hyper(self):
        """Hyperparameters on the device, float32 [num_tables, HYPER_SIZE]."""
        rows, columns = self._hyper_shape
        return self._sent[-rows * columns // 2 :].view(torch.float32).view(rows, columns)

    def _split(self, order, unsorted, addresses, scales):
        n, programs = self.n, -(-self.n // _LANES)
        # One allocation: the pieces, how many of them each program finds, addresses and scales.
        size = 2 * n + programs + 2 + unsorted.numel() - n
        self.pieces = torch.empty(size, dtype=torch.int64, device=self.device)
        pieces = self.pieces.data_ptr()
        counts = pieces + 8 * (n + 1)
        self.num_pieces = counts + 8 * programs
        self.sorted_addresses = self.num_pieces + 8
        self.sorted_scales = self.sorted_addresses + 8 * n if scales else 0
        where = (self.keys.data_ptr(), counts, n, self.num_rows)
        constants = {"WIDE": self.wide, "PIECE": PIECE, "LANES": _LANES}
        _count_pieces_kernel.launch(self.device, programs, *where, **constants)
        add_up_(self.device, counts, programs)
        _list_pieces_kernel.launch(
            self.device,
            programs,
            *where,
            pieces,
            order.data_ptr(),
            addresses,
            self.sorted_addresses,
            scales,
            self.sorted_scales,
            SCALED=scales != 0,
            **constants,
        )


__all__ = ["PIECE", "SortedGradients", "key_at"]
