"""SASRec: a transformer over what a user liked, in its order, says what comes next.

Every like is a sample, with the 20 before it, and the loss is a softmax over all items, as RecBole
has it. The paper takes one negative, and learns from every place of a sequence at once: with as
many likes a batch that is less to compute, and each is predicted from fewer before it.

Source: Kang and McAuley, "Self-Attentive Sequential Recommendation", 2018.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from recis_lightning import DynamicEmbedding
from recis_lightning.initializers import Normal


class Likes(Protocol):
    """Batch: items, int64 [B], and what came before each, int64 [B, L], the oldest first.

    An item is 1 or more; histories of less than L items have zeros behind them, and none is empty.
    """

    @property
    def items(self) -> Tensor:
        """Items that came next."""

    @property
    def histories(self) -> Tensor:
        """Items before them."""


class SASRec(nn.Module):
    """Vectors of histories, whose products with items' rows are scores.

    ``recis_lightning.serving.export(model, folder, example=histories)`` exports it as it is.

    Args:
        dim: Of rows and of vectors.
        num_layers: Of the transformer.
        num_heads: Of its attention.
        hidden: Width of the perceptrons in its layers.
        dropout: In its layers, and before them.
        std: Of the rows that ids begin with, and of weights.
        length: Items of a history, L.
    """

    def __init__(
        self,
        dim: int = 32,
        num_layers: int = 2,
        num_heads: int = 2,
        hidden: int = 64,
        dropout: float = 0.2,
        std: float = 0.02,
        length: int = 20,
    ) -> None:
        super().__init__()
        self.item = DynamicEmbedding(
            dim, name="item", initializer=Normal(std=std), padding_idx=0, seed=None
        )
        self.place = nn.Parameter(torch.empty(length, dim).normal_(std=std))
        self.before = nn.Sequential(nn.LayerNorm(dim), nn.Dropout(dropout))
        layer = nn.TransformerEncoderLayer(
            dim, num_heads, hidden, dropout, activation="gelu", batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        self.register_buffer("later", later, persistent=False)

    def encode(self, histories: Tensor) -> Tensor:
        """Return vectors of histories, int64 [B, L], after each of their items.

        Zeros behind the last item are later than it, so that it does not attend to them.

        Returns:
            [B, L, dim].
        """
        rows = self.before(self.item(histories) + self.place)
        # Said, not found in the mask: torch.export does not read values.
        found: Tensor = self.layers(rows, mask=self.later, is_causal=True)
        return found

    def forward(self, histories: Tensor) -> Tensor:
        """Return the vector of each history, int64 [B, L], after its last item, [B, dim]."""
        # shape[0], not len(): an exported program takes any number of histories.
        rows = torch.arange(histories.shape[0], device=histories.device)
        return self.encode(histories)[rows, (histories != 0).sum(1) - 1]

    def loss(self, batch: Likes) -> Tensor:
        """Return the softmax loss of what came after each history, among all items.

        All items are those that have a row by now; with many, ``sampled_softmax_loss`` takes some
        of them, as in ``two_towers``.
        """
        vectors = self(batch.histories)  # first, as it gives new items of histories their rows
        ids = torch.cat([self.item.table.ids(), batch.items]).unique()
        logits = vectors @ self.item(ids).T
        return nn.functional.cross_entropy(logits, torch.searchsorted(ids, batch.items))

    def scores(self, batch: Likes, items: Tensor) -> Tensor:
        """Return the scores of items, int64 [n], for users, [B, n].

        An item without a row, which training has not seen, has the score 0.
        """
        found: Tensor = self(batch.histories) @ self.item(items).T
        return found


def model(seed: int) -> SASRec:
    """Return a model whose rows and weights begin by a seed."""
    torch.manual_seed(seed)
    return SASRec()
