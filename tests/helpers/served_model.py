"""Model of all kinds of embeddings and features, and batches for it."""

import torch
from torch import nn

from recis_lightning import (
    DynamicEmbedding,
    DynamicEmbeddingBag,
    EmbeddingEngine,
    EmbeddingOption,
    Jagged,
    hash_tables,
)


class Model(nn.Module):
    """All kinds of embeddings, and all kinds of features that a program takes."""

    def __init__(self):
        super().__init__()
        self.user = DynamicEmbedding(4, name="user", padding_idx=0)
        self.tags = DynamicEmbeddingBag(4, mode="sum", name="tags")
        self.fixed = DynamicEmbeddingBag(2, mode="mean", name="fixed")
        self.engine = EmbeddingEngine(
            {
                "item": EmbeddingOption(4, table="item"),
                "history": EmbeddingOption(4, table="item", mode="mean", padding_idx=3),
                "tiles": EmbeddingOption(2, mode="tile", tile_len=3),
                "short": EmbeddingOption(2, dtype="bfloat16", mode="sum"),
                "by_count": EmbeddingOption(4, table="item", mode="mean", mean_by="count"),
                "unweighted": EmbeddingOption(4, table="item", mode="sum", use_weights=False),
            }
        )
        self.tower = nn.Linear(8 + 2 + 4 + 4 + 6 + 2 + 4 + 4, 1)

    def forward(self, batch):
        bags = self.tags(batch["tags"], batch["tag_offsets"], batch["tag_weights"])
        pooled = [self.user(batch["user"]), bags, self.fixed(batch["pairs"])]
        features = {name: batch[name] for name in self.engine.options}
        joined = self.engine.concat(features)
        by_name = self.engine({"item": batch["item"], "price": batch["price"]})
        score = self.tower(torch.cat([*pooled, joined.float()], 1)).squeeze(1)
        return score + by_name["item"].sum(1) + by_name["price"]


def make_batch(size, seed):
    """Return a batch with known and unknown ids, int32 among them, and empty bags."""
    random = torch.Generator().manual_seed(seed)

    def ids(*shape):
        return torch.randint(-5, 9, shape, generator=random)

    def ragged(weighted):
        lengths = torch.randint(0, 4, (size,), generator=random)
        num_ids = int(lengths.sum())
        weights = torch.rand(num_ids, generator=random) if weighted else None
        return Jagged.from_lengths(ids(num_ids), lengths, weights)

    tags = ragged(weighted=True)
    return {
        "user": ids(size),
        "tags": tags.values,
        "tag_offsets": tags.offsets[:-1].int(),
        "tag_weights": tags.weights,
        "pairs": ids(size, 2),
        "item": ids(size).int(),
        "history": ragged(weighted=True),
        "tiles": ids(size, 4),
        "short": ragged(weighted=False),
        "by_count": (ids(size, 3), torch.rand(size, 3, generator=random)),
        "unweighted": (ids(size, 3), torch.rand(size, 3, generator=random)),
        "price": torch.rand(size, generator=random),
        "label": torch.rand(size, generator=random),
    }


def trained_model():
    """Return a model whose tables know some of the ids of ``make_batch``, in evaluation."""
    torch.manual_seed(0)
    model = Model()
    model(make_batch(9, seed=0))
    assert [len(table) > 2 for table in hash_tables(model)] == [True] * 6
    for table in hash_tables(model):
        ids = table.ids()
        table.insert(ids, torch.randn(len(ids), table.embedding_dim).to(table.dtype))
    return model.eval()
