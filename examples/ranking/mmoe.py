"""MMoE: one set of tables and experts for several tasks, each with a gate and a tower of its own.

Source: Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate
Mixture-of-Experts", 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recis_lightning import EmbeddingEngine, EmbeddingOption
from recis_lightning.cli.movielens import FEATURES, Examples
from recis_lightning.initializers import Normal


class MMoE(nn.Module):
    """Logits of examples for each task.

    Args:
        num_tasks: With one, this is an ordinary model of that task.
        dim: Of each feature's rows.
        num_experts: Perceptrons of one hidden layer.
        hidden: Widths of experts, and of the towers' layer.
        dropout: Behind each of these.
        std: Of the rows that ids begin with.
    """

    def __init__(
        self,
        num_tasks: int = 2,
        dim: int = 16,
        num_experts: int = 4,
        hidden: tuple[int, int] = (128, 64),
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
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden[0]), nn.ReLU(), nn.Dropout(dropout))
            for _ in range(num_experts)
        )
        self.gates = nn.ModuleList(nn.Linear(width, num_experts) for _ in range(num_tasks))
        self.towers = nn.ModuleList(
            nn.Sequential(
                *(nn.Linear(*hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden[1], 1))
            )
            for _ in range(num_tasks)
        )

    def forward(self, batch: Examples) -> Tensor:
        """Return logits [B, number of tasks]."""
        rows = self.engine.concat({name: batch.features[name] for name in FEATURES})
        opinions = torch.stack([expert(rows) for expert in self.experts], dim=1)  # [B, E, hidden]
        logits = []
        for gate, tower in zip(self.gates, self.towers, strict=True):
            weights = gate(rows).softmax(dim=1).unsqueeze(1)  # [B, 1, E]
            logits.append(tower((weights @ opinions).squeeze(1)))
        return torch.cat(logits, dim=1)


def model(seed: int) -> MMoE:
    """Return a model of two tasks whose rows and weights begin by a seed."""
    torch.manual_seed(seed)
    return MMoE()


def one_task(seed: int) -> MMoE:
    """Return the same with a gate and a tower for one task, as ``model`` does."""
    torch.manual_seed(seed)
    return MMoE(num_tasks=1)
