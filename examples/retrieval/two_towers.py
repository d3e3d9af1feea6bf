"""Two towers: vectors of users, from their id and history, and of items; their product scores.

Negatives are the other items of a batch, and items drawn by their popularity.

Source: Yi et al., "Sampling-bias-corrected neural modeling for large corpus item recommendations",
2019; Yang et al., "Mixed negative sampling for learning two-tower neural networks in
recommendations", 2020.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from examples.movielens import Likes
from recis_lightning import DynamicEmbedding, DynamicEmbeddingBag
from recis_lightning.eviction import MaxRows
from recis_lightning.initializers import Normal
from recis_lightning.retrieval import sampled_softmax_loss


class TwoTowers(nn.Module):
    """Vectors of length 1 of users and of items.

    Args:
        dim: Of the vectors, and of rows.
        num_negatives: Items drawn for each batch, beside its own.
        temperature: That products are divided by in the loss.
        std: Of the rows that ids begin with.
        seed: Of the draws.
    """

    def __init__(
        self,
        dim: int = 64,
        num_negatives: int = 256,
        temperature: float = 0.15,
        std: float = 0.02,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_negatives, self.temperature = num_negatives, temperature
        start: dict[str, Any] = {"initializer": Normal(std=std), "seed": None}
        self.user = DynamicEmbedding(dim, name="user", **start)
        self.history = DynamicEmbeddingBag(dim, padding_idx=0, name="history", **start)
        self.item = DynamicEmbedding(dim, name="item", **start)
        # Training lookups count: only likes go through this table, so its counts are theirs.
        counted = MaxRows(100_000, by="count")
        self.likes = DynamicEmbedding(1, name="likes", eviction=counted, trainable=False)
        self.user_layers = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.item_layers = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.draws = torch.Generator().manual_seed(seed)

    def encode_users(self, batch: Likes) -> Tensor:
        """Return vectors of users, [B, dim]."""
        rows = self.user(batch.users) + self.history(batch.histories)
        return nn.functional.normalize(rows + self.user_layers(rows), dim=1)

    def encode_items(self, ids: Tensor) -> Tensor:
        """Return vectors of items, [n, dim]."""
        rows = self.item(ids)
        return nn.functional.normalize(rows + self.item_layers(rows), dim=1)

    def loss(self, batch: Likes) -> Tensor:
        """Return the sampled softmax loss of likes."""
        self.likes(batch.items)
        drawn = self.likes.table.sample(self.num_negatives, "count", self.draws)
        own = self.likes.table.sampling_probabilities(batch.items)
        ids = torch.cat([batch.items, drawn.ids])
        shares = torch.cat([own, drawn.probabilities])
        towers = self.encode_users(batch), self.encode_items(ids)
        return sampled_softmax_loss(*towers, ids, shares, self.temperature)

    def scores(self, batch: Likes, items: Tensor) -> Tensor:
        """Return the scores of items, int64 [n], for users, [B, n]."""
        return self.encode_users(batch) @ self.encode_items(items).T


def model(seed: int) -> TwoTowers:
    """Return a model whose rows, weights and draws begin by a seed."""
    torch.manual_seed(seed)
    return TwoTowers(seed=seed)
