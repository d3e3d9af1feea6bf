"""Training that is killed at random moments and resumed on other numbers of ranks, until it ends.

    python -m tests.helpers.killed_runs --kills 100 --ranks 1      # resumed on 1
    python -m tests.helpers.killed_runs --kills 100 --ranks 1 2 3  # on one of these, drawn anew
    python -m tests.helpers.killed_runs --kills 100 --follow       # files appear all the while

This process imports everything, and forks the ranks of each run, which costs no start of Python.
A row of the files is an id of the table ``seen``, which learns by SGD to count: a weight is the
number of times that its row was trained. Prints a JSON line of what was found; and to stderr one of
what was found so far, after each run that came to its end.
"""

import argparse
import json
import logging
import os
import random
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import lightning as L
import pyarrow as pa
import pyarrow.parquet
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import distributed, nn

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.callbacks import CheckpointHook, HashTableFilterHook
from recis_lightning.data import ColumnarDataModule, Features, Follow, Id, Label, Mod
from recis_lightning.initializers import Constant
from recis_lightning.optim import SparseDenseOptimizer, SparseSGD
from tests.helpers.columnar_files import table_of, write_files
from tests.helpers.quiet_trainer import quiet_trainer
from tests.helpers.rank_trainers import as_torchrun
from tests.helpers.rank_training import shard

SIZES = (90, 1, 70, 39)  # rows of each file
EPOCHS = 2
EPOCH = 1_000_000  # ids of an epoch's rows are apart from those of the next
_LIMIT_SECONDS = 120.0  # of a run, on a machine that does nothing else: more is a hang


class Counting(L.LightningModule):
    """Counts of rows in a table; and a table, a tower and an optimizer whose state matters."""

    def __init__(self, begun, first_id):
        super().__init__()
        self.begun = begun  # called before the first step
        self.first_id = first_id  # ids of an epoch -> where they begin
        self.seen = DynamicEmbedding(1, initializer=Constant(0.0), name="seen")
        self.user = DynamicEmbedding(4, name="user")
        self.tower = nn.Linear(4, 1)

    def on_train_batch_start(self, batch, batch_idx):
        self.begun()

    def training_step(self, batch):
        seen = self.seen(batch["row"] + self.first_id * self.current_epoch)
        logits = self.tower(self.user(batch["user"])).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(
            logits, batch["click"], reduction="sum"
        )
        # Gradients are averaged over ranks; each row's count grows by one.
        return 0.01 * loss - seen.sum() * self.trainer.world_size

    def configure_optimizers(self):
        return SparseDenseOptimizer(
            torch.optim.Adam(self.tower.parameters(), lr=0.01),
            SparseSGD(hash_tables(self), lr=1.0),
        )


class Feeder:
    """Writer of the files of a stream, one now and then, and of its stop file in the end.

    Args:
        folder: Where they appear.
        rng: Of their sizes, names and times.
    """

    def __init__(self, folder, rng):
        self.folder, self.rng, self.num_rows = folder, rng, 0
        self.left, self.next = 8, 0.0

    def step(self):
        """Write a file, if it is time; called all the while a run lives."""
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + self.rng.uniform(0.0, 0.4)
        if not self.left:
            (self.folder / "STOP").touch()
            return
        self.left -= 1
        size, scratch = self.rng.choice((1, 20, 60)), self.folder / "written"
        pa.parquet.write_table(table_of(self.num_rows, size), scratch, row_group_size=13)
        scratch.rename(self.folder / f"{self.rng.random()}.parquet")
        self.num_rows += size


def train(folder, pattern, every, ckpt, begun, saver=None):
    """Train to the end, with a checkpoint every few steps; write what this rank has then.

    Args:
        folder: Of the checkpoints.
        pattern: Of the files.
        every: Steps between checkpoints.
        ckpt: Where to go on.
        begun: Called before each step.
        saver: The ``ModelCheckpoint``, in place of one that saves each ``every`` steps.
    """
    torch.manual_seed(0)
    features = Features([Id("row"), Id("user", hash="xxh64"), Label("click")], [Mod("user", 5)])
    stop = Path(pattern).parent / "STOP"
    is_stream = Path(pattern).parent.name == "stream"
    data = ColumnarDataModule(
        train=pattern, features=features, batch_size=6, shuffle_rows=60, seed=3,
        follow=Follow(poll_seconds=0.02, stop_file=str(stop)) if is_stream else False,
    )  # fmt: skip
    model = Counting(begun, 0 if is_stream else EPOCH)
    if saver is None:
        saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=1)
    with as_torchrun() as settings:
        trainer = quiet_trainer(
            folder, saver, CheckpointHook(), HashTableFilterHook(filter_interval=None),
            max_epochs=-1 if is_stream else EPOCHS, enable_checkpointing=True, **settings,
        )  # fmt: skip
        trainer.fit(model, data, ckpt_path=ckpt, weights_only=True)
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    result = {
        "tables": {table.name: shard(table) for table in hash_tables(model)},
        "tower": {name: value.detach().numpy() for name, value in model.tower.named_parameters()},
        "steps": trainer.global_step,
        "adam": trainer.optimizers[0].state_dict()["state"],
    }
    torch.save(result, folder / f"result-{rank}.pt")


def newest(folder):
    """Return the checkpoint of the latest step, or None."""
    found = sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    return str(found[-1]) if found else None


def live(folder, pattern, num_ranks, every, kill_after, from_start, limit, meanwhile=lambda: None):
    """Fork the ranks of a run; kill all after a time, counted from its start or its first step.

    Args:
        folder: Of its checkpoints.
        pattern: Its files.
        num_ranks: Number of ranks.
        every: Steps between checkpoints.
        kill_after: Seconds.
        from_start: Whether they count from the start.
        limit: Seconds that a run lasts at most.
        meanwhile: Called again and again while it lives.

    Returns:
        Whether it was killed, and seconds from its first step to its end.
    """
    ours, theirs = os.pipe()
    ckpt = newest(folder)
    with tempfile.TemporaryDirectory() as scratch:
        pids = [
            _fork(folder, pattern, rank, num_ranks, every, ckpt, theirs, scratch)
            for rank in range(num_ranks)
        ]
        os.close(theirs)
        start = time.monotonic()
        begun = None if not from_start else start
        end = start + (kill_after if from_start else limit)
        failed, killed, said = False, False, b""
        left = dict.fromkeys(pids)
        while left:
            meanwhile()
            readable, _, _ = select.select([ours], [], [], 0.002)
            if readable:
                word = os.read(ours, 65536)
                said += word
                if b"begun" in said and begun is None:
                    begun = time.monotonic()
                    end = begun + kill_after
            for pid in list(left):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    del left[pid]
            if time.monotonic() >= end and not killed and left:
                if begun is None or time.monotonic() - start > limit:
                    failed = True
                killed = True
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
        os.close(ours)
    error = said.partition(b"!")[2]
    if failed or (error and not killed):
        raise AssertionError(f"a run failed, from {ckpt}: {error.decode() or 'it hung'}")
    return killed, time.monotonic() - (begun or start)


def _fork(folder, pattern, rank, num_ranks, every, ckpt, pipe, scratch):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        warnings.simplefilter("ignore")
        if num_ranks > 1:
            distributed.init_process_group(
                "gloo",
                init_method=f"file://{scratch}/store",
                rank=rank,
                world_size=num_ranks,
                timeout=timedelta(seconds=60),
            )
        told = []

        def begun():
            if not told:
                told.append(os.write(pipe, b"begun "))

        train(folder, pattern, every, ckpt, begun)
        status = 0
    except BaseException:
        os.write(pipe, b"!" + traceback.format_exc().encode()[-3000:])
    finally:
        os._exit(status)


def counts(folder):
    """Return how often each row of each epoch was trained, as {id: count}."""
    found = {}
    for path in folder.glob("result-*.pt"):
        table = torch.load(path, weights_only=False)["tables"]["seen"]
        found |= dict(zip(table["ids"].tolist(), table["weights"][:, 0].tolist(), strict=True))
    return found


def flat(value, where=""):
    """Return all numbers and arrays of a result as {place: bytes}."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    elif isinstance(value, torch.Tensor):
        return {where: value.numpy().tobytes()}
    else:
        return {where: value.tobytes() if hasattr(value, "tobytes") else repr(value).encode()}
    return {
        place: part for key, one in parts for place, part in flat(one, f"{where}/{key}").items()
    }


def read_result(folder):
    """Return what the one rank of a run had at its end, as ``flat``."""
    return flat(torch.load(folder / "result-0.pt", weights_only=False))


def run_rounds(kills, ranks, seed, folder, follow=False, limit=_LIMIT_SECONDS):
    """Train again and again, killed at random moments; return what was found."""
    rng = random.Random(seed)
    (folder / "data").mkdir()
    pattern = write_files(folder / "data", SIZES, group_rows=13)
    undisturbed, seconds = {}, 2.0
    if 1 in ranks and not follow:
        (folder / "whole").mkdir()
        killed, seconds = live(folder / "whole", pattern, 1, 2, 1e9, False, limit)
        assert not killed
        undisturbed = read_result(folder / "whole")
    rows = {row + EPOCH * epoch for row in range(sum(SIZES)) for epoch in range(EPOCHS)}
    found = {
        "kills": 0, "killed_on": {}, "runs": 0, "lives": 0, "resumed_on": {},
        "wrong": [], "differing": [],
    }  # fmt: skip
    while found["kills"] < kills or not found["runs"]:
        run = folder / f"run-{found['runs']}"
        run.mkdir()
        used, every = [], rng.randint(1, 4)
        feeder = None
        if follow:
            (run / "stream").mkdir()
            feeder, pattern = Feeder(run / "stream", rng), str(run / "stream/*.parquet")
        while True:
            used.append(rng.choice(ranks))
            from_start = rng.random() < 0.2
            after = rng.uniform(0, 1.0 if from_start else seconds)
            after = after if found["kills"] < kills else 1e9
            from_start = from_start and after < 1e9
            meanwhile = feeder.step if feeder else lambda: None
            was_killed, took = live(
                run, pattern, used[-1], every, after, from_start, limit, meanwhile
            )
            found["lives"] += 1
            if len(used) > 1:
                key = f"{used[-2]}->{used[-1]}"
                found["resumed_on"][key] = found["resumed_on"].get(key, 0) + 1
            if not was_killed:
                # The next run is killed within the time that one takes now.
                seconds = took if len(used) == 1 else seconds
                break
            found["kills"] += 1
            found["killed_on"][used[-1]] = found["killed_on"].get(used[-1], 0) + 1
        found["runs"] += 1
        got = counts(run)
        if feeder:
            rows = set(range(feeder.num_rows))
        if set(got) != rows or any(abs(count - 1) > 1e-4 for count in got.values()):
            wrong = {row: got.get(row, 0.0) for row in rows | set(got)}
            found["wrong"].append(
                {"ranks": used, "rows": [x for x in wrong.items() if abs(x[1] - 1) > 1e-4][:9]}
            )
        if set(used) == {1} and not follow:
            ours = read_result(run)
            places = undisturbed.keys() | ours.keys()
            differing = [p for p in places if ours.get(p) != undisturbed.get(p)]
            if differing:
                found["differing"].append({"lives": len(used), "places": sorted(differing)})
        print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def main(args=None):
    """Kill and resume; return 1 if a row was lost or trained twice, or weights differ."""
    parser = argparse.ArgumentParser("python -m tests.helpers.killed_runs")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--follow", action="store_true")
    parser.add_argument("--limit", type=float, default=_LIMIT_SECONDS, help="seconds of a run")
    given = parser.parse_args(args)
    torch.set_num_threads(1)
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        found = run_rounds(
            given.kills, given.ranks, given.seed, Path(name), given.follow, given.limit
        )
    print(json.dumps(found))
    return int(bool(found["wrong"]) or bool(found["differing"]))


if __name__ == "__main__":
    sys.exit(main())
