"""Processes that are killed while they save: the checkpoint loads, and nothing is lost."""

import multiprocessing
import os
import random
import re
import threading
import time
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import distributed
from tqdm import tqdm

from recis_lightning import HashTable, checkpoint
from recis_lightning.callbacks import CheckpointHook
from recis_lightning.distributed import collectives
from recis_lightning.distributed.ownership import owner_of
from recis_lightning.optim import SparseAdam
from tests.helpers.click_data import ResumableLoader, loader
from tests.helpers.lightning_model import Model, differences, everything, trainer

# Forked processes start at once. Their OpenMP threads are gone, so they use one.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]
_FORK = multiprocessing.get_context("fork")
IDS = torch.arange(-400, 400)


def killed_after(seconds, works):
    """Run functions in processes of their own, kill -9 all after a time; return what they sent."""
    ours, theirs = _FORK.Pipe(duplex=False)
    processes = [_FORK.Process(target=alone, args=(work, theirs)) for work in works]
    for process in processes:
        process.start()
    theirs.close()
    words, end = [], time.monotonic() + 60
    # The clock runs from the first word on: a kill before it tells nothing.
    while not words or time.monotonic() < end:
        if not ours.poll(max(end - time.monotonic(), 0)):
            break
        try:
            words.append(ours.recv())
        except EOFError:
            break
        if len(words) == 1:
            end = time.monotonic() + seconds
    for process in random.sample(processes, len(processes)):
        process.kill()
        time.sleep(random.random() / 500)
    for process in processes:
        process.join()
    while True:
        try:
            if not ours.poll():
                break
            words.append(ours.recv())
        except (EOFError, OSError):
            break
    return words


def alone(work, pipe):
    """Run in a forked process: one that is killed must not hold the progress bars' common lock."""
    tqdm.set_lock(threading.RLock())
    work(pipe)


def tables():
    made = [HashTable(3, name=name) for name in ("a", "b")]
    return made, SparseAdam(made, lr=0.1)


def save_on(folder, store, rank, world_size):
    """Return the work of a rank: save again and again, in each save one number only."""

    def work(pipe):
        torch.set_num_threads(1)
        distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
        )
        made, _optimizer = tables()
        ids = IDS[owner_of(IDS, world_size) == rank]
        for number in range(1, 10_000):
            for table in made:
                table.insert(ids, torch.full((len(ids), 3), float(number)))
                table.update_step()
            checkpoint.save(folder, made)
            if rank == 0:
                pipe.send(number)

    return work


def test_ranks_killed_while_they_save(tmp_path):
    """The checkpoint is always whole, of one save on all ranks, and no older than the last."""
    random.seed(0)
    for life in range(15):
        store = tmp_path / f"store{life}"
        works = [save_on(tmp_path / "saved", store, rank, 2) for rank in range(2)]
        words = killed_after(random.uniform(0.0, 0.2), works)
        made, _optimizer = tables()
        checkpoint.load(tmp_path / "saved", made)
        for table in made:
            assert table.ids().sort().values.tolist() == IDS.tolist()
            assert (table.embeddings(IDS) == table.step).all()
        steps = {table.step for table in made}
        assert len(steps) == 1
        assert steps.pop() >= max(words)
    assert (collectives.rank(), collectives.world_size()) == (0, 1)


class OneEpoch(ResumableLoader):
    """Many batches: Lightning itself does not resume exactly between two epochs."""

    def __init__(self, steps):
        super().__init__()
        self.batches = list(loader(8 * steps))


def training(path, resume, steps):
    """Return the work of a process: train on from the last checkpoint, save after every batch."""

    def work(pipe):
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")

        class Telling(Model):
            def on_train_batch_start(self, batch, batch_idx):
                pipe.send(self.global_step)

        keep = ModelCheckpoint(path, "{step}", every_n_train_steps=1, save_top_k=2,
                               monitor="step", mode="max", save_last=True)  # fmt: skip
        run = trainer(path, keep, CheckpointHook(), enable_checkpointing=True, max_epochs=1)
        run.fit(Telling(seed=5), OneEpoch(steps), ckpt_path=resume)

    return work


@pytest.mark.parametrize("steps", [8, 40])
@pytest.mark.slow
def test_a_trainer_killed_while_it_saves(tmp_path, steps):
    """Killed again and again, it ends where an undisturbed run does, bit by bit."""
    random.seed(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = Model(seed=5)
        trainer(tmp_path, max_epochs=1).fit(model, OneEpoch(steps))
        lives, resume = 0, None
        while resume is None or resume.stem != f"step={steps}":
            # A life may end before its first save; on a busy machine longer ones are needed.
            seconds = random.uniform(0.0, 0.2) * (1 + lives / 10)
            words = killed_after(seconds, [training(tmp_path, resume, steps)])
            lives += 1
            mains = list(tmp_path.glob("step=*.ckpt"))
            for file in mains:  # no torn one is left
                assert set(checkpoint.inspect(file)) == {"user", "item", "tags"}
            saved = {int(file.stem.removeprefix("step=")): file for file in mains}
            # A batch that began had the checkpoint of the step before it behind it.
            assert max(saved, default=0) >= max(words, default=0)
            resume = saved[max(saved)] if saved else None
            assert lives < 200
        assert lives > steps // 8
        found = Model.load_from_checkpoint(resume)
        assert differences(everything(found), everything(model)) == []
    finally:
        torch.set_num_threads(threads)
    assert os.path.exists(tmp_path / "last.ckpt")
    # What saves that were cut short left, the saves of a run that is not killed clear.
    unfinished = [file.name for file in tmp_path.glob("**/*.part")]
    assert len({re.search(r"\.([0-9a-f]{16})\.", name)[1] for name in unfinished}) <= 1
    run = trainer(tmp_path, CheckpointHook(), enable_checkpointing=True, max_epochs=1)
    run.fit(Model(seed=5), OneEpoch(steps))
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert [folder for folder in tmp_path.glob("*.tables") if not main_of(folder).exists()] == []
    assert list(tmp_path.glob("**/*.part")) + list(tmp_path.glob("**/.recis*")) == []


def main_of(folder):
    return folder.with_name(folder.name.removesuffix(".tables"))
