"""DLRM: numbers through a perceptron, ids through tables, and the products of all pairs of them.

Source: Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation
Systems", 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recis_lightning import EmbeddingEngine, EmbeddingOption
from recis_lightning.cli.movielens import FEATURES, Examples
from recis_lightning.initializers import Normal

IDS = [name for name in FEATURES if name != "age"]


class DLRM(nn.Module):
    """Logits of examples, by products of pairs of features and a perceptron.

    Args:
        dim: Of each feature's rows, and of what the lower perceptron makes of the numbers.
        hidden: Widths of the upper perceptron's layers.
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
        option = EmbeddingOption(dim, initializer=Normal(std=std), seed=None)
        bag = EmbeddingOption(dim, mode="mean", initializer=Normal(std=std), seed=None)
        self.engine = EmbeddingEngine({name: bag if name == "genres" else option for name in IDS})
        self.lower = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, dim), nn.ReLU())
        num = len(IDS) + 1
        pairs = torch.triu_indices(num, num, offset=1)
        self.register_buffer("pairs", pairs, persistent=False)
        self.upper = nn.Sequential(
            *(nn.Linear(num * dim + pairs.shape[1], hidden[0]), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(*hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden[1], 1)),
        )

    def forward(self, batch: Examples) -> Tensor:
        """Return logits [B]."""
        ids = self.engine.concat({name: batch.features[name] for name in IDS})  # [B, 7 * dim]
        features = torch.cat([ids, self.lower(numbers(batch))], dim=1)
        vectors = features.unflatten(1, (len(IDS) + 1, -1))  # [B, 8, dim]
        first, second = self.pairs  # type: ignore[misc]
        products = (vectors @ vectors.transpose(1, 2))[:, first, second]  # [B, 28]
        logits: Tensor = self.upper(torch.cat([features, products], dim=1)).squeeze(1)
        return logits


def numbers(batch: Examples) -> Tensor:
    """Return the numbers of examples, [B, 1]: this data has one, the user's age."""
    age = batch.features["age"]
    assert isinstance(age, Tensor)
    return (age.float() / 40 - 1).unsqueeze(1)


def model(seed: int) -> DLRM:
    """Return a model whose rows and weights begin by a seed."""
    torch.manual_seed(seed)
    return DLRM()
