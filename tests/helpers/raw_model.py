"""Model trained by Lightning on files of raw values, and how its batches are made of them."""

import lightning as L
import pyarrow as pa
import pyarrow.parquet
import torch
from torch import nn

from recis_lightning import EmbeddingEngine, EmbeddingOption, hash_tables
from recis_lightning.data import (
    Bucketize,
    ColumnarDataModule,
    Cross,
    Features,
    Id,
    IdList,
    Label,
    Log1p,
    Lookup,
    Mod,
    Number,
)
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer

CITIES = ["Berlin", "Zürich", "Rome", None, "東京"]

FEATURES = Features(
    [
        Id("row"),
        Id("user", hash="xxh64", seed=3),
        Id("city", hash="murmur64a", default=0),
        IdList("history", max_len=4, keep="last", weights="history_weights"),
        IdList("tags", hash="farmhash64", default=7),
        Number("price", default=-1.0),
        Label("click"),
    ],
    [
        Lookup("place", ["Rome", "Berlin"], source="city"),
        Cross("city_tags", ["city", "tags"]),
        Mod("city_tags", 50),
        Bucketize("price_bucket", [0.0, 2.0, 5.0], source="price"),
        Log1p("price"),
    ],
)


def to_batch(entries):
    """Group the entries as the model's forward takes them; a constant among them."""
    padded, _ = entries["tags"].to_padded(3)
    ids = {name: entries[name] for name in ("user", "city", "place", "price_bucket")}
    bags = {name: entries[name] for name in ("history", "tags", "city_tags")}
    scale = torch.tensor([0.5, 2.0])
    price = entries["price"].unsqueeze(1) * scale
    batch = {"ids": {**ids, **bags, "padded": padded}, "price": price, "row": entries["row"]}
    return {**batch, "click": entries["click"]} if "click" in entries else batch


class RawModel(L.LightningModule):
    """Model of ids that are single, ragged, weighted, crossed, padded and hashed."""

    def __init__(self):
        super().__init__()
        bag = {"embedding_dim": 4, "mode": "mean"}
        self.engine = EmbeddingEngine(
            {
                "user": EmbeddingOption(4),
                "city": EmbeddingOption(4, padding_idx=0),
                "place": EmbeddingOption(4, padding_idx=-1),
                "price_bucket": EmbeddingOption(4),
                "history": EmbeddingOption(**bag),
                "tags": EmbeddingOption(4, mode="sum"),
                "city_tags": EmbeddingOption(**bag),
                "padded": EmbeddingOption(4, mode="tile", tile_len=3, table="tags", padding_idx=0),
            }
        )
        self.tower = nn.Sequential(nn.Linear(4 * 10 + 2, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, batch):
        joined = self.engine.concat(batch["ids"])
        return self.tower(torch.cat([joined, batch["price"]], 1)).squeeze(1).sigmoid()

    def training_step(self, batch, batch_idx):
        return nn.functional.binary_cross_entropy(self(batch), batch["click"])

    def predict_step(self, batch, batch_idx):
        return self(batch)

    def configure_optimizers(self):
        dense = torch.optim.Adam(self.parameters(), lr=0.05)
        return SparseDenseOptimizer(dense, SparseAdam(hash_tables(self), lr=0.05))


def raw_table(first, num_rows):
    """Return rows of files; some have nulls, empty bags, strings beyond ASCII."""
    rows = range(first, first + num_rows)
    history = [None if row % 6 == 0 else list(range(row % 6)) for row in rows]
    return pa.table(
        {
            "row": pa.array(rows, pa.int32()),
            "user": [f"user-{row % 11}" for row in rows],
            "city": [CITIES[row % 5] for row in rows],
            "history": pa.array(history, pa.list_(pa.int64())),
            "history_weights": pa.array(
                [None if bag is None else [0.3 * row + one for one in bag] for row, bag in
                 zip(rows, history, strict=True)],
                pa.list_(pa.float32()),
            ),
            "tags": pa.array(
                [["a", None, "ß" * (row % 40)][: row % 4] for row in rows], pa.list_(pa.string())
            ),
            "price": [None if row % 5 == 1 else row / 3 - 1 for row in rows],
            "click": [row % 3 == 0 for row in rows],
        }
    )  # fmt: skip


def trained_on(folder):
    """Return a model trained for a few steps, and the scores that the Trainer predicts, by batch.

    The scores are of other rows, in ``new.parquet``, of which some have ids that no row is for.
    """
    pa.parquet.write_table(raw_table(0, 60), folder / "train.parquet")
    pa.parquet.write_table(raw_table(53, 40).drop(["click"]), folder / "new.parquet")
    data = ColumnarDataModule(
        features=FEATURES,
        convert=to_batch,
        train=str(folder / "train.parquet"),
        predict=str(folder / "new.parquet"),
        batch_size=16,
    )
    torch.manual_seed(0)
    model = RawModel()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=2, enable_checkpointing=False, **quiet)
    trainer.fit(model, data)
    return model, trainer.predict(model, data)
