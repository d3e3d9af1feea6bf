"""Train two towers on MovieLens-100k, and measure recall beside popularity.

From the root of the repository: ``python -m examples.retrieval.train --seeds 0 1 2``.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from pyarrow import dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.deepfm.movielens import download, part_files, write_parts
from recis_lightning import DynamicEmbedding, DynamicEmbeddingBag, hash_tables, serving
from recis_lightning.callbacks import HashTableFilterHook
from recis_lightning.eviction import MaxRows
from recis_lightning.initializers import Normal
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer
from recis_lightning.retrieval import sampled_softmax_loss

warnings.filterwarnings("ignore", ".*does not have many workers.*")
HELD_OUT, HISTORY = 5, 30  # likes of each user, the last; and those that a user's vector is of
LR, TEMPERATURE, NUM_NEGATIVES = 2e-3, 0.1, 256


class Likes(NamedTuple):
    """Films that users rated 4 or 5. A film's id is 1 or more; 0 pads histories."""

    users: Tensor  # int64 [n], of the likes to train on, by user and then by time
    items: Tensor  # int64 [n], their films
    histories: Tensor  # int64 [n, HISTORY], films that the user liked before, the last first
    test_users: Tensor  # int64 [m], ascending, of at least twice HELD_OUT likes
    test_histories: Tensor  # int64 [m, HISTORY]
    held_out: Tensor  # int64 [m, HELD_OUT], what they liked later


def load(root: str) -> Likes:
    """Return the likes of MovieLens-100k, which is downloaded once to a folder."""
    files = part_files(Path(root))
    if not all(file.is_file() for file in files):
        download(Path(root))
        write_parts(Path(root))
    liked = dataset.dataset(files).to_table(filter=dataset.field("rating") >= 4)
    return split(*(torch.from_numpy(liked[name].to_numpy().copy()) for name in ("user", "item")))


def split(users: Tensor, items: Tensor) -> Likes:
    """Return likes, int64 [n] in the order of time, as those to train on and those held out."""
    order = users.argsort(stable=True)
    users, items, places = users[order], items[order], torch.arange(len(users))
    first, end = torch.searchsorted(users, users), torch.searchsorted(users, users, right=True)
    back = places[:, None] - 1 - torch.arange(HISTORY)
    histories = torch.where(back >= first[:, None], items[back.clamp(min=0)], 0)
    is_held = (end - first >= 2 * HELD_OUT) & (end - places <= HELD_OUT)
    at = places[is_held & (end - places == HELD_OUT)]
    trained = users[~is_held], items[~is_held], histories[~is_held]
    return Likes(*trained, users[at], histories[at], items[at[:, None] + torch.arange(HELD_OUT)])


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
        ids = torch.cat([films, drawn.ids])
        shares = torch.cat([self.likes.table.sampling_probabilities(films), drawn.probabilities])
        towers = self.encode_users(users, histories), self.encode_items(ids)
        return sampled_softmax_loss(*towers, ids, shares, TEMPERATURE)

    def configure_optimizers(self) -> Any:
        """Return the optimizers of perceptrons and rows as one."""
        tables = hash_tables(nn.ModuleList([self.user, self.history, self.item]))
        dense = torch.optim.Adam(self.parameters(), lr=LR)
        return SparseDenseOptimizer(dense, SparseAdam(tables, lr=LR))


def train(likes: Likes, epochs: int = 8, batch_size: int = 512, seed: int = 0) -> TwoTowers:
    """Return a trained model, in ``eval()``."""
    L.seed_everything(seed, verbose=False)
    model, data = TwoTowers(seed=seed), TensorDataset(likes.users, likes.items, likes.histories)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False}
    quiet |= {"enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=epochs, callbacks=[HashTableFilterHook()], **quiet)
    trainer.fit(model, DataLoader(data, batch_size, shuffle=True))
    return model.eval()


def recall(likes: Likes, scores: Tensor, items: Tensor, k: int) -> float:
    """Return the share of held-out films among the best ``k`` that a user did not like before.

    Scores, [m, n], are of each of ``likes.test_users`` and of films, int64 [n], ascending.
    """
    user, like = (likes.test_users[:, None] == likes.users).nonzero(as_tuple=True)
    scores = scores.clone()
    scores[user, torch.searchsorted(items, likes.items[like])] = -torch.inf
    best = items[scores.topk(min(k, len(items))).indices]
    return (likes.held_out[:, :, None] == best[:, None]).any(2).float().mean().item()


@torch.no_grad()
def recalls(likes: Likes, model: TwoTowers | None, *ks: int) -> list[float]:
    """Return the recall at each of ``ks`` of a model; of the most liked films, if it is None."""
    items, counts = likes.items.unique(return_counts=True)
    scores = counts.float().expand(len(likes.test_users), -1)
    if model is not None:
        users = model.encode_users(likes.test_users, likes.test_histories)
        scores = users @ model.encode_items(items).T
    return [recall(likes, scores, items, k) for k in ks]


def main(args: Sequence[str] | None = None) -> None:
    """Train with each seed, and print recalls."""
    parser = argparse.ArgumentParser("python -m examples.retrieval.train", description=main.__doc__)
    parser.add_argument("--root", default="data/ml-100k", help="folder of the data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--index", help="write an index of films there, for faiss")
    given = parser.parse_args(args)
    likes, model = load(given.root), None
    for seed in [None, *given.seeds]:
        model = None if seed is None else train(likes, seed=seed)
        name = "popularity" if model is None else f"two towers, seed {seed}"
        print("{} recall@10 {:.4f} recall@50 {:.4f}".format(name, *recalls(likes, model, 10, 50)))
    if given.index and model is not None:
        serving.export_index(model.item.table, given.index, encode=model.encode_items)


if __name__ == "__main__":
    main()
