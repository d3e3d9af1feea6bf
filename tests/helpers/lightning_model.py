"""A small LightningModule with tables of all kinds, and a Trainer for it."""

import lightning as L
import torch
from torch import nn

from recis_lightning import DynamicEmbedding, EmbeddingEngine, EmbeddingOption, hash_tables
from recis_lightning.callbacks import HashTableFilterHook
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.optim import SparseAdamW, SparseDenseOptimizer
from tests.helpers.quiet_trainer import quiet_trainer


class Model(L.LightningModule):
    """Ids through tables, a tower on top; ``separate`` keeps the tower's gradients to itself."""

    def __init__(self, separate=False, tables=True, lr=0.05, seed=0):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(seed)
        self.tower = nn.Sequential(nn.Linear(3 if separate else 15, 8), nn.ReLU(), nn.Linear(8, 1))
        if tables:
            self.user = DynamicEmbedding(4, eviction=GlobalStepFilter(3))
            self.engine = EmbeddingEngine(
                {
                    "item": EmbeddingOption(4, eviction=GlobalStepFilter(4)),
                    "tags": EmbeddingOption(4, mode="mean"),
                }
            )

    def forward(self, batch):
        found = [self.user(batch["user"])]
        found += self.engine({name: batch[name] for name in ("item", "tags")}).values()
        return self.tower(torch.cat([batch["numbers"], *found], 1)).squeeze(1)

    def training_step(self, batch, batch_idx):
        if not self.hparams.separate:
            return nn.functional.binary_cross_entropy_with_logits(self(batch), batch["label"])
        loss = (self.tower(batch["numbers"]).squeeze(1) - 9 * batch["label"]).pow(2).mean()
        return loss + self.user(batch["user"]).sum() if self.hparams.tables else loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch).mean(), batch_size=len(batch["label"]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self(batch).mean(), batch_size=len(batch["label"]))

    def configure_optimizers(self):
        dense = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        if not self.hparams.tables:
            return dense
        tables = hash_tables(self)
        return SparseDenseOptimizer(dense, SparseAdamW(tables, self.hparams.lr, clip_grad_norm=0.5))


def trainer(path, *callbacks, filters=True, **kwargs):
    """Return a quiet Trainer that filters after every batch."""
    hooks = [HashTableFilterHook(filter_interval=1)] if filters else []
    return quiet_trainer(path, *hooks, *callbacks, **kwargs)


def everything(module):
    """Return all that a module holds, tables in the order of their ids."""
    state = {f"dense {name}": value.detach() for name, value in module.named_parameters()}
    for table in hash_tables(module):
        held = table.get_extra_state()
        order = held["ids"].argsort()
        columns = {"ids": held["ids"], "weights": held["weights"], **held["slots"]}
        if "last_seen" in held:
            columns["last_seen"] = held["last_seen"]
        state |= {f"{table.name} {key}": column[order].clone() for key, column in columns.items()}
        state |= {f"{table.name} {key}": held[key] for key in ("step", "num_updates", "seed")}
    return state


def differences(one, other):
    """Name what differs between two answers of ``everything``."""
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    return [
        key
        for key, value in one.items()
        if not (torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key])
    ]
