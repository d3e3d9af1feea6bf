"""The demo's DeepFM with ``nn.Embedding`` in place of tables: what the load test compares with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from examples.deepfm.model import DeepFM
from recis_lightning import Jagged, hash_tables
from recis_lightning.data import Features


class PlainDeepFM(nn.Module):
    """DeepFM of plain PyTorch: ids become positions by a sorted vocabulary, unknown ones zeros.

    Args:
        model: A trained model; its weights are copied.
        features: By which columns become ids.
    """

    def __init__(self, model: DeepFM, features: Features) -> None:
        super().__init__()
        self._features = features
        self._vocabularies: dict[str, Tensor] = {}
        self.embeddings = nn.ModuleDict()
        self.perceptron = model.perceptron
        for table in hash_tables(model):
            ids = table.ids().sort().values
            rows = torch.cat([torch.zeros(1, table.embedding_dim), table.embeddings(ids)])
            is_bag = model.embeddings[table.name].mode == "mean"
            kind: Any = nn.EmbeddingBag if is_bag else nn.Embedding
            key = table.name + "_rows"  # a module may not be called "type"
            self.embeddings[key] = kind.from_pretrained(rows, padding_idx=0)
            self._vocabularies[table.name] = ids
        self.eval()

    def forward(self, columns: Mapping[str, Any]) -> Tensor:
        """Return the probability of a click [B]."""
        with torch.no_grad():
            entries = self._features(columns)
            found = [self._look_up(name, entries[name]) for name in self._vocabularies]
            rows = torch.stack(found, 1)
            weights, factors = rows[..., 0], rows[..., 1:]
            pairs = (factors.sum(1).square() - factors.square().sum(1)).sum(1) / 2
            deep: Tensor = self.perceptron(factors.flatten(1))
            return (weights.sum(1) + pairs + deep.squeeze(1)).sigmoid()

    def _look_up(self, name: str, entry: Tensor | Jagged) -> Tensor:
        ids = entry.values if isinstance(entry, Jagged) else entry
        vocabulary = self._vocabularies[name]
        at = torch.searchsorted(vocabulary, ids).clamp(max=len(vocabulary) - 1)
        places = torch.where(vocabulary[at] == ids, at + 1, 0)
        embedding = self.embeddings[name + "_rows"]
        if isinstance(entry, Jagged):
            found: Tensor = embedding(places, entry.offsets[:-1])
        else:
            found = embedding(places)
        return found


__all__ = ["PlainDeepFM"]
