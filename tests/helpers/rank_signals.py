"""What ranks run in the tests of signals."""

import os
import signal
from contextlib import nullcontext
from unittest import mock

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed

from recis_lightning.callbacks import CheckpointHook
from recis_lightning.distributed import collectives
from recis_lightning.table.listing import hash_tables
from tests.helpers.click_data import ResumableLoader, loader
from tests.helpers.lightning_model import Model, trainer
from tests.helpers.rank_checkpoints import held
from tests.helpers.rank_trainers import as_torchrun


class Sends(L.Callback):
    """Sends this process a signal in a hook, of one batch where it has batches; counts saves."""

    def __init__(self, signum, hook, index=0):
        self.saves, self.signum, self.index = 0, signum, index
        setattr(self, hook, self._hook)

    def _hook(self, trainer, pl_module, *args):
        if trainer.sanity_checking:
            return
        numbers = [part for part in args if isinstance(part, int)]
        if not numbers or numbers[0] == self.index:
            os.kill(os.getpid(), self.signum)

    def on_save_checkpoint(self, *args):
        self.saves += 1


def run(path, *callbacks, ckpt_path=None, seed=1, **settings):
    """Train two epochs with a validation in mid-epoch; return model, Trainer and exit status."""
    keep = ModelCheckpoint(path, "{step}", every_n_train_steps=100)
    given = {"enable_checkpointing": True, "max_epochs": 2, "val_check_interval": 4}
    fit = trainer(path, keep, CheckpointHook(), *callbacks, **{**given, **settings})
    model = Model(seed=seed)
    try:
        fit.fit(model, ResumableLoader(), loader(24), ckpt_path=ckpt_path, weights_only=False)
    except SIGTERMException as left:
        return model, fit, left.code
    return model, fit, None


def slurm(folder, rank=0, num_ranks=1):
    """Return what SLURM tells a process, whose ``scontrol`` notes what it is asked for."""
    command = folder / "bin" / "scontrol"
    command.parent.mkdir(exist_ok=True)
    told = {
        "SLURM_NTASKS": num_ranks,
        "SLURM_NTASKS_PER_NODE": num_ranks,
        "SLURM_JOB_ID": 77,
        "SLURM_JOB_NAME": "train",
        "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank,
        "SLURM_NODEID": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 1,
        "PATH": f"{command.parent}:{os.environ['PATH']}",
    }
    if rank == 0:
        command.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n')
        command.chmod(0o755)
    return mock.patch.dict(os.environ, {name: str(value) for name, value in told.items()})


def one_rank_is_told(path, kind, signalled):
    """Tell some ranks to end, at different batches; resume, and return what this rank has."""
    rank = distributed.get_rank()
    signum = signal.SIGTERM if kind == "SIGTERM" else signal.SIGUSR1
    sends = [Sends(signum, "on_train_batch_start", 1 + rank)] if rank in signalled else []
    requeue = kind == "requeue"
    with as_torchrun() as settings, slurm(path, rank, 2) if requeue else nullcontext():
        settings |= {"plugins": [SLURMEnvironment()]} if requeue else {}
        collectives.gather(rank)  # rank 0 has made what SLURM would have
        _, left, status = run(path, *sends, **settings)
        last = "hpc" if requeue else "last"
        model, ended, _ = run(path, ckpt_path=last, seed=5, **settings)
        whole, _, _ = run(path / "whole", **settings)
    return status, left.global_step, ended.global_step, _held(model), _held(whole)


def _held(model):
    dense = {(name, "dense"): value.detach().numpy() for name, value in model.named_parameters()}
    return held(hash_tables(model)) | dense
