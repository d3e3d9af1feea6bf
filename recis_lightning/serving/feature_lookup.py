"""Lookup of one feature in the rows of a table that is served, from wherever they lie.

``look_up`` is a method of the tables, which find ids and gather rows.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.serving import pooling

Integers = npt.NDArray[np.int64]


class RowFinder(Protocol):
    """Rows by id: what a lookup needs of a table."""

    @property
    def name(self) -> str:
        """The table's name."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of outputs."""

    def find(self, ids: Integers) -> Integers:
        """Return each id's place, -1 where it has none, int64 [n]."""

    def gather(self, places: Integers) -> Tensor:
        """Return the rows at places, [n, dim] in ``dtype``, zeros for -1."""


def look_up(
    table: RowFinder,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    mode: str,
    tile_len: int,
    padding_idx: int | None,
) -> Tensor:
    """Look a feature up, as the operator ``recis_lightning::look_up`` describes.

    Raises:
        ValueError: Offsets are malformed, or what is read is damaged.
    """
    flat = np.ascontiguousarray(ids.numpy().reshape(-1), np.int64)
    places = table.find(flat)
    padding = None
    if padding_idx is not None:
        padding = flat == padding_idx
        places[padding] = -1
    if mode == "none" and weights is None:
        return table.gather(places)
    gathered = table.gather(places)
    rows = (gathered if gathered.dtype is torch.float32 else gathered.float()).numpy()
    values = None if weights is None else weights.detach().numpy().reshape(-1)
    if values is not None and mode in ("none", "tile"):
        with np.errstate(all="ignore"):
            rows = np.where((places >= 0)[:, None], rows * values[:, None], np.float32(0))
    if mode == "none":
        return _as_dtype(rows, table.dtype)
    bags = _bags(table.name, ids, offsets)
    if mode == "tile":
        pooled = pooling.tile(rows, bags, tile_len)
    else:
        pooled = pooling.pool(rows, places >= 0, padding, bags, mode, values)
    return _as_dtype(pooled, table.dtype)


def _as_dtype(rows: npt.NDArray[np.float32], dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(rows)
    return tensor if dtype is torch.float32 else tensor.to(dtype)


def _bags(name: str, ids: Tensor, offsets: Tensor | None) -> pooling.Bags:
    if offsets is None:
        num_bags = ids.shape[0]
        length = ids.shape[1] if ids.dim() == 2 else 1
        lengths = np.full(num_bags, length, np.int64)
        return pooling.Bags(np.arange(num_bags, dtype=np.int64) * length, lengths, length)
    edges = np.ascontiguousarray(offsets.numpy(), np.int64)
    lengths = np.diff(edges)
    ends = (edges[0], edges[-1]) if len(edges) else (0, -1)
    if ends != (0, ids.numel()) or (lengths < 0).any():
        raise ValueError(
            f"offsets: of a feature of table {name!r} must start at 0, never descend and "
            f"end at the number of ids, {ids.numel()}; got {edges[:8].tolist()}"
        )
    return pooling.Bags(edges[:-1], lengths)


__all__ = ["RowFinder", "look_up"]
