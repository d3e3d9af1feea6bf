"""What ranks run in the tests of ``Lookahead`` under Lightning."""

import logging

import torch
from torch import distributed
from torch.utils.data import DataLoader

from recis_lightning.callbacks import CheckpointHook, HashTableFilterHook, Lookahead, UnevenBatches
from recis_lightning.distributed import collectives
from recis_lightning.lookup.prepared import prepared_of
from recis_lightning.table.listing import hash_tables
from tests.helpers.click_data import ResumableLoader, loader
from tests.helpers.quiet_trainer import quiet_trainer
from tests.helpers.rank_trainers import as_torchrun, train_loader
from tests.helpers.rank_training import shard
from tests.helpers.rank_uneven import Careful, Stream


class Ahead(Careful):
    """A model that says what it looks up."""

    def lookups_of(self, batch):
        features = {name: batch[name] for name in ("item", "tags")}
        return [(self.user, batch["user"]), (self.engine, features)]


def held(model, run):
    return {
        "tower": [value.tolist() for value in model.tower.parameters()],
        "tables": {
            table.name: {key: _plain(value) for key, value in shard(table).items()}
            for table in hash_tables(model)
        },
        "steps": run.global_step,
        "done": model.done,
    }


def _plain(value):
    return value if isinstance(value, int) else value.tolist()


def fit(path, ahead, data, resume=None, hooks=(), **kwargs):
    """Fit; return what this rank holds, and the number of lookups that used what came ahead."""
    model = Ahead()
    hooks = [HashTableFilterHook(filter_interval=1), *hooks]
    hooks += [Lookahead("lookups_of", gradients=ahead == "both")] if ahead else []
    before = prepared_of(None).num_used if collectives.world_size() > 1 else 0
    with as_torchrun() as settings:
        run = quiet_trainer(path, *hooks, use_distributed_sampler=False, **settings, **kwargs)
        run.fit(model, data(), loader(size=8, batch_size=8), ckpt_path=resume)
    after = prepared_of(None).num_used if collectives.world_size() > 1 else 0
    return held(model, run), after - before


def same_under_lightning(path):
    """Uneven ends with and without lengths, validation in between, accumulation, a limit."""
    rank = distributed.get_rank()

    def of(numbers, sized):
        given = [*train_loader(8), *train_loader(8)][: numbers[rank]]
        return lambda: DataLoader(given if sized else Stream(given), batch_size=None)

    cases = [  # data, settings, batches done by each rank in all epochs
        (of((4, 3), True), {"hooks": [UnevenBatches("pad")], "max_epochs": 2}, 8),
        (of((3, 4), False), {"max_epochs": 2, "val_check_interval": 2}, 6),
        (of((8, 8), True), {"limit_train_batches": 5, "accumulate_grad_batches": 2}, 5),
    ]
    for number, (data, settings, batches) in enumerate(cases):
        plain, _ = fit(path / f"{number}", False, data, **settings)
        found, used = fit(path / f"{number}", "both", data, **settings)
        assert found == plain, number
        epochs = settings.get("max_epochs", 1)
        # Before the first of an epoch nobody looks ahead, and the first lookup opens the channel.
        assert used == 2 * (batches - epochs - (number == 0)), (number, used)


def resumed(path):
    """A checkpoint within an epoch does not count the batch that was read, and goes on as one."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    def run(name, ahead, resume=None, **kwargs):
        saving = ModelCheckpoint(path / name, every_n_train_steps=3, save_top_k=-1)
        hooks = [saving, CheckpointHook()]
        settings = {"enable_checkpointing": True, "max_steps": 6, **kwargs}
        return fit(path, ahead, ResumableLoader, resume, hooks, **settings)[0]

    whole = run("plain", False)
    assert run("ahead", True) == whole
    saved = path / "ahead" / "epoch=0-step=3.ckpt"
    places = [
        torch.load(path / name / saved.name, weights_only=True)["loops"]["fit_loop"]
        for name in ("plain", "ahead")
    ]
    assert places[0]["state_dict"] == places[1]["state_dict"]
    assert places[0]["state_dict"]["combined_loader"]
    again = run("again", True, resume=saved)
    whole["done"] = whole["done"][3:]
    assert again == whole


def useless(path):
    """What never fits is said once; and so is it if a rank is alone."""
    told = []

    class Handler(logging.Handler):
        def emit(self, record):
            told.append(record.getMessage())

    class Changing(Ahead):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return {**batch, "user": batch["user"] + 1, "item": batch["item"] + 1}

    handler = Handler()
    logging.getLogger("recis_lightning.callbacks.lookahead").addHandler(handler)
    batches = [*train_loader(4), *train_loader(4)][:14]
    with as_torchrun() as settings:
        run = quiet_trainer(
            path, Lookahead("lookups_of"), use_distributed_sampler=False, **settings
        )
        run.fit(Changing(), DataLoader(batches, batch_size=None))
    logging.getLogger("recis_lightning.callbacks.lookahead").removeHandler(handler)
    return told
