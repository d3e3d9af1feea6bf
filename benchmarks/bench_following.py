"""Threads that score while deltas arrive: wrong scores, growth, and stalls by updates.

Measures: ``recis_lightning.serving.follower``, ``recis_lightning.serving.layered_table``,
``recis_lightning.serving.model``.

One process writes deltas, each of about 1% of the rows, with compactions between; threads of
another score batches of mixed sizes, and compare each score, to the bit, with that of the version
which it claims. Figures:

- wrong: requests with another score. Target: none.
- stall_ms: the longest time within which no request of any thread ended while a delta was taken up,
  by wall clock. Target: at most 50 ms. On a machine that is busy with something else, the waits for
  a core count too: measure on a quiet one.
- update_cpu_ms: the most CPU time that taking up a delta took, which says the same on a busy
  machine: readers wait for no lock but the interpreter's. Target: at most 50 ms.
- stall_cpu_ms: as stall_ms, by the process's CPU time; calm_ms and calm_cpu_ms are the same where
  nothing was taken up.
- grown_mb: growth of the resident memory from a fifth of the run to its end. Target: at most 16 MB.

    python benchmarks/bench_following.py [--requests N] [--deltas N] [--threads N] [--dry]
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import append_result, print_table
from recis_lightning import DynamicEmbedding, serving

DIM, NUM_IDS, SIZES = 16, 20_000, (1, 4, 16, 64, 256)
MAX_STALL_MS, MAX_GROWN_MB = 50, 16


class Truth:
    """Rows that a step writes, and the scores behind each.

    A row is the step that wrote it last, 0 where an id has none; the tower multiplies by a number
    of few bits. So scores are exact, whatever the order of additions.
    """

    def __init__(self, deltas: int) -> None:
        random = np.random.default_rng(0)
        self.changes, self.rows = [], np.zeros((deltas + 1, NUM_IDS), np.int16)
        for step in range(deltas + 1):
            count = NUM_IDS if step == 0 else NUM_IDS // 100
            ids = random.choice(NUM_IDS, count, replace=False)
            written, removed = (ids, ids[:0]) if step == 0 else np.split(ids, [count * 9 // 10])
            self.rows[step] = self.rows[step - 1] if step else 0
            self.rows[step, written] = step + 1
            self.rows[step, removed] = 0
            self.changes.append((torch.from_numpy(written), torch.from_numpy(removed)))

    @staticmethod
    def factor(step: int) -> float:
        """Return what the tower multiplies by behind a step."""
        return 1 + step % 8 / 8

    def apply(self, step: int, model: nn.Sequential) -> None:
        """Change a model as a step does."""
        table = model[0].table
        written, removed = self.changes[step]
        table.insert(written, torch.full((len(written), DIM), float(step + 1)))
        table.delete(removed)
        with torch.no_grad():
            model[1].weight.fill_(self.factor(step))

    def scores(self, step: int, ids: Tensor) -> Tensor:
        """Return the scores of ids behind a step, [n, 1]."""
        known = (ids >= 0) & (ids < NUM_IDS)
        rows = torch.from_numpy(self.rows[step])[ids.clamp(0, NUM_IDS - 1)]
        return (torch.where(known, rows, 0).float() * (DIM * self.factor(step))).unsqueeze(1)


def write_deltas(folder: str, deltas: int, may_write: Callable[[int], None]) -> None:
    """Write the export, the base and a delta a step; ``may_write(step)`` waits for its time."""
    truth = Truth(deltas)
    model = nn.Sequential(DynamicEmbedding(DIM, name="item"), nn.Linear(DIM, 1, bias=False))
    truth.apply(0, model)
    mark, sink = serving.ModelMark(model), serving.ChainSink(folder, compact_every=64)
    sink.write(mark.take(0))
    serving.export(model, folder, example=torch.arange(4))
    for step in range(1, deltas + 1):
        may_write(step)
        truth.apply(step, model)
        sink.write(mark.take(step))
    sink.close()
    mark.close()


def _write_apart(folder: str, deltas: int, done: Any, total: int) -> None:
    """Write deltas in a process of its own, evenly over the requests."""
    torch.set_num_threads(1)

    def wait(step: int) -> None:
        while done.value < total * step / (deltas + 1):
            time.sleep(0.002)

    write_deltas(folder, deltas, wait)


class Load:
    """Threads that score, and one that takes up deltas.

    Args:
        folder: That is served.
        truth: Of its deltas.
        requests: In all.
        threads: That score.
        done: Its ``value`` becomes the number of requests answered, about.
    """

    def __init__(self, folder: str, truth: Truth, requests: int, threads: int, done: Any) -> None:
        self._truth, self._done, self._threads = truth, done, threads
        self._each = -(-requests // threads)
        self.ends = np.zeros((threads, self._each, 2))  # by wall clock, by CPU time
        self.begun = np.zeros((threads, self._each))
        self.updates: list[tuple[float, ...]] = []
        self.memory: list[tuple[int, float]] = []  # requests so far, resident MB
        self.wrong: list[Any] = []
        self.versions: set[int | None] = set()
        self.nbytes = 0
        self._over, self._counting = threading.Event(), threading.Lock()
        self.followed = serving.follow(folder, poll_seconds=None)

    def run(self) -> None:
        """Score all requests."""
        updater = threading.Thread(target=self._update)
        scorers = [threading.Thread(target=self._score, args=(t,)) for t in range(self._threads)]
        for thread in (updater, *scorers):
            thread.start()
        for thread in scorers:
            thread.join()
        self._over.set()
        updater.join()

    def _score(self, thread: int) -> None:
        random = torch.Generator().manual_seed(thread)
        batches = [
            torch.randint(-NUM_IDS // 20, NUM_IDS * 21 // 20, (size,), generator=random)
            for size in SIZES * 20
        ]
        try:
            for number in range(self._each):
                ids = batches[number % len(batches)]
                self.begun[thread, number] = time.perf_counter()
                version = self.followed.model
                found = version(ids)
                self.ends[thread, number] = time.perf_counter(), time.process_time()
                self.versions.add(version.step)
                if not found.equal(self._truth.scores(version.step, ids)):
                    self.wrong.append((version.step, ids, found))
                if number % 10 == 9:
                    with self._counting:
                        self._done.value += 10
        except BaseException as error:
            self.wrong.append(error)
            raise

    def _update(self) -> None:
        while not self._over.wait(0.005):
            start, cpu = (time.perf_counter(), time.process_time()), time.thread_time()
            try:
                is_new = self.followed.refresh()
            except BaseException as error:
                self.wrong.append(error)
                raise
            if is_new:
                cpu = time.thread_time() - cpu
                self.updates.append((*start, time.perf_counter(), time.process_time(), cpu))
                self.nbytes = max(self.nbytes, self.followed.nbytes)
            self.memory.append((self._done.value, _resident_mb()))

    def stalls(self) -> dict[str, float]:
        """Return the longest times without an answer, with a delta being taken up and without."""
        found = {}
        for axis, name in enumerate(("ms", "cpu_ms")):
            ends = np.sort(self.ends[:, :, axis].reshape(-1))
            gaps = np.diff(ends)
            is_update = np.zeros(len(gaps), np.bool_)
            for update in self.updates:
                first = np.searchsorted(ends, update[axis], side="right") - 1
                last = np.searchsorted(ends, update[2 + axis], side="left")
                is_update[max(first, 0) : last] = True
            for kind, chosen in (("stall", gaps[is_update]), ("calm", gaps[~is_update])):
                found[f"{kind}_{name}"] = 1e3 * float(chosen.max(initial=0))
        return found

    def figures(self) -> dict[str, float]:
        """Return what was measured."""
        total = self._done.value
        settled = [mb for done, mb in self.memory if done >= total / 5]
        seconds = np.sort((self.ends[:, :, 0] - self.begun).reshape(-1))
        taken = np.array([update[2] - update[0] for update in self.updates] or [0.0])
        cpu = max((update[4] for update in self.updates), default=0.0)
        return {
            "requests": float(self.ends[:, :, 0].size),
            "wrong": float(len(self.wrong)),
            "versions": float(len(self.versions)),
            "updates": float(len(self.updates)),
            "update_ms": 1e3 * float(np.median(taken)),
            "update_cpu_ms": 1e3 * cpu,
            **self.stalls(),
            "p50_ms": 1e3 * float(seconds[len(seconds) // 2]),
            "p99_ms": 1e3 * float(seconds[len(seconds) * 99 // 100]),
            "grown_mb": settled[-1] - settled[0] if settled else 0.0,
            "layers_mb": self.nbytes / 1e6,
        }


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(requests: int, deltas: int, threads: int) -> dict[str, float]:
    """Return the figures of a run, with the writer in a process of its own."""
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    with tempfile.TemporaryDirectory() as folder:
        writer = context.Process(target=_write_apart, args=(folder, deltas, done, requests))
        writer.start()
        while not (Path(folder) / "manifest.json").exists():
            if writer.exitcode is not None:
                raise RuntimeError("the writer ended")
            time.sleep(0.05)
        load = Load(folder, Truth(deltas), requests, threads, done)
        gc.collect()
        gc.freeze()  # as a server does: a collection over all of torch takes tens of ms
        load.run()
        done.value = 1 << 40  # the writer need not wait any more
        writer.join()
        if writer.exitcode:
            raise RuntimeError("the writer failed")
        load.followed.close()
        return {**load.figures(), "deltas": float(deltas), "scorers": float(threads)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--deltas", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--dry", action="store_true", help="append no result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(args.requests, args.deltas, args.threads)
    rows = [[name, f"{value:.6g}"] for name, value in result.items()]
    print_table("scores while deltas arrive", ["figure", "value"], rows)
    if not args.dry:
        append_result("bench_following", result)
    missed = [
        name
        for name, is_met in {
            "wrong = 0": result["wrong"] == 0,
            f"stall_ms <= {MAX_STALL_MS}": result["stall_ms"] <= MAX_STALL_MS,
            f"update_cpu_ms <= {MAX_STALL_MS}": result["update_cpu_ms"] <= MAX_STALL_MS,
            f"grown_mb <= {MAX_GROWN_MB}": result["grown_mb"] <= MAX_GROWN_MB,
        }.items()
        if not is_met
    ]
    if missed:
        sys.exit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
