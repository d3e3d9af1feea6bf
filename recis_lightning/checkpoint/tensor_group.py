"""Tensors of a shard file, read in chunks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Limits of a chunk. Threads hold the GIL between chunks: with larger, hence fewer, chunks a load
# takes two thirds of the time.
_CHUNK_BYTES, _CHUNK_ROWS = 1 << 22, 1 << 16


class TensorSpec(NamedTuple):
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one item along the first dimension."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return self.row_bytes * self.shape[0]


class TensorGroup(NamedTuple):
    """Tensors with the same number of rows, of which ranges are read together.

    Attributes:
        specs: By name.
        read: Takes the start and stop of a range; returns these rows of each tensor.
    """

    specs: dict[str, TensorSpec]
    read: Callable[[int, int], Mapping[str, Tensor]]

    def prefixed(self, prefix: str) -> TensorGroup:
        """Return the group with the names ``prefix/name``."""

        def read(start: int, stop: int) -> dict[str, Tensor]:
            return {f"{prefix}/{name}": part for name, part in self.read(start, stop).items()}

        return TensorGroup({f"{prefix}/{name}": spec for name, spec in self.specs.items()}, read)

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorGroup:
        """Return the group of one tensor in memory."""
        spec = TensorSpec(tensor.dtype, tuple(tensor.shape))
        return cls({name: spec}, lambda start, stop: {name: tensor[start:stop]})

    @property
    def length(self) -> int:
        """Rows of each tensor."""
        return next(iter(self.specs.values())).shape[0]

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk."""
        widest = max(spec.row_bytes for spec in self.specs.values())
        return min(max(_CHUNK_BYTES // max(widest, 1), 1), _CHUNK_ROWS)


__all__ = ["TensorGroup", "TensorSpec"]
