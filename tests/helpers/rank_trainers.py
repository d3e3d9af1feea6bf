"""What ranks run in the tests of sharded tables under Lightning."""

import os
import time
import warnings
from contextlib import contextmanager
from unittest import mock

import lightning as L
import torch
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler

from recis_lightning.callbacks import HashTableFilterHook, LoggerHook, MetricReportHook
from recis_lightning.distributed import collectives
from recis_lightning.table.listing import hash_tables
from tests.helpers.click_data import Clicks, loader
from tests.helpers.lightning_model import Model
from tests.helpers.quiet_trainer import quiet_trainer
from tests.helpers.rank_pool import set_timeout
from tests.helpers.rank_training import shard


@contextmanager
def as_torchrun():
    """Make Lightning see what torchrun tells a process, of a group that is there already."""
    ranks = collectives.world_size()
    rank = distributed.get_rank() if ranks > 1 else 0
    told = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 1,
        "TORCHELASTIC_RUN_ID": "test",
    }
    with (
        mock.patch.dict(os.environ, {name: str(value) for name, value in told.items()}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto"}


def train_loader(batch_size, **kwargs):
    """Return this rank's share of the clicks in order; left to itself Lightning shuffles."""
    rank = distributed.get_rank() if collectives.world_size() > 1 else 0
    sampler = DistributedSampler(Clicks(), collectives.world_size(), rank, shuffle=False)
    return loader(batch_size=batch_size, sampler=sampler, **kwargs)


class Predicting(Model):
    def predict_step(self, batch, batch_idx):
        return self(batch)


def fit(path, batch_size, **kwargs):
    """Fit with validation, test and predict; return what this rank has."""
    model = Predicting()
    hooks = [HashTableFilterHook(filter_interval=1), LoggerHook(log_step=2)]
    with as_torchrun() as settings:
        run = quiet_trainer(path, *hooks, max_epochs=2, **settings, **kwargs)
        run.fit(model, train_loader(batch_size), loader(size=24, batch_size=batch_size))
        val_loss = float(run.callback_metrics["val_loss"])
        (tested,) = run.test(model, loader(size=24, batch_size=batch_size), verbose=False)
        # One sample a batch: of two ranks one has a batch more than the other.
        scores = run.predict(model, loader(size=9, batch_size=1))
    return {
        "tower": {name: value.detach().numpy() for name, value in model.tower.named_parameters()},
        "tables": {table.name: shard(table) for table in hash_tables(model)},
        "val_loss": val_loss,
        "test_loss": tested["test_loss"],
        "scores": torch.cat(scores).numpy(),
    }


def report(path, on_nan, ruined_rank):
    """Fit with a report after every batch; return the history, what stopped it, and the shards.

    On one rank, a row of one table is ruined from the second batch on.
    """

    class Ruining(Model):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 1 and distributed.get_rank() == ruined_rank:
                table = self.user.table
                table.insert(table.ids()[:1], torch.full((1, 4), torch.nan))
            return loss

    model, error = Ruining(), ""
    hook = MetricReportHook(1, on_nan=on_nan, report=path / "report.html", survey_rows=10**6)
    with as_torchrun() as settings:
        run = quiet_trainer(path, hook, limit_train_batches=4, **settings)
        try:
            run.fit(model, train_loader(8))
        except RuntimeError as caught:
            error = str(caught)
    return {
        "steps": hook.history.steps,
        "columns": {name: hook.history.column(name) for name in hook.history.names},
        "error": error,
        "rows": {table.name: len(table) for table in hash_tables(model)},
    }


def unequal(path, batches, stays_s, timeout_s):
    """Fit with so many batches on each rank; return the batches done, seconds waited and error.

    A rank that ends without error stays in the process group for ``stays_s``. The group's timeout
    counts from the last batch that all ranks have.
    """
    model, ends = Predicting(), []

    class Clock(L.Callback):
        def on_train_batch_end(self, *args):
            ends.append(time.monotonic())
            if len(ends) == min(batches):
                set_timeout(timeout_s)

    error = ""
    with as_torchrun() as settings:
        few = batches[distributed.get_rank()]
        given = DataLoader([*train_loader(8)][:few], batch_size=None)
        run = quiet_trainer(path, Clock(), use_distributed_sampler=False, **settings)
        try:
            run.fit(model, given)
        except RuntimeError as caught:
            error = str(caught) or "no word"
    waited = time.monotonic() - ends[-1]
    time.sleep(0 if error else stays_s)
    return len(ends), waited, error


def phases(path):
    """Fit with phases of a step; return the history of what is measured of it."""
    hook = MetricReportHook(2, phases=True)
    with as_torchrun() as settings:
        quiet_trainer(path, hook, limit_train_batches=4, limit_val_batches=0, **settings).fit(
            Model(), train_loader(8)
        )
    names = [name for name in hook.history.names if name.startswith("step/")]
    return {name: hook.history.column(name) for name in names if "tflops" not in name}
