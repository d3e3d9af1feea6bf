"""Output buffers of many features: columns of one tensor, or tensors that share a few allocations.

An allocation costs torch microseconds, which hundreds of small features feel. So small outputs of
one width share memory, though none is a view of another: each can be changed in place and has its
own version. A shared buffer is small, because whoever keeps one of its outputs keeps all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_SMALL_BYTES = 1 << 16  # an output up to here shares memory
_SHARED_BYTES = 1 << 20


class Columns(NamedTuple):
    """Columns of one tensor, in place of an output for each feature.

    Attributes:
        tensor: [B, width], contiguous rows.
        first: int64 [num_features], each feature's first column.
    """

    tensor: Tensor
    first: npt.NDArray[np.int64]

    def addresses(self) -> npt.NDArray[np.int64]:
        """Return where each feature's first bag lies."""
        return self.first * self.tensor.element_size() + self.tensor.data_ptr()

    def stride_bytes(self) -> int:
        """Return the bytes from one bag to the next."""
        return self.tensor.stride(0) * self.tensor.element_size()


class OutputRun(NamedTuple):
    """Neighbouring outputs that share an allocation.

    Attributes:
        shape: (rows, width) of the allocation.
        counts: Rows of each output; one: the allocation is the output.
    """

    shape: tuple[int, int]
    counts: list[int]


def output_runs(counts: Sequence[int], widths: Sequence[int], item: int) -> list[OutputRun]:
    """Return which outputs [counts[i], widths[i]], of ``item`` bytes a number, share memory."""
    runs: list[OutputRun] = []
    first, total = 0, len(counts)
    while first < total:
        width, last = widths[first], first + 1
        rows = counts[first]
        if rows * width * item <= _SMALL_BYTES:
            room = _SHARED_BYTES // max(width * item, 1)
            while last < total and widths[last] == width and rows + counts[last] <= room:
                if counts[last] * width * item > _SMALL_BYTES:
                    break
                rows += counts[last]
                last += 1
        runs.append(OutputRun((rows, width), list(counts[first:last])))
        first = last
    return runs


def allocate_outputs(runs: Sequence[OutputRun], prototype: Tensor) -> list[Tensor]:
    """Allocate uninitialised outputs of the prototype's dtype and device."""
    new_empty = prototype.new_empty
    outputs: list[Tensor] = []
    for shape, counts in runs:
        if len(counts) == 1:
            outputs.append(new_empty(shape))
        else:  # "unsafe": its outputs are no views to autograd, which is what they must not be
            outputs += torch.unsafe_split_with_sizes(new_empty(shape), counts)
    return outputs


__all__ = ["Columns", "OutputRun", "allocate_outputs", "output_runs"]
