"""What ranks run in the test of the manual: the page about many ranks, as torchrun starts it."""

import lightning as L
import torch

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer
from tests.helpers.manual import run_page
from tests.helpers.rank_trainers import as_torchrun


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.user, self.tower = DynamicEmbedding(2, name="user"), torch.nn.Linear(2, 1)

    def training_step(self, batch):
        return self.tower(self.user(batch)).pow(2).mean()

    def configure_optimizers(self):
        dense = torch.optim.Adam(self.tower.parameters())
        return SparseDenseOptimizer(dense, SparseAdam(hash_tables(self)))


def run(page, folder):
    """Run its blocks, then its program; return the number of steps that the program trained."""
    with as_torchrun() as settings:
        names = run_page(page)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        batches = torch.utils.data.DataLoader([torch.arange(4)] * 4, batch_size=None)
        quiet |= {"max_steps": 2, "devices": settings["devices"]}
        trainer = names["train"](Model(), batches, folder, **quiet)
    return trainer.global_step
