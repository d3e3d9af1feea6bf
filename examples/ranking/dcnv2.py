"""DCN v2, stacked: cross layers over the rows of eight tables, and a perceptron behind them.

Source: Wang et al., "DCN V2: Improved Deep & Cross Network", 2021.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from recis_lightning import EmbeddingEngine, EmbeddingOption
from recis_lightning.cli.movielens import FEATURES, Examples
from recis_lightning.initializers import Normal


class DCNv2(nn.Module):
    """Logits of examples, by cross layers ``x0 * (W x + b) + x`` and a perceptron.

    Args:
        dim: Of each feature's rows.
        num_cross: Cross layers.
        hidden: Widths of the perceptron's layers.
        dropout: Behind each of these.
        std: Of the rows that ids begin with.
    """

    def __init__(
        self,
        dim: int = 16,
        num_cross: int = 3,
        hidden: tuple[int, ...] = (128, 64),
        dropout: float = 0.2,
        std: float = 0.05,
    ) -> None:
        super().__init__()
        option = EmbeddingOption(dim, initializer=Normal(std=std), seed=None)
        bag = EmbeddingOption(dim, mode="mean", initializer=Normal(std=std), seed=None)
        self.engine = EmbeddingEngine(
            {name: bag if name == "genres" else option for name in FEATURES}
        )
        width = dim * len(FEATURES)
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(num_cross))
        layers: list[nn.Module] = []
        for before, after in pairwise((width, *hidden)):
            layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
            layers += [nn.Dropout(dropout)]
        self.perceptron = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))

    def forward(self, batch: Examples) -> Tensor:
        """Return logits [B]."""
        start = self.engine.concat({name: batch.features[name] for name in FEATURES})
        crossed = start
        for layer in self.cross:
            crossed = start * layer(crossed) + crossed
        logits: Tensor = self.perceptron(crossed).squeeze(1)
        return logits


def model(seed: int) -> DCNv2:
    """Return a model whose rows and weights begin by a seed."""
    torch.manual_seed(seed)
    return DCNv2()
