"""Program that torchrun starts again after its ranks were killed, as docs/many_ranks.md says.

    torchrun --nproc-per-node 2 --max-restarts 3 -m tests.helpers.restarted_run FOLDER

In its first life a rank is killed in a batch, in its second one in a save.
"""

import os
import signal
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from recis_lightning.callbacks import CheckpointHook
from recis_lightning.table.listing import hash_tables
from tests.helpers.click_data import ResumableLoader
from tests.helpers.lightning_model import Model, trainer
from tests.helpers.rank_checkpoints import held


class Dies(L.Callback):
    """Kills rank 1 in a batch of the first life, and rank 0 in a save of the second."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        life, rank = os.environ.get("TORCHELASTIC_RESTART_COUNT"), trainer.global_rank
        if (life, rank, trainer.global_step) == ("0", 1, 5):
            os.kill(os.getpid(), signal.SIGKILL)
        if (life, rank, trainer.global_step) == ("1", 0, 7):

            def killed(*args, **kwargs):
                os.kill(os.getpid(), signal.SIGKILL)

            TorchCheckpointIO.save_checkpoint = killed


def run(folder, **settings):
    """Train from the newest whole checkpoint on; return the model and what it resumed from."""
    keep = ModelCheckpoint(folder, "last-{step}", every_n_train_steps=2)
    fit = trainer(
        folder, keep, CheckpointHook(), enable_checkpointing=True, max_epochs=2, **settings
    )
    model = Model(seed=5)
    fit.callbacks = [Dies(), *fit.callbacks]
    fit.fit(model, ResumableLoader(), ckpt_path="last", weights_only=False)
    return model, fit


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, fit = run(folder, devices=2, strategy="ddp")
    found = held(hash_tables(model)), fit.ckpt_path, os.environ["TORCHELASTIC_RESTART_COUNT"]
    torch.save(found, folder / f"result-{fit.global_rank}.pt")


if __name__ == "__main__":
    main()
