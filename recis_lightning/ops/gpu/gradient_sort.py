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
from recis_lightning.ops.async_copy import copy_async_
from recis_lightning.ops.gpu.embedding_bag import (
    are_sixteens,
    bag_ends,
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
    """Gradients on the device between sorting and updating, and the memory that they are sorted in.

    Other plans that differ in addresses alone may be sorted in the same memory, behind what was
    launched for the one before: then all launches of a steady step have the same arguments.

    Args:
        plan: The first plan, as for ``ops.row_update.sort_gradients``, and so what follows.
        blocks: Where the rows' blocks and their tables' hyperparameters are.
        layout: Layout of the rows.
        blocks_on_device: ``blocks`` on the device, or None.
        hyper: Hyperparameters, or None.
        traits: Of the plan.
        is_scaled: Whether any gradient has a factor.

    Attributes:
        n: Number of positions.
        num_rows: Number of rows in all blocks, and the key of ids without a row.
        keys: int32 or int64 [n], rows in ascending order; ids without one are at the end.
        wide: Whether keys are int64.
        sorted_addresses: Address of int64 [n], each key's gradient's address.
        sorted_scales: Address of float32 [n], each key's gradient's factor; 0 if all are 1.
        pieces: Address of int64 [num_pieces + 1], start of each piece and end of the last one.
        num_pieces: Address of int64 [1].
        blocks: int64 [num_blocks, 2].
        hypers: What is added to the second column of ``blocks`` for a table's hyperparameters.
        aligned: Whether all gradients lie at multiples of 16 bytes.
        updates: Launches of ``ops.gpu.row_update``, by what else they depend on.
        partial_sums: Memory of all these updates, float32.
    """

    def __init__(self, plan, blocks, layout, blocks_on_device, hyper, traits, is_scaled):
        self.device = device = layout.device
        self.n = n = traits.num_ids
        self.num_rows = len(blocks) << layout.block_shift
        self.wide = self.num_rows >= 2**31 - 1
        self.blocks = stage(blocks, device) if blocks_on_device is None else blocks_on_device
        self.updates, self.partial_sums = {}, None
        self._hyper, self._is_scaled, self._stream = hyper, is_scaled, _stream_of(device)
        self._is_ragged, self._dim_bytes = traits.is_ragged, 4 * layout.embedding_dim
        self._num_programs = split_plan(plan, _BAGS)
        self._first_chunks = plan[:, fields.PLAN_FIRST_CHUNK].copy()
        sizes = plan.size, 0 if hyper is None else hyper.size // 2
        self._values = np.empty(sum(sizes), np.int64)
        self._plan = self._values[: plan.size].reshape(plan.shape)
        # Views of what is sent and of hyperparameters: to make one takes as long as to use it.
        self._chunks_to = self._plan[:, fields.PLAN_FIRST_CHUNK]
        self._data = self._plan[:, fields.PLAN_DATA : fields.PLAN_DATA_STRIDE + 1]
        if hyper is not None:
            self._hyper_from = hyper.view(np.int64)
            self._hyper_to = self._values[plan.size :].reshape(self._hyper_from.shape)
        dtype = torch.int64 if self.wide else torch.int32
        # Malformed offsets, which are reported later, may leave ids out: these have no row.
        self._keys = torch.full((n,), self.num_rows, dtype=dtype, device=device)
        self.keys = torch.empty(n, dtype=dtype, device=device)
        self._order = torch.empty(n, dtype=torch.int64, device=device)
        self._enter(plan)
        self._sent = stage(self._values, device)
        self._prepare_launches(len(plan))
        self._launch()

    def sort(self, plan):
        """Sort the positions of another plan."""
        self._enter(plan)
        copy_async_(self._sent, self._values)
        if self._is_ragged:
            self._keys.fill_(self.num_rows)
        self._launch()

    def fits(self, blocks_on_device, hyper, is_scaled):
        """Return whether another plan, with the traits of the first, can be sorted here.

        Args:
            blocks_on_device: As for the first plan, and so what follows.
            hyper: Hyperparameters.
            is_scaled: Whether any gradient has a factor.
        """
        return (
            self.blocks is blocks_on_device
            and self._hyper is hyper
            and self._is_scaled == is_scaled
            and self._stream == _stream_of(self.device)
        )

    def num_bytes(self):
        """Return the bytes of its memory, that of updates included."""
        parts = self._keys, self.keys, self._order, self._memory
        return sum(part.nbytes for part in parts) + 2 * -(-self.n // PIECE) * self._dim_bytes

    def _enter(self, plan):
        """Enter what is sent for a plan: all of it, and hyperparameters."""
        self._plan[:] = plan
        self._chunks_to[:] = self._first_chunks
        if self._hyper is not None:
            self._hyper_to[:] = self._hyper_from
        self.aligned = self._dim_bytes % 16 == 0 and are_sixteens(self._data)

    @property
    def hyper(self):
        """Hyperparameters on the device, float32 [num_tables, HYPER_SIZE]."""
        shape = self._hyper.shape
        return self._sent[self._plan.size :].view(torch.float32).view(shape)

    def _prepare_launches(self, num_features):
        n, is_scaled, programs = self.n, self._is_scaled, -(-self.n // _LANES)
        # One allocation: the pieces, how many of them each program finds, and addresses and scales
        # before they are sorted and after.
        scale_words = (n + 1) // 2 * is_scaled
        size = n + 1 + programs + 1 + 2 * (n + scale_words)
        self._memory = torch.empty(size, dtype=torch.int64, device=self.device)
        self.pieces = self._memory.data_ptr()
        counts = self.pieces + 8 * (n + 1)
        self.num_pieces = counts + 8 * programs
        addresses = self.num_pieces + 8
        scales = addresses + 8 * n if is_scaled else 0
        self.sorted_addresses = addresses + 8 * (n + scale_words)
        self.sorted_scales = self.sorted_addresses + 8 * n if is_scaled else 0
        sent = self._sent.data_ptr()
        self.hypers = 0 if self._hyper is None else sent + 8 * self._plan.size
        unsorted, dim_bytes = self._keys.data_ptr(), self._dim_bytes
        self._key_numbers = (
            *(self._num_programs, sent, num_features),
            *(unsorted, addresses, scales, self.num_rows, dim_bytes),
        )
        self._key_constants = {"SCALED": is_scaled, "WIDE": self.wide, "BAGS": _BAGS}
        self._counts = counts, programs
        self._piece_numbers = programs, self.keys.data_ptr(), counts, n, self.num_rows
        self._piece_constants = {"WIDE": self.wide, "PIECE": PIECE, "LANES": _LANES}
        order = self._order.data_ptr()
        self._list_numbers = (
            *(*self._piece_numbers, self.pieces, order),
            *(addresses, self.sorted_addresses, scales, self.sorted_scales),
        )

    def _launch(self):
        device = self.device
        _key_kernel.launch(device, *self._key_numbers, **self._key_constants)
        torch.sort(self._keys, stable=True, out=(self.keys, self._order))
        constants = self._piece_constants
        _count_pieces_kernel.launch(device, *self._piece_numbers, **constants)
        add_up_(device, *self._counts)
        _list_pieces_kernel.launch(device, *self._list_numbers, SCALED=self._is_scaled, **constants)


_KEPT_BYTES = 1 << 24
"""Memory that may be kept between steps. It saves the host time, which matters to small ones."""


def sort_gradients(plan, blocks, layout, blocks_on_device, hyper, kept):
    """Sort gradients as ``ops.row_update`` has it; return ``SortedGradients``."""
    traits = None if kept is None else kept.get("traits")
    if traits is None:
        traits = _traits_of(plan)
        if kept is not None:
            kept["traits"] = traits
    is_scaled = traits.has_means or any(plan[:, fields.PLAN_WEIGHTS].tolist())
    found = None if kept is None else kept.get("sorted")
    if found is not None and found.fits(blocks_on_device, hyper, is_scaled):
        found.sort(plan)
        return found
    what = plan, blocks, layout, blocks_on_device, hyper, traits, is_scaled
    if kept is None or blocks_on_device is None or hyper is None:
        return SortedGradients(*what)
    kept.pop("sorted", None)
    with torch.inference_mode(False):  # tensors made in it could not be written to outside
        made = SortedGradients(*what)
    if made.num_bytes() <= _KEPT_BYTES:
        kept["sorted"] = made
    return made


def _stream_of(device):
    """Return the stream of a GPU on which kernels are launched now."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else None


__all__ = ["PIECE", "key_at", "sort_gradients"]
