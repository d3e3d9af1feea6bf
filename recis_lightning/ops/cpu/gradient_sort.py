"""Sort the positions of an update by row, in Numba.

A position is packed with its row into 64 bits (row above, position below), so the sort moves one
word an id. With many tables each is sorted by itself, in cache; otherwise all threads share each
pass of a radix sort.
"""

from __future__ import annotations

import numpy as np
import torch

from recis_lightning.ops.cpu.intrinsics import inlined, load_f32, load_i64, store_f32, store_i64
from recis_lightning.ops.cpu.plan import (
    PLAN_BYTES,
    bag_divisor,
    bag_start,
    bags_of_chunk,
    feature_at,
    split_plan,
)
from recis_lightning.ops.cpu.runtime import kernel, num_chunks, workspace
from recis_lightning.ops.layout import (
    MEAN,
    MEAN_BY_COUNT,
    PLAN_DATA,
    PLAN_DATA_STRIDE,
    PLAN_FIRST_ID,
    PLAN_FLAT_BASE,
    PLAN_MODE,
    PLAN_NUM_BAGS,
    PLAN_NUM_IDS,
    PLAN_ROWS,
    PLAN_TILE_LEN,
    PLAN_WEIGHTS,
    TILE,
)

_SORT_SERIAL = 1 << 14  # fewer positions are sorted by one thread
_DIGIT_BITS = 12  # a digit's counters and open cache lines fit the first-level cache
_INSERTION_SORT = 32  # fewer keys of a table are sorted without counting
_RANGE_SIZE = 6  # words of a table's range
_F = np.float32


@inlined
def _enter_keys(line, low, high, keys, addresses, scales, position_bits, no_row, dim_bytes):
    """Enter key, gradient and scale of each position of some bags of one line of the plan."""
    mode, first = load_i64(line + 8 * PLAN_MODE), load_i64(line + 8 * PLAN_FIRST_ID)
    rows, base = load_i64(line + 8 * PLAN_ROWS), load_i64(line + 8 * PLAN_FLAT_BASE)
    weights, tile_len = load_i64(line + 8 * PLAN_WEIGHTS), load_i64(line + 8 * PLAN_TILE_LEN)
    data, stride = load_i64(line + 8 * PLAN_DATA), load_i64(line + 8 * PLAN_DATA_STRIDE)
    for bag in range(low, high):
        start, end = bag_start(line, bag), bag_start(line, bag + 1)
        divisor = bag_divisor(mode, rows, weights, start, end)
        address = data + bag * stride
        for i in range(start, end):
            row = load_i64(rows + 8 * i)
            flat = base + row
            if row < 0 or (mode == TILE and i - start >= tile_len):
                flat = no_row
            position = first + i
            store_i64(keys + 8 * position, (flat << position_bits) | position)
            store_i64(addresses + 8 * position, address)
            if mode == TILE:
                address += dim_bytes
            if scales:
                scale = load_f32(weights + 4 * i) if weights else _F(1)
                if mode in (MEAN, MEAN_BY_COUNT):
                    scale = scale / divisor if divisor != _F(0) else _F(0)
                store_f32(scales + 4 * position, scale)


@kernel
def _key_kernel(
    chunk, plan, num_features, keys, addresses, scales, position_bits, no_row, dim_bytes
):
    line = plan + feature_at(plan, num_features, chunk) * PLAN_BYTES
    low, high = bags_of_chunk(line, chunk)
    _enter_keys(line, low, high, keys, addresses, scales, position_bits, no_row, dim_bytes)


@kernel
def _count_digits_kernel(low, high, chunk, keys, counts, low_bit, num_digits):
    shift, mask = np.uint64(low_bit), np.uint64(num_digits - 1)
    own = counts + 8 * num_digits * chunk
    for digit in range(num_digits):
        store_i64(own + 8 * digit, 0)
    for i in range(low, high):
        digit = np.int64((np.uint64(load_i64(keys + 8 * i)) >> shift) & mask)
        store_i64(own + 8 * digit, load_i64(own + 8 * digit) + 1)


@kernel
def _digit_offsets_kernel(counts, num_counts, num_digits):
    # One chunk: turns counts [chunks, digits] into each chunk's first offset of each digit.
    total = np.int64(0)
    for digit in range(num_digits):
        for i in range(num_counts):
            cell = counts + 8 * (i * num_digits + digit)
            count = load_i64(cell)
            store_i64(cell, total)
            total += count


@kernel
def _scatter_digits_kernel(low, high, chunk, keys, counts, low_bit, num_digits, out):
    shift, mask = np.uint64(low_bit), np.uint64(num_digits - 1)
    own = counts + 8 * num_digits * chunk
    for i in range(low, high):
        key = load_i64(keys + 8 * i)
        cell = own + 8 * np.int64((np.uint64(key) >> shift) & mask)
        target = load_i64(cell)
        store_i64(cell, target + 1)
        store_i64(out + 8 * target, key)


@inlined
def _insertion_sort(keys, n):
    for i in range(1, n):
        key = load_i64(keys + 8 * i)
        j = i
        while j > 0 and load_i64(keys + 8 * j - 8) > key:
            store_i64(keys + 8 * j, load_i64(keys + 8 * j - 8))
            j -= 1
        store_i64(keys + 8 * j, key)


@inlined
def _bit_length(n):
    bits = np.int64(0)
    while n >> bits:
        bits += 1
    return bits


@kernel
def _sort_tables_kernel(
    chunk,
    thread,
    plan,
    ranges,
    keys,
    spare,
    addresses,
    scales,
    position_bits,
    no_row,
    dim_bytes,
    all_counts,
):
    # A chunk is one table: its keys fit a cache, and its rows need fewer digits than all rows.
    table = ranges + 8 * _RANGE_SIZE * chunk
    first, n = load_i64(table), load_i64(table + 8)
    base, num_rows = load_i64(table + 16), load_i64(table + 24)
    line = plan + load_i64(table + 32) * PLAN_BYTES
    for _ in range(load_i64(table + 40)):
        num_bags = load_i64(line + 8 * PLAN_NUM_BAGS)
        _enter_keys(line, 0, num_bags, keys, addresses, scales, position_bits, no_row, dim_bytes)
        line += PLAN_BYTES
    counts = all_counts + 8 * (thread << _DIGIT_BITS)
    source, target = keys + 8 * first, spare + 8 * first
    if n <= _INSERTION_SORT:
        _insertion_sort(source, n)
        return
    row_bits = _bit_length(num_rows)
    widest = np.int64(min(max(_bit_length(n) - 2, 4), _DIGIT_BITS - 1))
    passes = (row_bits + widest - 1) // widest
    low_bit = np.int64(0)
    for index in range(passes):
        bits = row_bits // passes
        if index < row_bits % passes:
            bits += 1
        num_digits = np.int64(1) << bits
        for digit in range(num_digits):
            store_i64(counts + 8 * digit, 0)
        for i in range(n):
            row = min((load_i64(source + 8 * i) >> position_bits) - base, num_rows)
            cell = counts + 8 * ((row >> low_bit) & (num_digits - 1))
            store_i64(cell, load_i64(cell) + 1)
        total = np.int64(0)
        for digit in range(num_digits):
            count = load_i64(counts + 8 * digit)
            store_i64(counts + 8 * digit, total)
            total += count
        for i in range(n):
            key = load_i64(source + 8 * i)
            row = min((key >> position_bits) - base, num_rows)
            cell = counts + 8 * ((row >> low_bit) & (num_digits - 1))
            offset = load_i64(cell)
            store_i64(cell, offset + 1)
            store_i64(target + 8 * offset, key)
        source, target = target, source
        low_bit += bits
    if passes & 1:
        for i in range(n):
            store_i64(target + 8 * i, load_i64(source + 8 * i))


# What the first steps run, unless one table has most of the ids.
STEP_KERNELS = (_sort_tables_kernel,)


def _table_ranges(plan, num_rows):
    """Order the plan by table.

    Returns:
        The plan, and int64 [tables, _RANGE_SIZE]: first position, positions, base, rows, first line
        and lines of each.
    """
    bases = plan[:, PLAN_FLAT_BASE]
    if np.count_nonzero(bases[1:] <= bases[:-1]):  # not a line for each table, in order
        plan = plan[np.argsort(bases, kind="stable")]
        sizes = plan[:, PLAN_NUM_IDS]
        plan[:, PLAN_FIRST_ID] = np.cumsum(sizes) - sizes
        bases, lines = np.unique(plan[:, PLAN_FLAT_BASE], return_index=True)
        firsts, sizes = plan[lines, PLAN_FIRST_ID], np.add.reduceat(sizes, lines)
        num_lines = np.diff(lines, append=len(plan))
    else:
        firsts, sizes = plan[:, PLAN_FIRST_ID], plan[:, PLAN_NUM_IDS]
        lines, num_lines = np.arange(len(plan)), 1
    ranges = np.empty((len(bases), _RANGE_SIZE), np.int64)
    ranges[:, 0], ranges[:, 1], ranges[:, 2] = firsts, sizes, bases
    ranges[:-1, 3], ranges[-1, 3] = bases[1:], num_rows
    ranges[:, 3] -= bases
    ranges[:, 4], ranges[:, 5] = lines, num_lines
    return plan, ranges


def _radix_sort(keys, spare, n, low_bit, num_bits):
    """Sort ``keys[:n]`` by ``num_bits`` bits from ``low_bit``; return the array it ended in."""
    passes = -(-num_bits // _DIGIT_BITS)
    chunks = 1 if n < _SORT_SERIAL else torch.get_num_threads()
    chunk_size = max(num_chunks(n, chunks), 1)
    for index in range(passes):
        bits = num_bits // passes + (index < num_bits % passes)
        shared = {
            "keys": keys,
            "counts": workspace.take("digit_counts", chunks << bits, np.int64),
            "low_bit": low_bit,
            "num_digits": 1 << bits,
        }
        _count_digits_kernel.launch(n, chunk_size, **shared)
        _digit_offsets_kernel.launch(
            1,
            1,
            counts=shared["counts"],
            num_counts=num_chunks(n, chunk_size),
            num_digits=1 << bits,
        )
        _scatter_digits_kernel.launch(n, chunk_size, **shared, out=spare)
        keys, spare, low_bit = spare, keys, low_bit + bits
    return keys


def sort_gradients(plan, blocks, layout, blocks_on_device, hyper, kept):
    n = int(plan[:, PLAN_NUM_IDS].sum())
    num_rows = len(blocks) << layout.block_shift
    position_bits = max(n - 1, 1).bit_length()
    row_bits = num_rows.bit_length()
    if position_bits + row_bits > 63:
        raise ValueError(f"one update of {n} ids over {num_rows} rows is too large to sort")
    plan, ranges = _table_ranges(plan, num_rows)
    keys = workspace.take("keys", n, np.int64)
    spare = workspace.take("spare_keys", n, np.int64)
    addresses = workspace.take("gradient_addresses", n, np.int64)
    scales = None
    modes = plan[:, PLAN_MODE]
    is_scaled = (modes == MEAN) | (modes == MEAN_BY_COUNT) | (plan[:, PLAN_WEIGHTS] != 0)
    if np.count_nonzero(is_scaled):
        scales = workspace.take("gradient_scales", n, np.float32)
    shared = {
        "plan": plan,
        "keys": keys,
        "addresses": addresses,
        "scales": scales,
        "position_bits": position_bits,
        "no_row": num_rows,
        "dim_bytes": 4 * layout.embedding_dim,
    }
    threads = torch.get_num_threads()
    if n < _SORT_SERIAL or ranges[:, 1].max() * threads * 2 <= n:
        counts = workspace.take("digit_counts", threads << _DIGIT_BITS, np.int64)
        _sort_tables_kernel.launch(
            len(ranges), 1, **shared, spare=spare, ranges=ranges, all_counts=counts
        )
    else:
        _key_kernel.launch(split_plan(plan), 1, **shared, num_features=len(plan))
        keys = _radix_sort(keys, spare, n, position_bits, row_bits)
    return keys, addresses, scales, n, position_bits
