"""Sort the positions of an update by row, in Numba.

A position is packed with its row into 64 bits (row above, position below), so the sort moves one
word an id. With many tables each is sorted by itself, in cache; otherwise all threads share each
pass of a radix sort.
"""

from __future__ import annotations

import numpy as np
import torch

from recis_lightning.ops.cpu import runtime
from recis_lightning.ops.cpu.embedding_bag import bag_divisor, bag_start, feature_at, split_plan
from recis_lightning.ops.cpu.intrinsics import atomic_add, load_f32, load_i64, store_f32, store_i64
from recis_lightning.ops.cpu.runtime import address_of, num_chunks, workspace
from recis_lightning.ops.layout import (
    MEAN,
    PLAN_BAGS_PER_CHUNK,
    PLAN_DATA,
    PLAN_DATA_STRIDE,
    PLAN_FIRST_CHUNK,
    PLAN_FIRST_ID,
    PLAN_FLAT_BASE,
    PLAN_MODE,
    PLAN_NUM_BAGS,
    PLAN_NUM_IDS,
    PLAN_ROWS,
    PLAN_SIZE,
    PLAN_TILE_LEN,
    PLAN_WEIGHTS,
    TILE,
)

_SORT_SERIAL = 1 << 14  # fewer positions are sorted by one thread
_DIGIT_BITS = 12  # a digit's counters and open cache lines fit the first-level cache
_INSERTION_SORT = 32  # fewer keys of a table are sorted without counting
_F = np.float32


@runtime.kernel
def _key_kernel(args):
    plan, num_features = load_i64(args + 16), load_i64(args + 24)
    keys, addresses, scales = load_i64(args + 32), load_i64(args + 40), load_i64(args + 48)
    position_bits, none, dim_bytes = (
        load_i64(args + 56),
        load_i64(args + 64),
        load_i64(args + 72),
    )
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        line = plan + feature_at(plan, num_features, chunk) * 8 * PLAN_SIZE
        mode, first = load_i64(line + 8 * PLAN_MODE), load_i64(line + 8 * PLAN_FIRST_ID)
        rows, base = load_i64(line + 8 * PLAN_ROWS), load_i64(line + 8 * PLAN_FLAT_BASE)
        weights, tile_len = load_i64(line + 8 * PLAN_WEIGHTS), load_i64(line + 8 * PLAN_TILE_LEN)
        data, stride = load_i64(line + 8 * PLAN_DATA), load_i64(line + 8 * PLAN_DATA_STRIDE)
        per_chunk = load_i64(line + 8 * PLAN_BAGS_PER_CHUNK)
        low = (chunk - load_i64(line + 8 * PLAN_FIRST_CHUNK)) * per_chunk
        high = min(low + per_chunk, load_i64(line + 8 * PLAN_NUM_BAGS))
        for bag in range(low, high):
            start, end = bag_start(line, bag), bag_start(line, bag + 1)
            divisor = bag_divisor(mode, rows, weights, start, end)
            address = data + bag * stride
            for i in range(start, end):
                row = load_i64(rows + 8 * i)
                flat = base + row
                if row < 0 or (mode == TILE and i - start >= tile_len):
                    flat = none
                position = first + i
                store_i64(keys + 8 * position, (flat << position_bits) | position)
                store_i64(addresses + 8 * position, address)
                if mode == TILE:
                    address += dim_bytes
                if scales:
                    scale = load_f32(weights + 4 * i) if weights else _F(1)
                    if mode == MEAN:
                        scale = scale / divisor if divisor != _F(0) else _F(0)
                    store_f32(scales + 4 * position, scale)


@runtime.kernel
def _count_digits_kernel(args):
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)
    keys, counts = load_i64(args + 32), load_i64(args + 40)
    shift, digits = np.uint64(load_i64(args + 48)), load_i64(args + 56)
    mask = np.uint64(digits - 1)
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        mine = counts + 8 * digits * chunk
        for digit in range(digits):
            store_i64(mine + 8 * digit, 0)
        for i in range(chunk * chunk_size, min((chunk + 1) * chunk_size, n)):
            digit = np.int64((np.uint64(load_i64(keys + 8 * i)) >> shift) & mask)
            store_i64(mine + 8 * digit, load_i64(mine + 8 * digit) + 1)


@runtime.kernel
def _start_digits_kernel(args):
    # One chunk: turns counts [chunks, digits] into each chunk's first place of each digit.
    num_counts, counts, digits = load_i64(args + 16), load_i64(args + 24), load_i64(args + 32)
    total = np.int64(0)
    for digit in range(digits):
        for chunk in range(num_counts):
            place = counts + 8 * (chunk * digits + digit)
            count = load_i64(place)
            store_i64(place, total)
            total += count


@runtime.kernel
def _move_by_digit_kernel(args):
    chunk_size, n = load_i64(args + 16), load_i64(args + 24)
    keys, counts = load_i64(args + 32), load_i64(args + 40)
    shift, digits, out = np.uint64(load_i64(args + 48)), load_i64(args + 56), load_i64(args + 64)
    mask = np.uint64(digits - 1)
    chunks = load_i64(args + 8)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        mine = counts + 8 * digits * chunk
        for i in range(chunk * chunk_size, min((chunk + 1) * chunk_size, n)):
            key = load_i64(keys + 8 * i)
            place = mine + 8 * np.int64((np.uint64(key) >> shift) & mask)
            target = load_i64(place)
            store_i64(place, target + 1)
            store_i64(out + 8 * target, key)


@runtime.kernel
def _sort_tables_kernel(args):
    # A chunk is one table: its keys fit a cache, and its rows need fewer digits than all rows.
    keys, spare, ranges = load_i64(args + 16), load_i64(args + 24), load_i64(args + 32)
    position_bits, scratch = load_i64(args + 40), load_i64(args + 48)
    chunks = load_i64(args + 8)
    counts = scratch + 8 * (atomic_add(args + 56, 1) << _DIGIT_BITS)
    while True:
        chunk = atomic_add(args, 1)
        if chunk >= chunks:
            break
        first, n = load_i64(ranges + 32 * chunk), load_i64(ranges + 32 * chunk + 8)
        base, num_rows = load_i64(ranges + 32 * chunk + 16), load_i64(ranges + 32 * chunk + 24)
        here, there = keys + 8 * first, spare + 8 * first
        if n <= _INSERTION_SORT:
            for i in range(1, n):
                key = load_i64(here + 8 * i)
                j = i
                while j > 0 and load_i64(here + 8 * j - 8) > key:
                    store_i64(here + 8 * j, load_i64(here + 8 * j - 8))
                    j -= 1
                store_i64(here + 8 * j, key)
            continue
        row_bits, count_bits = np.int64(0), np.int64(0)
        while num_rows >> row_bits:
            row_bits += 1
        while n >> count_bits:
            count_bits += 1
        widest = np.int64(min(max(count_bits - 2, 4), _DIGIT_BITS - 1))
        passes = (row_bits + widest - 1) // widest
        low = np.int64(0)
        for done in range(passes):
            bits = row_bits // passes
            if done < row_bits % passes:
                bits += 1
            digits = np.int64(1) << bits
            for digit in range(digits):
                store_i64(counts + 8 * digit, 0)
            for i in range(n):
                row = min((load_i64(here + 8 * i) >> position_bits) - base, num_rows)
                place = counts + 8 * ((row >> low) & (digits - 1))
                store_i64(place, load_i64(place) + 1)
            total = np.int64(0)
            for digit in range(digits):
                count = load_i64(counts + 8 * digit)
                store_i64(counts + 8 * digit, total)
                total += count
            for i in range(n):
                key = load_i64(here + 8 * i)
                row = min((key >> position_bits) - base, num_rows)
                place = counts + 8 * ((row >> low) & (digits - 1))
                target = load_i64(place)
                store_i64(place, target + 1)
                store_i64(there + 8 * target, key)
            here, there = there, here
            low += bits
        if passes & 1:
            for i in range(n):
                store_i64(there + 8 * i, load_i64(here + 8 * i))


def _table_ranges(plan, num_rows):
    """Order the plan by table; return int64 [tables, 4]: first position, positions, base, rows."""
    bases = plan[:, PLAN_FLAT_BASE]
    if (bases[1:] < bases[:-1]).any():
        plan = plan[np.argsort(bases, kind="stable")]
        bases = plan[:, PLAN_FLAT_BASE]
    sizes = plan[:, PLAN_NUM_IDS]
    plan[:, PLAN_FIRST_ID] = np.cumsum(sizes) - sizes
    is_first = np.ones(len(bases), bool)
    np.not_equal(bases[1:], bases[:-1], out=is_first[1:])
    starts = np.flatnonzero(is_first)
    ranges = np.empty((len(starts), 4), np.int64)
    ranges[:, 0] = plan[starts, PLAN_FIRST_ID]
    ranges[:, 1] = np.add.reduceat(sizes, starts)
    ranges[:, 2] = firsts = bases[starts]
    ranges[:-1, 3] = firsts[1:]
    ranges[-1, 3] = num_rows
    ranges[:, 3] -= firsts
    return plan, ranges


def _radix_sort(keys, spare, n, low_bit, num_bits):
    """Sort ``keys[:n]`` by ``num_bits`` bits from ``low_bit``; return the array it ended in."""
    passes = -(-num_bits // _DIGIT_BITS)
    chunks = 1 if n < _SORT_SERIAL else torch.get_num_threads()
    chunk_size = max(num_chunks(n, chunks), 1)
    for done in range(passes):
        bits = num_bits // passes + (done < num_bits % passes)
        digits = 1 << bits
        counts = address_of(workspace.take("digit_counts", chunks * digits, np.int64))
        where = (chunk_size, n, address_of(keys), counts, low_bit, digits)
        _count_digits_kernel.launch(num_chunks(n, chunk_size), *where)
        _start_digits_kernel.launch(1, num_chunks(n, chunk_size), counts, digits)
        _move_by_digit_kernel.launch(num_chunks(n, chunk_size), *where, address_of(spare))
        keys, spare, low_bit = spare, keys, low_bit + bits
    return keys


def sort_gradients(plan, blocks, layout, blocks_on_device):
    """See the contract."""
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
    if plan[:, PLAN_WEIGHTS].any() or (plan[:, PLAN_MODE] == MEAN).any():
        scales = workspace.take("gradient_scales", n, np.float32)
    _key_kernel.launch(
        split_plan(plan),
        address_of(plan),
        len(plan),
        address_of(keys),
        address_of(addresses),
        0 if scales is None else address_of(scales),
        position_bits,
        num_rows,
        4 * layout.embedding_dim,
    )
    threads = torch.get_num_threads()
    if n < _SORT_SERIAL or ranges[:, 1].max() * threads * 2 <= n:
        counts = workspace.take("digit_counts", threads << _DIGIT_BITS, np.int64)
        where = (address_of(keys), address_of(spare), address_of(ranges), position_bits)
        _sort_tables_kernel.launch(len(ranges), *where, address_of(counts), 0)
    else:
        keys = _radix_sort(keys, spare, n, position_bits, row_bits)
    return keys, addresses, scales, n, position_bits
