"""Ids that occur often within one program: one lane acts for all that have the same.

Atomics on one address wait for each other, so of an id that fills a batch only one lane a program
should reach memory. A program looks for as many such ids as it has rounds: in each, the first lane
that is left acts for all with its id.
"""

import triton.language as tl

from recis_lightning.ops.gpu.runtime import device_function, largest, sum_over

ROUNDS = tl.constexpr(2)


@device_function
def _first_group(key, left, LANES: tl.constexpr):
    """Return which lanes have the same id as the first one of ``left``, and that lane."""
    lane = tl.arange(0, LANES)
    first = LANES - largest(tl.where(left, LANES - lane, 0))  # LANES if none is left
    is_first = lane == first
    first_key = sum_over(tl.where(is_first, key, 0), 0)
    return left & (key == first_key), is_first


@device_function
def acting(key, on, LANES: tl.constexpr):
    """Return which lanes act: all that are ``on`` but those for which an earlier one does."""
    left, acts = on, on
    for _ in tl.static_range(0, ROUNDS):
        group, is_first = _first_group(key, left, LANES)
        acts = acts & ((group == 0) | is_first)
        left = left & (group == 0)
    return acts


@device_function
def of_acting(key, value, on, LANES: tl.constexpr):
    """Return the values, int64, with that of the lane that acted for a lane in its place."""
    left = on
    for _ in tl.static_range(0, ROUNDS):
        group, is_first = _first_group(key, left, LANES)
        acted = sum_over(tl.where(is_first, value, 0), 0)
        value = tl.where(group, acted, value)
        left = left & (group == 0)
    return value


@device_function
def added_up(key, value, on, LANES: tl.constexpr):
    """Return the values, int64, with the sum of all for which a lane acts in its place."""
    left = on
    for _ in tl.static_range(0, ROUNDS):
        group, is_first = _first_group(key, left, LANES)
        total = sum_over(tl.where(group, value, 0), 0)
        value = tl.where(is_first & group, total, value)
        left = left & (group == 0)
    return value


__all__ = ["acting", "added_up", "of_acting"]
