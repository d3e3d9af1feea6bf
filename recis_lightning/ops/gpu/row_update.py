"""Reduction and row update in Triton, in one pass over the sorted gradients.

A row with few gradients is one piece: its program adds them up and updates the row at once. Of a
row with many, each program adds up one piece, and one more program adds the sums of the pieces, in
their order. Where a row may have hundreds of thousands, sums of neighbouring pieces are added up
before that, by programs of their own. So no row keeps one program busy for long, and sums are
always taken in the same order.
"""

import torch
import triton.language as tl

from recis_lightning.ops import device_memory
from recis_lightning.ops import layout as fields
from recis_lightning.ops.gpu.embedding_bag import load_weights, store_weights
from recis_lightning.ops.gpu.gradient_sort import PIECE, key_at, sort_gradients
from recis_lightning.ops.gpu.layout import (
    HYPER_CLIP,
    HYPER_COW_LEAST,
    HYPER_COW_RATIO,
    HYPER_MARKS,
    HYPER_SCALE,
    HYPER_WEIGHT_DECAY,
    NORM,
)
from recis_lightning.ops.gpu.piece_sums import (
    GROUP,
    SUMS,
    add_run,
    count_run,
    launch_of_groups,
    num_groups_of,
)
from recis_lightning.ops.gpu.runtime import (
    byte_at,
    cells_at,
    device_function,
    float_at,
    int64_at,
    kernel,
    lanes,
    largest,
    num_programs_at_once,
    power_of_two,
    sum_over,
)
from recis_lightning.ops.gpu.update_rules import apply_rule, hyper_at

NORM.value = -1  # a rule that updates nothing

_CELLS = lanes(1024, 1 << 16)  # rows times columns of a program
_ON_EACH = 10  # programs that a multiprocessor's 65,536 registers have room for
_UNROLLED = lanes(2, 2)  # gradients of a piece that are on their way together


@device_function
def _update(
    blocks,
    hypers,
    block_shift,
    row_bytes,
    flat,
    mask,
    g,
    num_ids,
    norms,
    RULE: tl.constexpr,
    DECAYED: tl.constexpr,
    COW_CLIP: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BFLOAT16: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Apply reduced gradients ``g`` [rows, COLUMNS] to the rows ``flat`` where ``mask`` is set.

    ``hypers`` is added to what ``blocks`` says of where a table's hyperparameters are.

    ``num_ids``, float32 [rows], counts what they are the sums of, if there is COW_CLIP.
    """
    column = tl.arange(0, COLUMNS)
    cells = mask[:, None] & (column < DIM)[None, :]
    if RULE == NORM:
        tl.store(float_at(norms), sum_over(g * g, 1), mask)
    else:
        line = blocks + 16 * (flat >> block_shift)
        one = flat * 0 + 1
        row = tl.load(int64_at(line), mask, 0) + (flat & ((one << block_shift) - 1)) * row_bytes
        hyper = hypers + tl.load(int64_at(line + 8), mask, 0)
        state = row + 4 * DIM
        if BFLOAT16:
            state = row + 4 * ((DIM + 1) // 2)
        clip = hyper_at(hyper, HYPER_CLIP, mask)
        g = g * hyper_at(hyper, HYPER_SCALE, mask)
        w = load_weights(row, column, cells, BFLOAT16, ALIGNED)
        if COW_CLIP:
            bound = hyper_at(hyper, HYPER_COW_RATIO, mask) * tl.sqrt(sum_over(w * w, 1))[:, None]
            bound = tl.maximum(bound, hyper_at(hyper, HYPER_COW_LEAST, mask)) * num_ids[:, None]
            norm = tl.sqrt(sum_over(g * g, 1))[:, None]
            g = tl.where(norm > bound, g * (bound / tl.where(norm > 0, norm, 1.0)), g)
        g = tl.where(g > clip, clip, g)  # a comparison with NaN is false: NaN stays
        g = tl.where(g < -clip, -clip, g)
        if DECAYED:
            g = g + hyper_at(hyper, HYPER_WEIGHT_DECAY, mask) * w
        w = apply_rule(w, g, state, hyper, column, mask, cells, RULE, DIM, ALIGNED)
        store_weights(row, column, w, cells, BFLOAT16, ALIGNED)
        marks = tl.load(int64_at(hyper + 4 * HYPER_MARKS), mask, 0)
        nothing = tl.full(flat.shape, 0, tl.uint8)
        tl.store(byte_at(marks + flat), nothing, mask & (marks != 0))


_RULES = (NORM.value, *range(fields.ADAM_AR + 1))
_WIDE = {
    "DIM": 128,
    "COLUMNS": 128,
    "BFLOAT16": False,
    "DECAYED": False,
    "COW_CLIP": False,
    "COUNTED": False,
    "ALIGNED": True,
    "PIECE": PIECE,
    "WIDE": False,
}
_ODD = {
    "DIM": 33,
    "COLUMNS": 64,
    "BFLOAT16": True,
    "DECAYED": True,
    "COW_CLIP": True,
    "COUNTED": True,
    "ALIGNED": False,
    "PIECE": PIECE,
    "WIDE": True,
}


@kernel(
    *({**_WIDE, "RULE": rule, "SCALED": False, "ROWS": 8, "UNROLLED": 2} for rule in _RULES),
    {**_WIDE, "BFLOAT16": True, "RULE": fields.ADAM, "SCALED": True, "ROWS": 8, "UNROLLED": 2},
    {**_ODD, "RULE": fields.ADAM, "SCALED": True, "ROWS": 16, "UNROLLED": 2},
)
def _update_kernel(
    keys: tl.int64,
    addresses: tl.int64,
    scales: tl.int64,
    pieces: tl.int64,
    num_pieces: tl.int64,
    blocks: tl.int64,
    hypers: tl.int64,
    partial_sums: tl.int64,
    norms: tl.int64,
    n: tl.int64,
    block_shift: tl.int64,
    row_bytes: tl.int64,
    RULE: tl.constexpr,
    DECAYED: tl.constexpr,
    COW_CLIP: tl.constexpr,
    COUNTED: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BFLOAT16: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLLED: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    count = tl.load(int64_at(num_pieces))
    first = tl.program_id(0).to(tl.int64) * ROWS
    while first < count:
        piece = first + tl.arange(0, ROWS)
        inside = piece < count
        start = tl.load(int64_at(pieces + 8 * piece), inside, 0)
        end = tl.load(int64_at(pieces + 8 * piece + 8), inside, 0)
        flat = key_at(keys, start, inside, WIDE)
        before = key_at(keys, start - 1, inside & (start > 0), WIDE)
        behind = key_at(keys, end, inside & (end < n), WIDE)
        whole = inside & (before != flat) & (behind != flat)
        g = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
        num_ids = (end - start).to(tl.float32)
        if COUNTED:
            num_ids = num_ids * 0
        most = largest(end - start)
        step = most * 0
        while step < most:
            for ahead in tl.static_range(0, UNROLLED):
                i = start + step + ahead
                on = i < end
                address = tl.load(int64_at(addresses + 8 * i), on, 0)
                at = cells_at(float_at(address), column, ALIGNED)
                value = tl.load(at, on[:, None] & (column < DIM)[None, :], 0)
                if SCALED:
                    value = value * tl.load(float_at(scales + 4 * i), on, 0)[:, None]
                g += value
                if COUNTED:
                    num_ids += tl.load(float_at(address + 4 * DIM), on, 0)
            step += UNROLLED
        # A stretch of PIECE indices may leave two sums: of the row that began before it, and of the
        # row that goes on behind it.
        sum_index = start // PIECE * 2 + tl.where(start % PIECE == 0, 0, 1)
        at = cells_at(float_at(partial_sums + 4 * sum_index * DIM), column, ALIGNED)
        tl.store(at, g, (inside & (whole == 0))[:, None] & (column < DIM)[None, :])
        norm = norms + 4 * piece
        _update(
            blocks,
            hypers,
            block_shift,
            row_bytes,
            flat,
            whole,
            g,
            num_ids,
            norm,
            RULE,
            DECAYED,
            COW_CLIP,
            DIM,
            COLUMNS,
            BFLOAT16,
            ALIGNED,
        )
        first += tl.num_programs(0) * ROWS


@kernel(
    *({**_WIDE, "RULE": rule, "SUMS": 16, "GROUP": GROUP} for rule in _RULES),
    {**_WIDE, "RULE": fields.ADAM, "COW_CLIP": True, "SUMS": 16, "GROUP": GROUP},
    {**_ODD, "RULE": fields.ADAM, "SUMS": 16, "GROUP": GROUP},
)
def _update_long_kernel(
    keys: tl.int64,
    addresses: tl.int64,
    blocks: tl.int64,
    hypers: tl.int64,
    partial_sums: tl.int64,
    group_sums: tl.int64,
    num_groups: tl.int64,
    norms: tl.int64,
    n: tl.int64,
    num_rows: tl.int64,
    block_shift: tl.int64,
    row_bytes: tl.int64,
    RULE: tl.constexpr,
    DECAYED: tl.constexpr,
    COW_CLIP: tl.constexpr,
    COUNTED: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BFLOAT16: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    PIECE: tl.constexpr,
    SUMS: tl.constexpr,
    GROUP: tl.constexpr,
):
    # One program a stretch of PIECE indices: it updates the row that begins in the stretch and goes
    # on behind it, if there is one.
    stretch = tl.program_id(0).to(tl.int64)
    first, behind = stretch * PIECE, (stretch + 1) * PIECE
    zero = tl.arange(0, 1)
    flat = key_at(keys, behind - 1 + zero, zero == 0, WIDE)
    is_long = (flat < num_rows) & (key_at(keys, behind + zero, zero == 0, WIDE) == flat)
    is_long = is_long & (key_at(keys, first - 1 + zero, zero + first > 0, WIDE) != flat)
    if largest(is_long.to(tl.int32)) != 0:
        column = tl.arange(0, COLUMNS)
        inside = (column < DIM)[None, :]
        from_start = key_at(keys, first + zero, zero == 0, WIDE) == flat
        sum_index = 2 * stretch + tl.where(from_start, 0, 1)
        at = cells_at(float_at(partial_sums + 4 * sum_index * DIM), column, ALIGNED)
        g = tl.load(at, inside, 0)
        key = largest(flat)
        run = stretch + 1
        num_stretches = (n + PIECE - 1) // PIECE
        if num_groups > 0:  # stretches up to the next group, groups, and then what is left
            ahead = (run + GROUP - 1) // GROUP
            g, run = add_run(
                partial_sums,
                run,
                tl.minimum(ahead * GROUP, num_stretches),
                keys,
                key,
                g,
                1,
                8 * DIM,
                DIM,
                COLUMNS,
                ALIGNED,
                WIDE,
                PIECE,
                SUMS,
            )
            if run == ahead * GROUP:
                g, ahead = add_run(
                    group_sums,
                    ahead,
                    num_groups,
                    keys,
                    key,
                    g,
                    GROUP,
                    4 * DIM,
                    DIM,
                    COLUMNS,
                    ALIGNED,
                    WIDE,
                    PIECE,
                    SUMS,
                )
                run = ahead * GROUP
        g, run = add_run(
            partial_sums,
            run,
            num_stretches,
            keys,
            key,
            g,
            1,
            8 * DIM,
            DIM,
            COLUMNS,
            ALIGNED,
            WIDE,
            PIECE,
            SUMS,
        )
        num_ids = tl.full((1,), 0.0, tl.float32)
        if COW_CLIP:
            num_ids = count_run(
                keys, addresses, first, run * PIECE, key, n, DIM, COUNTED, WIDE, PIECE
            )
        norm = norms + 4 * stretch + 4 * zero
        _update(
            blocks,
            hypers,
            block_shift,
            row_bytes,
            flat,
            is_long,
            g,
            num_ids,
            norm,
            RULE,
            DECAYED,
            COW_CLIP,
            DIM,
            COLUMNS,
            BFLOAT16,
            ALIGNED,
        )


def scale_(gradients, scale):
    hyper = gradients.work.hyper
    hyper[:, fields.HYPER_SCALE] = scale.to(hyper.device)


class _Update:
    """Update of sorted gradients by one rule: its launches, and the memory that they need.

    Args:
        work: The sorted gradients; their ``aligned`` stays as it is.
        layout: Layout of the rows.
        rule: Update rule.
        is_counted: Whether behind each gradient stands how many ids it is of, and the rule asks.
    """

    def __init__(self, work, layout, rule, is_counted):
        n, device, dim = work.n, work.device, layout.embedding_dim
        stretches, num_groups, columns = -(-n // PIECE), num_groups_of(n), power_of_two(dim)
        size = (2 * stretches + num_groups) * dim
        if work.partial_sums is None:
            work.partial_sums = torch.empty(size, dtype=torch.float32, device=device)
        partial_sums = work.partial_sums.data_ptr()
        group_sums = partial_sums + 8 * stretches * dim
        is_norm = rule == NORM.value
        self.norms, norms = None, 0
        if is_norm:
            self.norms = device_memory.empty(n + stretches, torch.float32, device)
            norms = self.norms.data_ptr()
        constants = {
            "RULE": rule if is_norm else rule % fields.COUPLED_DECAY,
            "DECAYED": not is_norm and bool(rule & fields.COUPLED_DECAY),
            "COW_CLIP": not is_norm and bool(rule & fields.COW_CLIP),
            "COUNTED": is_counted,
            "DIM": dim,
            "COLUMNS": columns,
            "BFLOAT16": layout.dtype is torch.bfloat16,
            "ALIGNED": work.aligned
            and layout.row_bytes % 16 == 0
            and dim * layout.dtype.itemsize % 16 == 0,
            "WIDE": work.wide,
            "PIECE": PIECE,
        }
        keys, blocks = work.keys.data_ptr(), work.blocks.data_ptr()
        rows = max(_CELLS // columns, 1)
        numbers = (
            min(-(-n // rows), num_programs_at_once(device, _ON_EACH)),
            *(keys, work.sorted_addresses, work.sorted_scales, work.pieces, work.num_pieces),
            *(blocks, work.hypers, partial_sums, norms),
            *(n, layout.block_shift, layout.row_bytes),
        )
        scaled = {"SCALED": work.sorted_scales != 0, "ROWS": rows, "UNROLLED": _UNROLLED}
        self._launches = [(_update_kernel, numbers, {**scaled, **constants})]
        if num_groups:
            where = num_groups, keys, partial_sums, group_sums, work.num_rows
            self._launches.append(launch_of_groups(*where, constants))
        long_numbers = (
            (n - 1) // PIECE,  # no row goes on behind the last stretch
            *(keys, work.sorted_addresses, blocks, work.hypers),
            *(partial_sums, group_sums, num_groups, norms + 4 * n),
            *(n, work.num_rows, layout.block_shift, layout.row_bytes),
        )
        long_constants = {"SUMS": SUMS, "GROUP": GROUP, **constants}
        self._launches.append((_update_long_kernel, long_numbers, long_constants))
        self._device = device

    def launch(self):
        """Launch it, once or again."""
        if self.norms is not None:
            self.norms.zero_()
        for kernel_, numbers, constants in self._launches:
            kernel_.launch(self._device, *numbers, **constants)


def _launch(gradients, rule):
    work = gradients.work
    has_cow_clip = rule != NORM.value and bool(rule & fields.COW_CLIP)
    is_counted = has_cow_clip and gradients.is_counted
    key = rule, is_counted, work.aligned
    update = work.updates.get(key)
    if update is None:
        update = _Update(work, gradients.layout, rule, is_counted)
        work.updates[key] = update
    update.launch()
    return update.norms


def squared_norm(gradients):
    return _launch(gradients, NORM.value).sum(dtype=torch.float64)


def update_rows_(gradients, rule):
    gradients.applied[0] = 1
    _launch(gradients, rule)


def count_rows(gradients):
    keys = gradients.work.keys
    return len(torch.unique_consecutive(keys[keys < gradients.work.num_rows]))


__all__ = ["count_rows", "scale_", "sort_gradients", "squared_norm", "update_rows_"]
