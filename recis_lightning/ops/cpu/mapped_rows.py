"""Reading of rows of mapped files in Numba: many pages are asked for, then waited for."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from recis_lightning.ops.cpu.intrinsics import compare_and_swap, load_i64, store_i64
from recis_lightning.ops.cpu.runtime import kernel

_ROWS_PER_CHUNK = 64
_WILL_NEED = 3  # on Linux and macOS


@intrinsic
def _advise(typingctx, address, num_bytes, advice):
    """Call the C library's ``madvise``; ``address`` starts a page."""

    def codegen(context, builder, sig, args):
        i32, i64 = ir.IntType(32), ir.IntType(64)
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(i32, [pointer, i64, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "madvise")
        address = builder.inttoptr(args[0], pointer)
        return builder.call(function, [address, args[1], builder.trunc(args[2], i32)])

    return types.int32(types.int64, types.int64, types.int64), codegen


@kernel
def _bring_in_kernel(low, high, chunk, places, writes, page_bytes, sums):
    for i in range(low, high):
        start = load_i64(places + 16 * i)
        skipped = start & (page_bytes - 1)
        _advise(start - skipped, load_i64(places + 16 * i + 8) + skipped, _WILL_NEED)
    # Soon after: pages that nobody has used yet are the first to go where memory is short.
    total = np.int64(0)
    for i in range(low, high):
        start = load_i64(places + 16 * i)
        end, address = start + load_i64(places + 16 * i + 8), start
        while address < end:
            word = address & ~np.int64(7)
            if writes:  # a write that changes nothing
                compare_and_swap(word, 0, 0)
            else:
                total += load_i64(word)
            address = (address | (page_bytes - 1)) + 1
    store_i64(sums + 8 * chunk, total)  # so that nothing is left out


def bring_in(places, writes, page_bytes):
    """Bring places into memory, int64 [n, 2] of address and size, ready to be written or read.

    Each of torch's threads asks for the pages of a chunk, and then waits for them. A disk of a
    cloud read 19,000 pages of 4 KiB a second where one was asked for at a time, 80,000 of 32.
    """
    count = len(places)
    _bring_in_kernel.launch(
        count,
        _ROWS_PER_CHUNK,
        places=places,
        writes=writes,
        page_bytes=page_bytes,
        sums=np.empty(-(-count // _ROWS_PER_CHUNK), np.int64),
    )


__all__ = ["bring_in"]
