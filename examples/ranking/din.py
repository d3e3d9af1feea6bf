"""DIN: what a user liked before, weighed by its likeness to the item that is scored.

Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.movielens import HISTORY
from recis_lightning import DynamicEmbedding, DynamicEmbeddingBag, Jagged
from recis_lightning.cli.movielens import Examples
from recis_lightning.initializers import Normal


class DIN(nn.Module):
    """Logits of examples, by attention of an item over a user's history.

    Args:
        dim: Of the rows of items, and of users.
        hidden: Widths of the layers behind.
        dropout: Behind each of these.
        std: Of the rows that ids begin with.
    """

    def __init__(
        self,
        dim: int = 16,
        hidden: tuple[int, int] = (128, 64),
        dropout: float = 0.2,
        std: float = 0.05,
    ) -> None:
        super().__init__()
        start = Normal(std=std)
        self.item = DynamicEmbedding(dim, name="item", initializer=start, padding_idx=0, seed=None)
        self.genres = DynamicEmbeddingBag(dim, name="genres", initializer=start, seed=None)
        self.user = DynamicEmbedding(dim, name="user", initializer=start, seed=None)
        self.attention = nn.Sequential(nn.Linear(4 * dim, 64), nn.Sigmoid(), nn.Linear(64, 1))
        self.perceptron = nn.Sequential(
            *(nn.Linear(5 * dim, hidden[0]), nn.BatchNorm1d(hidden[0]), nn.PReLU()),
            *(nn.Dropout(dropout), nn.Linear(*hidden), nn.BatchNorm1d(hidden[1]), nn.PReLU()),
            *(nn.Dropout(dropout), nn.Linear(hidden[1], 1)),
        )

    def forward(self, batch: Examples) -> Tensor:
        """Return logits [B]."""
        history, genres = batch.features["history"], batch.features["genres"]
        assert isinstance(history, Jagged)
        assert isinstance(genres, Jagged)
        before, is_there = history.to_padded(HISTORY)  # [B, HISTORY]; no item has the id 0
        items, liked = self.item(batch.features["item"]), self.item(before)
        wanted = items.unsqueeze(1).expand_as(liked)
        both = torch.cat([wanted, liked, wanted - liked, wanted * liked], dim=2)
        weights = self.attention(both).squeeze(2).masked_fill(~is_there, 0.0)
        interest = (weights.unsqueeze(2) * liked).sum(1)
        parts = [interest, items, interest * items, self.user(batch.features["user"])]
        parts.append(self.genres(genres))
        logits: Tensor = self.perceptron(torch.cat(parts, dim=1)).squeeze(1)
        return logits


def model(seed: int) -> DIN:
    """Return a model whose rows and weights begin by a seed."""
    torch.manual_seed(seed)
    return DIN()
