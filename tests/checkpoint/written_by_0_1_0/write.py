"""Write the files of this folder; they were written by commit 749f7fc, and are not to be renewed.

To add one, check that commit out and run this file with it on the path:
``python write.py FOLDER``, then ``torchrun --nproc-per-node 2 write.py FOLDER``.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from recis_lightning import (
    DynamicEmbedding,
    EmbeddingEngine,
    EmbeddingOption,
    checkpoint,
    hash_tables,
)
from recis_lightning.admission import MinCount
from recis_lightning.callbacks import CheckpointHook
from recis_lightning.eviction import AnyOf, GlobalStepFilter, MaxRows
from recis_lightning.optim import SparseAdamW, SparseDenseOptimizer

EXTREMES = [-(2**63), -(2**63) + 1, -1, 0, 2**63 - 1]


class Written(L.LightningModule):
    """Tables with every kind of column: stamps, counts, pins, pending counts, bfloat16, slots."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.tower = nn.Linear(5, 1)
        self.user = DynamicEmbedding(
            3,
            eviction=AnyOf([GlobalStepFilter(9), MaxRows(50, by="count")]),
            admission=MinCount(2),
            name="user",
        )
        bf16 = EmbeddingOption(2, dtype=torch.bfloat16, eviction=GlobalStepFilter(9), seed=7)
        self.engine = EmbeddingEngine({"bf16": bf16})

    def training_step(self, batch, batch_idx):
        bf16 = self.engine({"bf16": batch % 7})["bf16"]
        return self.tower(torch.cat([self.user(batch), bf16.float()], 1)).pow(2).mean()

    def on_train_batch_end(self, *args):
        for table in hash_tables(self):
            table.update_step()

    def configure_optimizers(self):
        dense = torch.optim.AdamW(self.parameters(), lr=0.05)
        return SparseDenseOptimizer(dense, SparseAdamW(hash_tables(self), lr=0.05))


def batches():
    """Return the ids of four batches: some occur once, and wait for admission."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(9, (8,), generator=generator) for _ in range(4)]
    extremes = torch.tensor([*EXTREMES, *EXTREMES])
    return [torch.cat([ids, extremes, torch.tensor([100 + i])]) for i, ids in enumerate(drawn)]


def trained(folder, *callbacks, **settings):
    """Train; return the model and its Trainer."""
    model = Written()
    model.user.table.pin(torch.tensor([5, 77]))
    run = L.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **settings,
    )
    run.fit(model, DataLoader(batches(), batch_size=None))
    return model, run


def contents(module):
    """Return all that the tables of a module hold, by name, as JSON has it; ids ascending."""
    found = {}
    for table in hash_tables(module):
        state = table.get_extra_state()
        rows, pending = state["ids"].argsort(), state.get("pending_ids", torch.empty(0)).argsort()
        fields = {}
        for key, value in {**state, **state["slots"]}.items():
            if isinstance(value, torch.Tensor):
                order = pending if key.startswith("pending") else rows
                value = value if key == "pinned_ids" else value[order]
                fields[key] = value.tolist()
            elif key not in ("slots", "checksum"):  # of the order of rows too; 0.1.0 had none
                fields[key] = value
        found[table.name] = fields
    return found


def write(folder):
    """Write what one process writes."""
    model, run = trained(folder)
    run.save_checkpoint(folder / "state_dict.ckpt")
    checkpoint.save(folder / "saved", model)
    torch.save(model.user, folder / "embedding.pt")
    torch.save(model.engine, folder / "engine.pt")
    again, run = trained(folder, CheckpointHook())
    run.save_checkpoint(folder / "one_rank.ckpt")
    assert contents(again) == contents(model)
    return {"one_rank": contents(model)}


def main(folder):
    """Write everything, or, where torchrun says so, what two ranks write."""
    file = folder / "contents.json"
    if "WORLD_SIZE" not in os.environ:
        held = write(folder)
    else:
        _, run = trained(folder, CheckpointHook(), devices=2, strategy="ddp")
        run.save_checkpoint(folder / "two_ranks.ckpt")
        if not run.is_global_zero:
            return
        torch.distributed.destroy_process_group()
        model = Written(seed=1)
        checkpoint.load(folder / "two_ranks.ckpt", model)
        held = {**json.loads(file.read_text()), "two_ranks": contents(model)}
    file.write_text(json.dumps(held, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
