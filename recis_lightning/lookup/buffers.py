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

# Tensors that share memory are views, with restrictions, only where this key is not excluded.
_VIEW_TRACKING = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


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


def allocate_outputs(
    counts: Sequence[int], widths: Sequence[int], prototype: Tensor
) -> list[Tensor]:
    """Allocate uninitialised outputs [counts[i], widths[i]] of the prototype's dtype and device."""
    new_empty, item = prototype.new_empty, prototype.element_size()
    outputs: list[Tensor] = []
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
        if last == first + 1:
            outputs.append(new_empty((rows, width)))
        else:
            with (
                torch._C._AutoDispatchBelowAutograd(),
                torch._C._ExcludeDispatchKeyGuard(_VIEW_TRACKING),
            ):
                outputs += torch.split_with_sizes(
                    new_empty((rows, width)), list(counts[first:last])
                )
        first = last
    return outputs


__all__ = ["Columns", "allocate_outputs"]
