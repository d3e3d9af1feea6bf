"""Touching of rows in Numba, by threads that wait for the disk."""

from __future__ import annotations

import numpy as np

from recis_lightning.ops.cpu.intrinsics import compare_and_swap, load_i64, store_i64
from recis_lightning.ops.cpu.runtime import kernel

_ROWS_PER_CHUNK = 8


@kernel
def _touch_kernel(low, high, chunk, places, writes, page_bytes, sums):
    total = np.int64(0)
    for i in range(low, high):
        start = load_i64(places + 16 * i)
        end, address = start + load_i64(places + 16 * i + 8), start
        while address < end:
            word = address & ~np.int64(7)
            value = load_i64(word)
            total += value
            if writes:  # a write that changes nothing
                compare_and_swap(word, value, value)
            address = (address | (page_bytes - 1)) + 1
    store_i64(sums + 8 * chunk, total)  # so that nothing is left out


def touch(places, writes, page_bytes):
    """Read a byte of each page of each place, int64 [n, 2] of address and size, or write it."""
    _touch_kernel.launch(
        len(places),
        _ROWS_PER_CHUNK,
        waits=True,
        places=places,
        writes=writes,
        page_bytes=page_bytes,
        sums=np.empty(-(-len(places) // _ROWS_PER_CHUNK), np.int64),
    )


__all__ = ["touch"]
