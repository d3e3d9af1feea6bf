"""Memory of large outputs on the CPU, taken again as soon as nobody has it any more.

An output of many megabytes that malloc maps anew in each step costs a page fault for every 4 KiB,
more than its rows; and whether malloc does so depends on what else the process has freed. Here it
lies in huge pages that stay.
"""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.ops import host_memory

_LARGE = host_memory.HUGE_PAGE  # less than this malloc keeps by itself


class RecycledMemory:
    """Memory of tensors of which one lives at a time, as a rule.

    A tensor's memory is kept when the last reference to it goes, and given to the next one if it
    fits: no page is faulted in again. At most one is kept. Any number of threads may allocate.

    Example:
        >>> memory = RecycledMemory()
        >>> first = memory.empty(1024, 1024)
        >>> address = first.data_ptr()
        >>> del first
        >>> memory.empty(1000, 1024).data_ptr() == address
        True
    """

    def __init__(self) -> None:
        self._kept: deque[npt.NDArray[np.uint8]] = deque(maxlen=1)

    def empty(self, num_rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an uninitialised tensor [num_rows, width]; one that is not large is torch's own.

        Args:
            num_rows: Rows.
            width: Columns.
            dtype: Dtype.
        """
        num_bytes = num_rows * width * dtype.itemsize
        if num_bytes < _LARGE or host_memory.IS_GUARDED:  # guards see what is used when freed
            return torch.empty(num_rows, width, dtype=dtype, device="cpu")
        owner = _Owner(self._take(num_bytes))
        weakref.finalize(owner, self._kept.append, owner.memory).atexit = False
        storage = torch.from_numpy(np.asarray(owner)).untyped_storage()
        tensor = torch.empty(0, dtype=dtype, device="cpu")
        return tensor.set_(storage, 0, (num_rows, width), (width, 1))

    def _take(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Return the memory that was kept if it fits, else new memory."""
        try:
            kept = self._kept.pop()
        except IndexError:
            return host_memory.empty(num_bytes)
        # Whoever keeps a small output must not keep the memory of a large one.
        if num_bytes <= kept.nbytes <= 2 * num_bytes:
            return kept
        del kept  # before the new one is made
        return host_memory.empty(num_bytes)


class _Owner:
    """Owner of a tensor's memory, which the tensor keeps alive."""

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        self.memory = memory
        self.__array_interface__ = memory.__array_interface__


__all__ = ["RecycledMemory"]
