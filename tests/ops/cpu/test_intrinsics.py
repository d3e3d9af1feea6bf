import itertools

import numpy as np
import pytest
import torch
from numba import cfunc, types

from recis_lightning.ops.cpu.intrinsics import (
    add,
    at_least,
    at_most,
    equal_words,
    fma,
    lane_sum,
    load_f32,
    load_i64,
    load_vector,
    load_weights,
    lowest_bit,
    splat,
    store_f64,
    store_i64,
    store_vector,
    store_weights,
    stream_line,
    stream_vector,
    vector_width,
)

SPECIAL = [0.0, -0.0, 1.0, -2.5, 3.0e38, 1e-40, float("inf"), float("-inf"), float("nan"), 1.005]


def _call(function, *args):
    vector = np.array(args, np.int64)
    cfunc(types.void(types.int64))(function).ctypes(vector.ctypes.data)


def _add_one_kernel(width, bfloat16):
    def kernel(args):
        source, target = load_i64(args), load_i64(args + 8)
        value = add(load_weights(width, bfloat16, source), splat(width, np.float32(1)))
        store_weights(bfloat16, target, value)

    return kernel


def test_kernels_of_several_widths_and_dtypes_keep_to_their_own():
    """Numba's cache of intrinsics must not hand one kernel the code of another one's constants."""
    kinds = list(itertools.product((1, 8), (0, 1)))
    for width, bfloat16 in [*kinds, *reversed(kinds)]:
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        source = torch.arange(width + 1).to(dtype)
        target = torch.full((width + 1,), -7, dtype=dtype)
        _call(_add_one_kernel(width, bfloat16), source.data_ptr(), target.data_ptr())
        assert target.tolist() == [*range(1, width + 1), -7]


def test_bfloat16_rounds_as_torch_does():
    """Ties go to even, infinities and NaN stay what they are."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (512,), generator=generator).to(torch.int32)
    ties = (torch.arange(64, dtype=torch.int32) << 15) + 0x3F800000
    values = torch.cat([bits.view(torch.float32), ties.view(torch.float32), torch.tensor(SPECIAL)])
    out = torch.empty(values.numel(), dtype=torch.bfloat16)

    def kernel(args):
        source, target, count = load_i64(args), load_i64(args + 8), load_i64(args + 16)
        for i in range(count):
            store_weights(1, target + 2 * i, load_vector(1, source + 4 * i))

    _call(kernel, values.data_ptr(), out.data_ptr(), values.numel())
    torch.testing.assert_close(out, values.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_lane_sum_adds_in_float64():
    """A small lane beside a large one is not lost."""
    values, out = torch.tensor([2.0**30, 1.0, 1.0, -(2.0**30)]), np.zeros(1)

    def kernel(args):
        store_f64(load_i64(args + 8), lane_sum(load_vector(4, load_i64(args))))

    _call(kernel, values.data_ptr(), out.ctypes.data)
    assert out[0] == 2.0


def test_clamps_keep_nan_and_fma_rounds_once():
    """Clamps behave as ``torch.clamp``; ``fma`` keeps what a rounded product loses."""
    values = torch.tensor([-3.0, 0.5, 3.0, float("nan")])
    clamped, product = torch.empty(4), torch.empty(4)

    def kernel(args):
        value, bound = load_vector(4, load_i64(args)), splat(4, np.float32(1))
        store_vector(load_i64(args + 8), at_least(at_most(value, bound), splat(4, np.float32(-1))))
        tiny = splat(4, load_f32(load_i64(args + 24)))
        store_vector(load_i64(args + 16), fma(tiny, tiny, splat(4, np.float32(-1))))

    above_one = torch.tensor([1 + 2.0**-12])
    addresses = (t.data_ptr() for t in (values, clamped, product, above_one))
    _call(kernel, *addresses)
    torch.testing.assert_close(clamped, values.clamp(-1, 1), rtol=0, atol=0, equal_nan=True)
    assert product.tolist() == [2.0**-11 + 2.0**-24] * 4


@pytest.mark.parametrize(("dim", "width"), [(1, 1), (2, 2), (24, 8), (33, 1), (48, 16), (100, 4)])
def test_vector_width_divides_the_dim(dim, width):
    """Rows are whole vectors, so no lane reads a neighbour's row."""
    assert vector_width(dim) == width


def test_equal_words_has_a_bit_for_each_word():
    """Of eight words at any multiple of eight bytes; ``lowest_bit`` of none is 64."""

    def kernel(args):
        bits = equal_words(load_i64(args), load_i64(args + 8))
        store_i64(load_i64(args + 16), bits)
        store_i64(load_i64(args + 16) + 8, lowest_bit(bits))

    words, found = np.zeros(17, np.int64), np.zeros(2, np.int64)
    lowest = -(2**63)
    for start, value, places in (
        (0, 7, []),
        (1, 7, [3]),
        (2, lowest, [0, 7]),
        (3, -1, [2, 4, 6]),
    ):
        words[:] = 5
        words[[start + place for place in places]] = value
        words[start + 8] = value  # the word behind does not count
        _call(kernel, words.ctypes.data + 8 * start, value, found.ctypes.data)
        assert found[0] == sum(1 << place for place in places)
        assert found[1] == min(places, default=64)


def test_a_line_goes_past_the_caches():
    """Sixty-four bytes, no more."""

    def kernel(args):
        stream_line(load_i64(args), load_i64(args + 8))

    memory = torch.arange(40)
    start = -memory.data_ptr() % 64 // 8  # of its first line
    target = memory.data_ptr() + 8 * (start + 16)
    _call(kernel, target, memory.data_ptr() + 8 * start)
    wanted = torch.arange(40)
    wanted[start + 16 : start + 24] = wanted[start : start + 8]
    assert torch.equal(memory, wanted)


def test_lanes_go_past_the_caches():
    """As many as there are, to where they belong."""

    def kernel(args):
        stream_vector(load_i64(args), load_vector(16, load_i64(args + 8)))

    memory = torch.arange(80.0)
    start = -memory.data_ptr() % 64 // 4
    _call(kernel, memory.data_ptr() + 4 * (start + 32), memory.data_ptr() + 4 * (start + 3))
    wanted = torch.arange(80.0)
    wanted[start + 32 : start + 48] = wanted[start + 3 : start + 19]
    assert torch.equal(memory, wanted)
