"""Sort the positions of an update by row, and split them into pieces, in Triton.

torch sorts (a stable radix sort). A row's positions then stand side by side, in the order of the
batch; where a row has very many of them, they are cut at every ``PIECE``-th place, so that many
programs share the row, and always in the same way.
"""

import torch
import triton.language as tl

from recis_lightning.ops import layout as fields
from recis_lightning.ops.gpu.embedding_bag import (
    DATA,
    DATA_STRIDE,
    FIRST_CHUNK,
    LINE_BYTES,
    MEAN,
    MODE,
    NUM_BAGS,
    ROWS,
    TILE,
    TILE_LEN,
    WEIGHTS,
    bag_ends,
    lies_aligned,
    scale_of,
    split_plan,
)
from recis_lightning.ops.gpu.prefix_sum import add_up_
from recis_lightning.ops.gpu.probe import PADDING
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

FIRST_ID = tl.constexpr(fields.PLAN_FIRST_ID)
FLAT_BASE = tl.constexpr(fields.PLAN_FLAT_BASE)
PIECE = 32
_BAGS = lanes(128, 4096)
_LANES = lanes(256, 1 << 16)


@device_function
def key_at(keys, place, mask, WIDE: tl.constexpr):
    """Load sorted rows, int64."""
    if WIDE:
        return tl.load(int64_at(keys + 8 * place), mask, -1)
    return tl.load((keys + 4 * place).to(tl.pointer_type(tl.int32)), mask, -1).to(tl.int64)


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
    line = line_of(plan, num_features, LINE_BYTES, FIRST_CHUNK, chunk)
    mode, rows, weights = field(line, MODE), field(line, ROWS), field(line, WEIGHTS)
    tile_len, first = field(line, TILE_LEN), field(line, FIRST_ID)
    bag = (chunk - field(line, FIRST_CHUNK)) * BAGS + tl.arange(0, BAGS)
    start, end = bag_ends(line, bag, bag < field(line, NUM_BAGS))
    most = largest(end - start)
    divisor = tl.full((BAGS,), 1.0, tl.float32)
    if SCALED:
        if mode == MEAN:
            divisor = divisor - 1
            done = most * 0
            while done < most:
                on = start + done < end
                row = tl.load(int64_at(rows + 8 * (start + done)), on, PADDING)
                scale = scale_of(weights, start + done, on)
                divisor += tl.where(row != PADDING, scale, 0.0)
                done += 1
    address = field(line, DATA) + bag * field(line, DATA_STRIDE)
    done = most * 0
    while done < most:
        i = start + done
        on = i < end
        row = tl.load(int64_at(rows + 8 * i), on, -1)
        used = (row >= 0) & ((mode != TILE) | (done < tile_len))
        key = tl.where(used, row + field(line, FLAT_BASE), num_rows)
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
        done += 1


@device_function
def _starts_piece(keys, place, n, num_rows, WIDE: tl.constexpr, PIECE: tl.constexpr):
    inside = place < n
    key = key_at(keys, place, inside, WIDE)
    before = key_at(keys, place - 1, inside & (place > 0), WIDE)
    return inside & ((key != before) | (place % PIECE == 0)) & (key < num_rows)


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


@kernel(*_PIECE_VARIANTS)
def _list_pieces_kernel(
    keys: tl.int64,
    counts: tl.int64,
    n: tl.int64,
    num_rows: tl.int64,
    pieces: tl.int64,
    WIDE: tl.constexpr,
    PIECE: tl.constexpr,
    LANES: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    place = chunk * LANES + tl.arange(0, LANES)
    starts = _starts_piece(keys, place, n, num_rows, WIDE, PIECE)
    number = field(counts, chunk) + sums_up_to(starts.to(tl.int64))
    tl.store(int64_at(pieces + 8 * (number - 1)), place, starts)
    # Behind the last piece stands where it ends: at the first id without a row, or at the end.
    key = key_at(keys, place, place < n, WIDE)
    following = key_at(keys, place + 1, place + 1 < n, WIDE)
    is_last = (place < n) & (key < num_rows) & ((place + 1 == n) | (following >= num_rows))
    tl.store(int64_at(pieces + 8 * number), place + 1, is_last)


class SortedGradients:
    """What lies on the device between sorting and updating; addresses go to kernels.

    Attributes:
        keys: int32 or int64 [n], rows in ascending order; ids without one are at the end.
        order: int64 [n], the position of each.
        addresses: int64 [n], where the gradient of a position lies.
        scales: float32 [n], what a position's gradient is multiplied by, or None.
        pieces: int64 [num_pieces + 1], where pieces of one row start; longer than that.
        num_pieces: Address of int64 [1].
        blocks: int64 [num_blocks, 2].
        aligned: Whether all gradients lie at multiples of 16 bytes.
    """

    def __init__(self, plan, blocks, layout, blocks_on_device):
        device = layout.device
        self.n = n = sum(plan[:, fields.PLAN_NUM_IDS].tolist())
        self.num_rows = num_rows = len(blocks) << layout.block_shift
        self.device = device
        self.blocks = stage(blocks, device) if blocks_on_device is None else blocks_on_device
        self.aligned = lies_aligned(plan, 4 * layout.embedding_dim)
        self.wide = num_rows >= 2**31 - 1
        dtype = torch.int64 if self.wide else torch.int32
        keys = torch.empty(n, dtype=dtype, device=device)
        self.addresses = torch.empty(n, dtype=torch.int64, device=device)
        self.scales = None
        if (
            any(plan[:, fields.PLAN_WEIGHTS].tolist())
            or fields.MEAN in plan[:, fields.PLAN_MODE].tolist()
        ):
            self.scales = torch.empty(n, dtype=torch.float32, device=device)
        num_programs = split_plan(plan, _BAGS)
        staged = stage(plan, device)
        _key_kernel.launch(
            device,
            num_programs,
            staged.data_ptr(),
            len(plan),
            keys.data_ptr(),
            self.addresses.data_ptr(),
            0 if self.scales is None else self.scales.data_ptr(),
            num_rows,
            4 * layout.embedding_dim,
            SCALED=self.scales is not None,
            WIDE=self.wide,
            BAGS=_BAGS,
        )
        self.keys, self.order = torch.sort(keys, stable=True)
        self._split()

    def _split(self):
        programs = -(-self.n // _LANES)
        # First the pieces, then, while they are numbered, how many of them each program finds.
        numbers = torch.empty(self.n + programs + 2, dtype=torch.int64, device=self.device)
        self.pieces, counts = numbers, numbers.data_ptr() + 8 * (self.n + 1)
        self.num_pieces = counts + 8 * programs
        where = (self.keys.data_ptr(), counts, self.n, self.num_rows)
        constants = {"WIDE": self.wide, "PIECE": PIECE, "LANES": _LANES}
        _count_pieces_kernel.launch(self.device, programs, *where, **constants)
        add_up_(self.device, counts, programs)
        pieces = self.pieces.data_ptr()
        _list_pieces_kernel.launch(self.device, programs, *where, pieces, **constants)
