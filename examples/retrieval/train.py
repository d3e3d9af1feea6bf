"""Train two towers on MovieLens-100k, and measure recall beside popularity.

From the root of the repository: ``python -m examples.retrieval.train --seeds 0 1 2``.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.retrieval.likes import Likes, load
from recis_lightning import DynamicEmbedding, DynamicEmbeddingBag, hash_tables, serving
from recis_lightning.callbacks import HashTableFilterHook
from recis_lightning.eviction import MaxRows
from recis_lightning.initializers import Normal
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer
from recis_lightning.retrieval import sampled_softmax_loss

warnings.filterwarnings("ignore", ".*does not have many workers.*")
LR, TEMPERATURE, NUM_NEGATIVES = 2e-3, 0.1, 256


class TwoTowers(L.LightningModule):
    """Vectors of users, from their id and history, and of films. Their product is the score.

    Negatives are the other films of a batch, and films drawn by their popularity.
    """

    def __init__(self, dim: int = 32, seed: int = 0) -> None:
        super().__init__()
        options: dict[str, Any] = {"initializer": Normal(std=0.1), "seed": seed}
        self.user = DynamicEmbedding(dim, name="user", **options)
        self.history = DynamicEmbeddingBag(dim, padding_idx=0, name="history", **options)
        self.item = DynamicEmbedding(dim, name="item", **options)
        # Training lookups count: only likes go through this table, so its counts are theirs.
        counted = MaxRows(100_000, by="count")
        self.likes = DynamicEmbedding(1, name="likes", eviction=counted, trainable=False)
        self.user_layers = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.item_layers = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.draws = torch.Generator().manual_seed(seed)

    def encode_users(self, ids: Tensor, histories: Tensor) -> Tensor:
        """Return vectors of length 1, [n, dim]."""
        rows = self.user(ids) + self.history(histories)
        return nn.functional.normalize(rows + self.user_layers(rows), dim=1)

    def encode_items(self, ids: Tensor) -> Tensor:
        """Return vectors of length 1, [n, dim]."""
        rows = self.item(ids)
        return nn.functional.normalize(rows + self.item_layers(rows), dim=1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of likes: users [b], their films [b] and histories."""
        users, films, histories = batch
        self.likes(films)
        drawn = self.likes.table.sample(NUM_NEGATIVES, "count", self.draws)
        shares = self.likes.table.sampling_probabilities(films)
        ids = torch.cat([films, drawn.ids])
        return sampled_softmax_loss(
            *(self.encode_users(users, histories), self.encode_items(ids), ids),
            *(torch.cat([shares, drawn.probabilities]), TEMPERATURE),
        )

    def configure_optimizers(self) -> Any:
        """Return the optimizers of perceptrons and rows as one."""
        tables = hash_tables(nn.ModuleList([self.user, self.history, self.item]))
        dense = torch.optim.Adam(self.parameters(), lr=LR)
        return SparseDenseOptimizer(dense, SparseAdam(tables, lr=LR))


def train(likes: Likes, epochs: int = 8, batch_size: int = 512, seed: int = 0) -> TwoTowers:
    """Return a trained model, in ``eval()``."""
    L.seed_everything(seed, verbose=False)
    model = TwoTowers(seed=seed)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False}
    quiet |= {"enable_checkpointing": False, "enable_model_summary": False}
    quiet["callbacks"] = [HashTableFilterHook()]
    trainer = L.Trainer(accelerator="cpu", max_epochs=epochs, **quiet)
    data = TensorDataset(likes.users, likes.items, likes.histories)
    trainer.fit(model, DataLoader(data, batch_size, shuffle=True))
    return model.eval()


def recall(likes: Likes, scores: Tensor, items: Tensor, k: int) -> float:
    """Return the share of held-out films among the best ``k`` that a user did not like before.

    Args:
        likes: The data.
        scores: [m, n], of each of ``likes.test_users``.
        items: int64 [n], the films that are scored, ascending; all that were trained on.
        k: Films that are recommended.
    """
    is_known = torch.zeros(scores.shape, dtype=torch.bool)
    rows = torch.searchsorted(likes.test_users, likes.users).clamp(max=len(scores) - 1)
    is_test = likes.test_users[rows] == likes.users
    is_known[rows[is_test], torch.searchsorted(items, likes.items)[is_test]] = True
    best = scores.masked_fill(is_known, -torch.inf).topk(min(k, len(items))).indices
    return (likes.held_out[:, :, None] == items[best][:, None]).any(2).float().mean().item()


@torch.no_grad()
def recalls(
    likes: Likes, model: TwoTowers | None, ks: Sequence[int] = (10, 50)
) -> dict[int, float]:
    """Return the recall at each of ``ks`` of a model; of the most liked films, if it is None."""
    items, counts = likes.items.unique(return_counts=True)
    scores = counts.float().expand(len(likes.test_users), -1)
    if model is not None:
        users = model.encode_users(likes.test_users, likes.test_histories)
        scores = users @ model.encode_items(items).T
    return {k: recall(likes, scores, items, k) for k in ks}


def main(args: Sequence[str] | None = None) -> None:
    """Train with each seed, and print recalls."""
    parser = argparse.ArgumentParser("python -m examples.retrieval.train", description=main.__doc__)
    parser.add_argument("--root", default="data/ml-100k", help="folder of the data")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--index", help="write an index of films there, for faiss")
    given = parser.parse_args(args)
    likes, model = load(given.root), None
    for seed in [None, *given.seeds]:
        model = None if seed is None else train(likes, given.epochs, seed=seed)
        found = [f"recall@{k} {value:.4f}" for k, value in recalls(likes, model).items()]
        print("popularity" if model is None else f"two towers, seed {seed}", *found, flush=True)
    if given.index and model is not None:
        serving.export_index(model.item.table, given.index, encode=model.encode_items)


if __name__ == "__main__":
    main()
