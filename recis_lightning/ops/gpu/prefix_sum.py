"""Prefix sum over the counts of programs, by which they number what they find."""

import triton.language as tl

from recis_lightning.ops.gpu.runtime import field, int64_at, kernel, lanes, sum_over, sums_up_to

_LANES = lanes(1024, 4096)


@kernel({"LANES": 1024})
def _add_up_kernel(counts: tl.int64, num_counts: tl.int64, flag: tl.int64, LANES: tl.constexpr):
    first = num_counts * 0
    before = num_counts * 0
    if flag != 0:
        if field(flag, 0) == 0:
            first = num_counts
    is_asked = first < num_counts
    while first < num_counts:
        i = first + tl.arange(0, LANES)
        count = tl.load(int64_at(counts + 8 * i), i < num_counts, 0)
        up_to = before + sums_up_to(count)
        tl.store(int64_at(counts + 8 * i), up_to - count, i < num_counts)
        before += sum_over(count, 0)
        first += LANES
    tl.store(int64_at(counts + 8 * num_counts), before, is_asked)


def add_up_(device, counts, num_counts, flag=0):
    """Turn counts into sums of the counts before each.

    One program does it, in one launch: the counts of a lookup of a million ids are four thousand.

    Args:
        device: Device of the counts.
        counts: Address of int64 [num_counts + 1]; the last is overwritten with the sum of all.
        num_counts: Number of counts, at least 1.
        flag: Address of an int64; where that is 0, nothing is done. 0 for none.
    """
    _add_up_kernel.launch(device, 1, counts, num_counts, flag, LANES=_LANES)


__all__ = ["add_up_"]
