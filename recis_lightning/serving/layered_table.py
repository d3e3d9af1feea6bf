"""Table in layers: mapped bases, and over them in memory what deltas changed. It never changes.

Layers of deltas are merged as they come, so that each is some times as large as the one above it:
a lookup asks few of them, and a delta costs in proportion to what it changes, up to a logarithm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recis_lightning.serving import feature_lookup
from recis_lightning.serving.array_file import to_numpy
from recis_lightning.serving.merging import is_in
from recis_lightning.serving.served_table import ServedTable

Integers = npt.NDArray[np.int64]
_RATIO = 8  # of a layer's size to that of the one above it
_PLACE_BITS = 40


@dataclass(frozen=True)
class Layer:
    """Rows that deltas changed.

    Attributes:
        ids: int64 [n], ascending.
        removed: bool [n], whether an id has gone.
        weights: [n, dim]; of those that have gone they count for nothing.
    """

    ids: Integers
    removed: npt.NDArray[np.bool_]
    weights: Tensor

    @classmethod
    def of(cls, ids: Integers, weights: Tensor, removed: Integers) -> Layer:
        """Return the layer of a delta; an id that it has and removes stays."""
        gone = np.setdiff1d(removed, ids)
        all_ids = np.concatenate([ids, gone])
        order = np.argsort(all_ids)
        padded = torch.cat([weights, weights.new_zeros(len(gone), weights.shape[1])])
        return cls(all_ids[order], order >= len(ids), padded[torch.from_numpy(order)])

    def over(self, older: Layer) -> Layer:
        """Return this layer and the one below it in one."""
        kept = np.flatnonzero(~is_in(older.ids, self.ids))
        ids = np.concatenate([self.ids, older.ids[kept]])
        order = np.argsort(ids)
        weights = torch.cat([self.weights, older.weights[torch.from_numpy(kept)]])
        removed = np.concatenate([self.removed, older.removed[kept]])
        return Layer(ids[order], removed[order], weights[torch.from_numpy(order)])

    def without_strangers(self, base: ServedTable) -> Layer:
        """Return the layer without tombstones of ids that the base does not have."""
        gone = np.flatnonzero(self.removed)
        strangers = gone[base.find(self.ids[gone]) < 0]
        if not len(strangers):
            return self
        kept = np.ones(len(self.ids), np.bool_)
        kept[strangers] = False
        return Layer(self.ids[kept], self.removed[kept], self.weights[torch.from_numpy(kept)])

    def find(self, ids: Integers) -> tuple[npt.NDArray[np.bool_], Integers]:
        """Return whether the layer decides about each id, and its place; -1 if it has gone."""
        if not len(self.ids):
            return np.zeros(len(ids), np.bool_), np.zeros(len(ids), np.int64)
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        decided = self.ids[places] == ids
        return decided, np.where(self.removed[places], -1, places)


@dataclass(frozen=True)
class Shard:
    """Rows that one rank wrote.

    Attributes:
        base: Mapped.
        layers: What deltas changed since, the latest first.
    """

    base: ServedTable
    layers: tuple[Layer, ...] = ()

    def changed(self, layer: Layer) -> Shard:
        """Return the rows after another delta."""
        if not len(layer.ids):
            return self
        layers = [layer, *self.layers]
        while len(layers) > 1 and len(layers[0].ids) * _RATIO >= len(layers[1].ids):
            layers[:2] = [layers[0].over(layers[1])]
        if len(layers) == 1:
            layers = [layers[0].without_strangers(self.base)]
        return Shard(self.base, tuple(layers))


class LayeredTable:
    """``lookup.named_tables.RowReader`` of shards in layers. Any number of threads may look up.

    Args:
        shards: By rank, at least one; an id is in one of them at most.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        first = self.shards[0].base
        self.name, self.embedding_dim, self.dtype = first.name, first.embedding_dim, first.dtype
        # Readers of rows by number: of each shard its layers, the latest first, and its base.
        self._readers: list[Callable[[Integers], Any]] = []
        for shard in self.shards:
            self._readers += [to_numpy(layer.weights).__getitem__ for layer in shard.layers]
            self._readers.append(shard.base.read)

    @property
    def nbytes(self) -> int:
        """Bytes of the layers in memory."""
        layers = [layer for shard in self.shards for layer in shard.layers]
        return sum(
            layer.ids.nbytes + layer.removed.nbytes + layer.weights.nbytes for layer in layers
        )

    def find(self, ids: Integers) -> Integers:
        """Return each id's source and place in one number, -1 where it has none, int64 [n]."""
        found = self._find(self.shards[0], 0, ids)
        number = len(self.shards[0].layers) + 1
        for shard in self.shards[1:]:
            left = np.flatnonzero(found < 0)
            if not len(left):
                break
            found[left] = self._find(shard, number, ids[left])
            number += len(shard.layers) + 1
        return found

    @staticmethod
    def _find(shard: Shard, number: int, ids: Integers) -> Integers:
        """Return what a shard says of ids; ``number`` is that of its latest layer."""
        number += len(shard.layers)
        places = shard.base.find(ids)
        found = np.where(places < 0, -1, places + (number << _PLACE_BITS))
        for layer in reversed(shard.layers):
            number -= 1
            decided, places = layer.find(ids)
            known = np.where(places < 0, -1, places + (number << _PLACE_BITS))
            found = np.where(decided, known, found)
        return found

    def gather(self, places: Integers) -> Tensor:
        """Return the rows at places of ``find``, [n, dim] in the table's dtype, zeros for -1."""
        numbers = places >> _PLACE_BITS  # -1 of -1
        rows: Any = None
        for number, read in enumerate(self._readers):
            at = np.flatnonzero(numbers == number)
            if not len(at):
                continue
            part = read(places[at] - (number << _PLACE_BITS))
            if len(at) == len(places):
                rows = part
                break
            if rows is None:
                rows = np.zeros((len(places), self.embedding_dim), part.dtype)
            rows[at] = part
        if rows is None:
            return torch.zeros(len(places), self.embedding_dim, dtype=self.dtype, device="cpu")
        found = torch.from_numpy(rows)
        return found if found.dtype is self.dtype else found.view(self.dtype)

    look_up = feature_lookup.look_up


__all__ = ["Layer", "LayeredTable", "Shard"]
