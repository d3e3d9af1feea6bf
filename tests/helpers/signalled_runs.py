"""Training that is told to end, or killed, at random moments and resumed, until it ends by itself.

    python -m tests.helpers.signalled_runs --signals 50 --ranks 2 --kinds SIGTERM SIGUSR1
    python -m tests.helpers.signalled_runs --signals 150 --each-kind --save-every 2 --save-last

This process imports everything, and forks the ranks of each run, as ``killed_runs`` does. A signal
goes to all ranks, at moments up to 50 ms apart, or to one of them. After a SIGKILL the others must
end by themselves. Where a rank is lost before it can note another signal, the others are ended, as
torchrun does. With ``--save-every`` runs save as they go and resume by ``ckpt_path="last"``, and
some signals come while they save: the first time, as a rule. Prints a JSON line of what was found.
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

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import distributed
from typing_extensions import override

from tests.helpers.columnar_files import write_files
from tests.helpers.killed_runs import EPOCH, EPOCHS, SIZES, counts, flat, train

TIMEOUT_SECONDS = 20.0  # of the process group
_LIMIT_SECONDS = 120.0  # of a run
_LEFT = 128  # and the signal's number: the status of a run that left in order
KINDS = ("SIGKILL", "SIGTERM", "SIGUSR1")
_STEP, _SAVE = b">", b"s"  # what rank 0 tells when it begins one


class Saver(ModelCheckpoint):
    """``ModelCheckpoint`` that tells when a save begins.

    Args:
        tell: Called then.
        folder: Of the checkpoints.
        every: Steps between them; 0 for none.
        save_last: As for Lightning.
    """

    def __init__(self, tell, folder, every, save_last):
        named = {"filename": "{step}" if save_last else "last-{step}", "save_top_k": 1}
        super().__init__(
            folder, every_n_train_steps=every or 10**6, save_last=save_last or None, **named
        )
        self._tell = tell

    @override
    def _save_checkpoint(self, trainer, filepath):
        self._tell()
        super()._save_checkpoint(trainer, filepath)


def checkpoint_of(folder):
    """Return what a run resumes from: "last" if there is any checkpoint, or None."""
    return "last" if any(folder.glob("*.ckpt")) else None


def live(folder, pattern, num_ranks, plan, saves=(0, False)):
    """Fork the ranks of a run; send signals as planned.

    A plan is (signal, ranks, mark, count, seconds): so long after rank 0 has begun its ``count``-th
    step or save, or after the start of the processes (0).

    Args:
        folder: Of the run.
        pattern: Of its files.
        num_ranks: Number of ranks.
        plan: The plan; None for no signal.
        saves: Steps between saves, 0 for none, and whether ``save_last``.

    Returns:
        Statuses of the ranks (a negative number is a signal's), seconds from the first signal to
        the end of the last rank, and steps that rank 0 began.
    """
    ours, theirs = os.pipe()
    ckpt = checkpoint_of(folder)
    with tempfile.TemporaryDirectory() as scratch:
        pids = [
            _fork(folder, pattern, rank, num_ranks, ckpt, (ours, theirs), scratch, saves)
            for rank in range(num_ranks)
        ]
        os.close(theirs)
        start = time.monotonic()
        planned = signalled = lost = None
        said, statuses, due = b"", {}, []
        while len(statuses) < num_ranks:
            readable, _, _ = select.select([ours], [], [], 0.001)
            if readable:
                said += os.read(ours, 65536)
            now = time.monotonic()
            if plan is not None and planned is None and said.count(plan[2]) >= plan[3]:
                planned = now + plan[4]
                due = [(planned + random.random() / 20, rank) for rank in plan[1]]
            for moment, rank in [*due]:
                if now >= moment:
                    due.remove((moment, rank))
                    if rank not in statuses:
                        signalled = signalled or now
                        os.kill(pids[rank], plan[0])
            for rank, pid in enumerate(pids):
                if rank not in statuses and (done := os.waitpid(pid, os.WNOHANG))[0]:
                    statuses[rank] = os.waitstatus_to_exitcode(done[1])
            if lost is None and any(status < 0 for status in statuses.values()):
                lost = now
                for rank, pid in enumerate(pids):
                    if rank not in statuses and plan[0] != signal.SIGKILL:
                        os.kill(pid, signal.SIGTERM)
            if now - start > _LIMIT_SECONDS:
                for rank, pid in enumerate(pids):
                    if rank not in statuses:
                        os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"a run hung, from {ckpt}, plan {plan}: {said.decode()}")
        os.close(ours)
    end = time.monotonic()
    error = said.partition(b"!")[2].decode()
    statuses = [statuses[rank] for rank in range(num_ranks)]
    if error and lost is None:
        raise AssertionError(f"a run failed, from {ckpt}, plan {plan}, {statuses}: {error}")
    return statuses, end - (signalled or end), said.partition(b"!")[0].count(_STEP)


def _fork(folder, pattern, rank, num_ranks, ckpt, pipe, scratch, saves):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    ours, theirs = pipe
    os.close(ours)
    try:
        warnings.simplefilter("ignore")
        if num_ranks > 1:
            distributed.init_process_group(
                "gloo",
                init_method=f"file://{scratch}/store",
                rank=rank,
                world_size=num_ranks,
                timeout=timedelta(seconds=TIMEOUT_SECONDS),
            )

        def tell(word):
            if rank == 0:
                os.write(theirs, word)

        saver = Saver(lambda: tell(_SAVE), folder, *saves)
        train(folder, pattern, 0, ckpt, lambda: tell(_STEP), saver)
        status = 0
    except SystemExit as left:
        status = left.code
    except BaseException:
        os.write(theirs, b"!" + traceback.format_exc().encode()[-3000:])
    finally:
        os._exit(status)


def results(folder, num_ranks):
    """Return what each rank of a run had at its end, as ``flat``."""
    return [
        flat(torch.load(folder / f"result-{rank}.pt", weights_only=False))
        for rank in range(num_ranks)
    ]


def plan_of(kind, num_ranks, left, every):
    """Draw when a signal comes, and to whom."""
    at = [*range(num_ranks)]
    if random.random() < 0.5:
        at = random.sample(at, 1)
    if every and random.random() < 0.4:
        saves = 1 if random.random() < 0.6 else random.randint(1, max(left // every, 1))
        return signal.Signals[kind], at, _SAVE, saves, random.uniform(0, 0.03)
    step = random.randint(1, left) if random.random() < 0.9 else 0
    return signal.Signals[kind], at, _STEP, step, random.uniform(0, 0.02 if step else 0.5)


def run_rounds(wanted, num_ranks, kinds, seed, folder, saves=(0, False)):
    """Train again and again, told to end at random moments; return what was found.

    Args:
        wanted: Number of signals.
        num_ranks: Number of ranks.
        kinds: Names of signals, which take turns in a random order.
        seed: Of the moments.
        folder: For all that is written.
        saves: As for ``live``.
    """
    random.seed(seed)
    (folder / "data").mkdir()
    pattern = write_files(folder / "data", SIZES, group_rows=13)
    whole = folder / "whole"
    whole.mkdir()
    statuses, _, steps = live(whole, pattern, num_ranks, None)
    assert statuses == [0] * num_ranks
    undisturbed = results(whole, num_ranks)
    rows = {row + EPOCH * epoch for row in range(sum(SIZES)) for epoch in range(EPOCHS)}
    found = {"signals": 0, "left": 0, "lost": 0, "killed": 0, "ended": 0, "runs": 0, "slowest": 0.0}
    found |= {
        "of_kind": {},
        "in_first_save": 0,
        "resumed": 0,
        "wrong": [],
        "differing": [],
        "disorder": [],
    }
    drawn = []
    while found["signals"] < wanted:
        run = folder / f"run-{found['runs']}"
        run.mkdir()
        done, left = False, steps
        while not done:
            plan, found["resumed"] = None, found["resumed"] + bool(checkpoint_of(run))
            if found["signals"] < wanted:
                drawn = drawn or random.sample(kinds, len(kinds))
                plan = plan_of(drawn.pop(), num_ranks, left, saves[0])
                name = plan[0].name
                found["signals"] += 1
                found["in_first_save"] += plan[2:4] == (_SAVE, 1)
                found["of_kind"][name] = found["of_kind"].get(name, 0) + 1
            statuses, waited, begun = live(run, pattern, num_ranks, plan, saves)
            left = max(left - begun, 1) if checkpoint_of(run) else steps
            found["slowest"] = max(found["slowest"], waited)
            done = statuses == [0] * num_ranks
            if done:
                found["ended"] += 1
            elif plan[0] == signal.SIGKILL:
                found["killed"] += 1
            elif statuses == [_LEFT + plan[0]] * num_ranks:
                found["left"] += 1
            elif plan[3] == 0 or any(status < 0 for status in statuses):
                found["lost"] += 1  # before training, or while the process ended
            else:
                found["disorder"].append({"plan": [*map(str, plan)], "statuses": statuses})
        found["runs"] += 1
        got = counts(run)
        if set(got) != rows or any(abs(count - 1) > 1e-4 for count in got.values()):
            found["wrong"].append(found["runs"])
        for rank, result in enumerate(results(run, num_ranks)):
            whole_one = undisturbed[rank]
            places = whole_one.keys() | result.keys()
            differing = [p for p in places if result.get(p) != whole_one.get(p)]
            if differing:
                found["differing"].append({"rank": rank, "places": sorted(differing)})
        print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def main(args=None):
    """Signal and resume; return 1 if a run was not as one that nothing disturbed."""
    parser = argparse.ArgumentParser("python -m tests.helpers.signalled_runs")
    parser.add_argument("--signals", type=int, default=50, help="of all kinds together")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["SIGTERM", "SIGUSR1"])
    parser.add_argument("--each-kind", action="store_const", dest="kinds", const=[*KINDS])
    parser.add_argument("--save-every", type=int, default=0, help="steps; 0 saves at signals alone")
    parser.add_argument("--save-last", action="store_true", help="as ModelCheckpoint's")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(args)
    torch.set_num_threads(1)
    for logger in ("lightning.pytorch", "lightning.fabric", "recis_lightning"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        saves = given.save_every, given.save_last
        found = run_rounds(given.signals, given.ranks, given.kinds, given.seed, Path(name), saves)
    print(json.dumps(found))
    return int(any(found[kind] for kind in ("wrong", "differing", "disorder")))


if __name__ == "__main__":
    sys.exit(main())
