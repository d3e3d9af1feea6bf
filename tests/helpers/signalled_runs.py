"""Training that is told to end at random moments and resumed, until it ends by itself.

    python -m tests.helpers.signalled_runs --signals 50 --ranks 2 --kinds SIGTERM SIGUSR1

This process imports everything, and forks the ranks of each run, as ``killed_runs`` does. A signal
goes to all ranks, at moments up to 50 ms apart, or to one of them. As torchrun does, it ends the
others if a rank is lost before it can note a signal. Prints a JSON line of what was found.
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
from torch import distributed

from tests.helpers.columnar_files import write_files
from tests.helpers.killed_runs import EPOCH, EPOCHS, SIZES, counts, flat, train

TIMEOUT_SECONDS = 20.0  # of the process group
_LIMIT_SECONDS = 120.0  # of a run
_LEFT = 128  # and the signal's number: the status of a run that left in order


def preempted(folder):
    """Return the checkpoint of a run that left, or None."""
    path = folder / "last-preempted.ckpt"
    return str(path) if path.exists() else None


def live(folder, pattern, num_ranks, plan):
    """Fork the ranks of a run; send signals as planned.

    A plan is (signal, ranks, step, seconds): so long after the beginning of rank 0's step, or after
    the start of the processes (step 0).

    Returns:
        Statuses of the ranks (a negative number is a signal's), seconds from the first signal to
        the end of the last rank, and steps that rank 0 began.
    """
    ours, theirs = os.pipe()
    ckpt = preempted(folder)
    with tempfile.TemporaryDirectory() as scratch:
        pids = [
            _fork(folder, pattern, rank, num_ranks, ckpt, (ours, theirs), scratch)
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
            if plan is not None and planned is None and said.count(b">") >= plan[2]:
                planned = now + plan[3]
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
                    if rank not in statuses:
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
    return statuses, end - (signalled or end), said.count(b">")


def _fork(folder, pattern, rank, num_ranks, ckpt, pipe, scratch):
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

        def begun():
            if rank == 0:
                os.write(theirs, b">")

        train(folder, pattern, 10**6, ckpt, begun)
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


def run_rounds(wanted, num_ranks, kinds, seed, folder):
    """Train again and again, told to end at random moments; return what was found."""
    random.seed(seed)
    (folder / "data").mkdir()
    pattern = write_files(folder / "data", SIZES, group_rows=13)
    whole = folder / "whole"
    whole.mkdir()
    statuses, _, steps = live(whole, pattern, num_ranks, None)
    assert statuses == [0] * num_ranks
    undisturbed = results(whole, num_ranks)
    rows = {row + EPOCH * epoch for row in range(sum(SIZES)) for epoch in range(EPOCHS)}
    found = {"signals": 0, "left": 0, "lost": 0, "ended": 0, "runs": 0, "slowest": 0.0}
    found |= {"wrong": [], "differing": [], "disorder": []}
    while found["signals"] < wanted:
        run = folder / f"run-{found['runs']}"
        run.mkdir()
        done, left = False, steps
        while not done:
            plan = None
            if found["signals"] < wanted:
                at = [*range(num_ranks)]
                if random.random() < 0.5:
                    at = random.sample(at, 1)
                step = random.randint(1, left) if random.random() < 0.9 else 0
                after = random.uniform(0, 0.02 if step else 0.5)
                plan = (signal.Signals[random.choice(kinds)], at, step, after)
                found["signals"] += 1
            statuses, waited, begun = live(run, pattern, num_ranks, plan)
            left = max(left - begun, 1) if preempted(run) else steps
            found["slowest"] = max(found["slowest"], waited)
            done = statuses == [0] * num_ranks
            if done:
                found["ended"] += 1
            elif statuses == [_LEFT + plan[0]] * num_ranks:
                found["left"] += 1
            elif plan[2] == 0 or any(status < 0 for status in statuses):
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
    return found


def main(args=None):
    """Signal and resume; return 1 if a run was not as one that nothing disturbed."""
    parser = argparse.ArgumentParser("python -m tests.helpers.signalled_runs")
    parser.add_argument("--signals", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", default=["SIGTERM", "SIGUSR1"])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(args)
    torch.set_num_threads(1)
    for logger in ("lightning.pytorch", "lightning.fabric", "recis_lightning"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        found = run_rounds(given.signals, given.ranks, given.kinds, given.seed, Path(name))
    print(json.dumps(found))
    return int(any(found[kind] for kind in ("wrong", "differing", "disorder")))


if __name__ == "__main__":
    sys.exit(main())
