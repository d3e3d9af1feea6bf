"""Sums of pieces of rows with very many gradients, and of groups of them, in Triton.

A stretch is PIECE sorted positions. It leaves two sums: of the row that began before it, and of the
row that goes on behind it.
"""

import triton.language as tl

from recis_lightning.ops.gpu.gradient_sort import PIECE, key_at
from recis_lightning.ops.gpu.runtime import (
    cells_at,
    device_function,
    float_at,
    int64_at,
    kernel,
    lanes,
    largest,
    sum_over,
)

SUMS = lanes(16, 64)  # of pieces, at once
GROUP = 64  # stretches whose sums are added up first where there are many
# Positions from which on that is worth a launch: fewer are at most 512 turns of one program.
_MANY = lanes(1 << 18, 1 << 12)

_SHAPES = (
    {"DIM": 128, "COLUMNS": 128, "ALIGNED": True, "WIDE": False, "PIECE": PIECE},
    {"DIM": 33, "COLUMNS": 64, "ALIGNED": False, "WIDE": True, "PIECE": PIECE},
)


@device_function
def _add_sums(sums, i, on, g, DIM: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """Add sums, float32 [DIM] at the addresses ``sums`` where ``on``, to ``g`` [1, COLUMNS]."""
    column = tl.arange(0, COLUMNS)
    at = cells_at(float_at(sums + i), column, ALIGNED)
    return g + sum_over(tl.load(at, on[:, None] & (column < DIM)[None, :], 0), 0)[None, :]


@device_function
def add_run(
    sums,
    first,
    until,
    keys,
    key,
    g,
    STRETCHES: tl.constexpr,
    BYTES: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    PIECE: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Add the sums from ``first`` on, each of STRETCHES stretches, as far as a row goes.

    Returns:
        ``g`` with them; the first that was not added, ``until`` at most.
    """
    i = first
    more = i < until
    while more:
        others = i + tl.arange(0, SUMS)
        on = others < until
        # Keys ascend: where the last stretch begins with the row, all do.
        last = others * STRETCHES + (STRETCHES - 1)
        on = on & (key_at(keys, last * PIECE, on, WIDE) == key)
        g = _add_sums(sums, BYTES * others, on, g, DIM, COLUMNS, ALIGNED)
        count = sum_over(on.to(tl.int32), 0)
        i += count
        more = count == SUMS
    return g, i


@device_function
def count_run(
    keys,
    addresses,
    first,
    behind,
    key,
    n,
    DIM: tl.constexpr,
    COUNTED: tl.constexpr,
    WIDE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Return how many ids a row's gradients are of, float32 [1].

    The row begins in the stretch at the position ``first``, and ends in the last one before
    ``behind``; both are multiples of PIECE.
    """
    num_ids = tl.full((1,), 0.0, tl.float32)
    if COUNTED:  # few: a rank sends an id once a lookup
        i = first
        while i < behind:
            at = i + tl.arange(0, PIECE)
            on = at < n
            on = on & (key_at(keys, at, on, WIDE) == key)
            address = tl.load(int64_at(addresses + 8 * at), on, 0)
            num_ids += sum_over(tl.load(float_at(address + 4 * DIM), on, 0), 0)
            i += PIECE
    else:  # stretches between the first and the last are full
        at = first + tl.arange(0, PIECE)
        in_first = key_at(keys, at, at < n, WIDE) == key
        at = behind - PIECE + tl.arange(0, PIECE)
        in_last = key_at(keys, at, at < n, WIDE) == key
        ends = sum_over(in_first.to(tl.int64) + in_last.to(tl.int64), 0)
        num_ids += (behind - first - 2 * PIECE + ends).to(tl.float32)
    return num_ids


@kernel(*({**shape, "SUMS": 16, "GROUP": GROUP} for shape in _SHAPES))
def _add_groups_kernel(
    keys: tl.int64,
    partial_sums: tl.int64,
    group_sums: tl.int64,
    num_rows: tl.int64,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    PIECE: tl.constexpr,
    SUMS: tl.constexpr,
    GROUP: tl.constexpr,
):
    # One program GROUP stretches: where all begin with the same row, their sums of it are added up.
    group = tl.program_id(0).to(tl.int64)
    first, zero = group * GROUP, tl.arange(0, 1)
    key = key_at(keys, first * PIECE + zero, zero == 0, WIDE)
    is_one = key_at(keys, (first + GROUP - 1) * PIECE + zero, zero == 0, WIDE) == key
    if largest((is_one & (key < num_rows)).to(tl.int32)) != 0:
        column = tl.arange(0, COLUMNS)
        g = tl.full((1, COLUMNS), 0.0, tl.float32)
        for part in tl.static_range(0, GROUP, SUMS):
            stretch = first + part + tl.arange(0, SUMS)
            g = _add_sums(partial_sums, 8 * DIM * stretch, stretch >= 0, g, DIM, COLUMNS, ALIGNED)
        at = cells_at(float_at(group_sums + 4 * DIM * group + zero), column, ALIGNED)
        tl.store(at, g, (column < DIM)[None, :])


def num_groups_of(n):
    """Return how many groups of stretches are added up beforehand for ``n`` sorted positions."""
    return -(-n // PIECE) // GROUP if n >= _MANY else 0


def launch_of_groups(num_groups, keys, partial_sums, group_sums, num_rows, constants):
    """Return the launch that adds the sums of each group of stretches up that one row has.

    Args:
        num_groups: From ``num_groups_of``.
        keys: Address of the sorted rows.
        partial_sums: Address of float32 [2 * num_stretches, dim], two sums a stretch.
        group_sums: Address of float32 [num_groups, dim]; written where a group has one row.
        num_rows: Key of positions without a row.
        constants: Of the update; those of ``_SHAPES`` are taken.

    Returns:
        The kernel, the number of programs and the kernel's numbers, and its constants.
    """
    own = {name: constants[name] for name in _SHAPES[0]}
    numbers = num_groups, keys, partial_sums, group_sums, num_rows
    return _add_groups_kernel, numbers, {**own, "SUMS": SUMS, "GROUP": GROUP}


__all__ = ["GROUP", "SUMS", "add_run", "count_run", "launch_of_groups", "num_groups_of"]
