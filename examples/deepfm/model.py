"""DeepFM: a factorization machine and a perceptron over the same embeddings.

Source: Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction", 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC

from examples.deepfm.batch import Batch
from recis_lightning import EmbeddingEngine, EmbeddingOption, HashTable, hash_tables
from recis_lightning.metrics import GAUC
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer, SparseOptimizer
from recis_lightning.trace import add_to_trace


def adamw(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the default dense optimizer."""
    return torch.optim.AdamW(params, lr=1e-3)


def sparse_adam(tables: Iterable[HashTable]) -> SparseOptimizer:
    """Return the default optimizer of tables."""
    return SparseAdam(tables, lr=1e-3)


class DeepFM(L.LightningModule):
    """Predict clicks from ids, bags of ids and numbers.

    A row of a table holds a first-order weight and then the factors that the factorization machine
    and the perceptron share, so one lookup serves all three.

    Args:
        embeddings: Feature -> option, for each feature of the model. All have the same
            ``embedding_dim``, one more than the number of factors, and each feature gives one row
            for each example (``mode`` ``"sum"`` or ``"mean"`` for bags).
        num_dense: Number of dense inputs of an example.
        hidden: Widths of the perceptron's layers.
        dropout: Probability, after each of these layers.
        dense_optimizer: Function of the perceptron's parameters that returns their optimizer.
        sparse_optimizer: Function of the tables that returns their optimizer.
    """

    def __init__(
        self,
        embeddings: dict[str, EmbeddingOption],
        num_dense: int = 0,
        hidden: Sequence[int] = (128, 64),
        dropout: float = 0.2,
        dense_optimizer: OptimizerCallable = adamw,
        sparse_optimizer: Callable[[Iterable[HashTable]], SparseOptimizer] = sparse_adam,
    ) -> None:
        super().__init__()
        dims = {option.embedding_dim for option in embeddings.values()}
        if len(dims) != 1:
            raise ValueError(f"all embeddings need one embedding_dim, got {sorted(dims)}")
        self.embeddings = embeddings
        self.engine = EmbeddingEngine(embeddings)
        self.linear = nn.Linear(num_dense, 1, bias=False) if num_dense else None
        widths = [len(embeddings) * (dims.pop() - 1) + num_dense, *hidden]
        layers: list[nn.Module] = []
        for width, next_width in pairwise(widths):
            layers += [nn.Linear(width, next_width), nn.ReLU(), nn.Dropout(dropout)]
        self.perceptron = nn.Sequential(*layers, nn.Linear(widths[-1], 1))
        self.dense_optimizer = dense_optimizer
        self.sparse_optimizer = sparse_optimizer
        self.val_auc, self.val_gauc = BinaryAUROC(), GAUC()
        self.test_auc, self.test_gauc = BinaryAUROC(), GAUC()

    def forward(self, batch: Batch) -> Tensor:
        """Return logits [B]."""
        joined = self.engine.concat(batch["features"])
        num_samples, width = joined.shape
        num_features = len(self.embeddings)
        # A row a feature.
        rows = joined.view(num_samples, num_features, width // num_features)
        # Split, whose backward joins the two gradients: slices would each pad theirs with zeros.
        weights, factors = rows.split([1, rows.shape[2] - 1], 2)
        # The sum over pairs of inner products, without the pairs.
        pairs = (factors.sum(1).square() - factors.square().sum(1)).sum(1) / 2
        deep = self.perceptron(torch.cat([factors.flatten(1), batch["dense"]], dim=1))
        if self.linear is not None:
            deep = deep + self.linear(batch["dense"])
        logits: Tensor = weights.sum((1, 2)) + pairs + deep.squeeze(1)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss, which LoggerHook reports; TraceHook writes logits and labels."""
        logits, label = self(batch), batch["label"]
        add_to_trace("logit", logits)
        add_to_trace("label", label)
        return nn.functional.binary_cross_entropy_with_logits(logits, label)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update loss, AUC and GAUC of validation."""
        self._evaluate("val", batch, self.val_auc, self.val_gauc)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Update loss, AUC and GAUC of the test."""
        self._evaluate("test", batch, self.test_auc, self.test_gauc)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the probability of a click [B]."""
        return self.forward(batch).sigmoid()

    def _evaluate(self, stage: str, batch: Batch, auc: BinaryAUROC, gauc: GAUC) -> None:
        logits, label, group = self(batch), batch["label"], batch["group"]
        loss = nn.functional.binary_cross_entropy_with_logits(logits, label)
        self.log(f"{stage}_loss", loss, batch_size=len(label))
        auc.update(logits.sigmoid(), label.long())
        self.log(f"{stage}_auc", auc, prog_bar=True, batch_size=len(label))
        if len(group) and group[0] >= 0:  # -1: the data has no groups
            gauc.update(logits, label, group)
            self.log(f"{stage}_gauc", gauc, prog_bar=True, batch_size=len(label))

    def configure_optimizers(self) -> Any:
        """Return the dense and the sparse optimizer as one, which Lightning steps."""
        return SparseDenseOptimizer(
            self.dense_optimizer(self.parameters()),
            self.sparse_optimizer(hash_tables(self)),
        )
