"""Peak memory and the longest step of a growing table: dim 8, Adam state, all ids new.

Measures: ``recis_lightning.table.row_store``, ``recis_lightning.table.storage``,
``recis_lightning.ops.host_memory``.

A child process trains on batches of new ids (lookup, backward, update). The payload of a row is its
id (8 bytes), weights and state. Peak memory is the largest resident memory of the process, growth
of the index included, minus that before the first row. "peak of a step" is the largest ratio of a
step's own peak to the payload after that step, once a tenth of the rows is there. On a GPU, memory
is what torch's allocator has allocated.

The peers of ``growing_peers`` grow the same way, each in a child of its own, over ``--peer-ids``
ids; a peer that is not installed is left out with a line. The payload of a peer's row counts its
own optimizer's state, and its id, though two of them keep none.

    python benchmarks/bench_memory.py [--full] [--num-ids N] [--batch N] [--peer-ids N]
        [--parts ...] [--device D] [--dry]
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.growing_peers import peers
from benchmarks.harness import (
    add_device,
    append_result,
    device,
    is_on_gpu,
    print_table,
    stopwatch,
    use_device,
)
from benchmarks.targets import meets_targets
from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.optim import SparseAdam

DIM, STATE = 8, 2
PAYLOAD = 8 + 4 * DIM * (1 + STATE)  # bytes per row
SPREAD = 7_919_317
PARTS = ("grow", "peers")


def _resident(field: str) -> int:
    """Return bytes of memory: VmRSS is current, VmHWM the peak since ``_reset_peak``."""
    if is_on_gpu():
        readers = {"VmRSS": torch.cuda.memory_allocated, "VmHWM": torch.cuda.max_memory_allocated}
        return int(readers[field]())
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def _reset_peak() -> None:
    if is_on_gpu():
        torch.cuda.reset_peak_memory_stats()
        return
    Path("/proc/self/clear_refs").write_text("5")


class Growing:
    """Table, and training steps whose ids are all new."""

    def __init__(self, batch: int) -> None:
        self.embedding = DynamicEmbedding(DIM, name="growing")
        self.table = hash_tables(self.embedding)[0]
        self.optimizer = SparseAdam([self.table], lr=1e-3)
        self.batch, self.gradient, self.num_ids = batch, torch.ones(batch, DIM), 0

    def step(self) -> None:
        ids = torch.arange(self.num_ids, self.num_ids + self.batch, device=device()) * SPREAD
        self.num_ids += self.batch
        self.embedding(ids).backward(self.gradient)
        self.optimizer.step()


def grow_peer(name: str, num_ids: int, batch: int) -> dict[str, Any]:
    """Do what ``grow`` does with a peer, in the child; return memory in bytes, or what it lacks."""
    make = peers(DIM, SPREAD)[name][1]
    try:
        for _ in range(2):  # starts torch's threads; small, as freed memory stays resident
            make(3000, 1000).step()
    except ImportError as error:
        return {"missing": str(error)}
    gc.collect()
    before, peaks = _resident("VmRSS"), []
    _reset_peak()
    growing = make(num_ids, batch)
    for _ in range(num_ids // batch):
        growing.step()
        peaks.append(_resident("VmHWM") - before)
        _reset_peak()
    gc.collect()
    return {"before": before, "held": _resident("VmRSS") - before, "peaks": peaks}


def grow(num_ids: int, batch: int) -> dict[str, Any]:
    """Insert ``num_ids`` ids, in the child; return times in seconds and memory in bytes."""
    for _ in range(3):  # compiles, and starts torch's threads
        Growing(batch).step()
    growing = Growing(batch)
    before, peaks, seconds = _resident("VmRSS"), [], []
    for _ in range(num_ids // batch):
        _reset_peak()
        seconds.append(stopwatch(growing.step)[0] / 1e3)
        peaks.append(_resident("VmHWM") - before)
    assert len(growing.table) == num_ids // batch * batch
    sample = torch.arange(0, len(growing.table), 997) * SPREAD
    rows = growing.table.embeddings(sample)
    assert bool((rows != 0).all()), "rows were lost while the table grew"
    return {
        "before": before,
        "held": _resident("VmRSS") - before,
        "nbytes": growing.table.nbytes,
        "peaks": peaks,
        "seconds": seconds,
    }


def run_child(num_ids: int, batch: int, contender: str = "ours") -> dict[str, Any]:
    """Grow a table, or a peer, in a child process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", contender]
    command += ["--num-ids", str(num_ids), "--batch", str(batch), "--device", device().type]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def check() -> None:
    """Check three training steps of a growing table against ``nn.Embedding``."""
    growing, batch = Growing(1000), 1000
    for _ in range(3):
        growing.step()
    ids = torch.arange(3 * batch) * SPREAD
    peer = torch.nn.Embedding(3 * batch, DIM, sparse=True)
    fresh = Growing(batch)
    fresh.embedding(ids)
    peer.weight.data.copy_(fresh.table.embeddings(ids))
    optimizer = torch.optim.SparseAdam([peer.weight], lr=1e-3)
    for i in range(3):
        peer(torch.arange(i * batch, (i + 1) * batch)).backward(growing.gradient)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(growing.table.embeddings(ids), peer.weight.data)


def measure(num_ids: int, batch: int) -> dict[str, Any]:
    """Grow a table once; print and return the figures."""
    grown = run_child(num_ids, batch)
    payloads = [PAYLOAD * batch * (i + 1) for i in range(len(grown["peaks"]))]
    payload = payloads[-1]
    pairs = [*zip(grown["peaks"], payloads, strict=True)]
    figures = {
        "peak": max(grown["peaks"]) / payload,
        "peak_of_process": (max(grown["peaks"]) + grown["before"]) / payload,
        "held": grown["held"] / payload,
        "counted": grown["nbytes"] / payload,
        "on_the_way": max(peak / size for peak, size in pairs[len(pairs) // 10 :]),
        "longest": max(grown["seconds"]),
        "median": median(grown["seconds"]),
        "total": sum(grown["seconds"]),
    }
    columns = ["rows", "payload MB", "peak ratio", "held", "table.nbytes", "peak of a step"]
    columns += ["longest step s", "median step s", "total s"]
    row: list[Any] = [f"{len(pairs) * batch:,}", payload / 1e6]
    row += [figures[key] for key in ("peak", "held", "counted", "on_the_way")]
    row += [figures[key] for key in ("longest", "median", "total")]
    print_table(f"Growth in steps of {batch:,} new ids, dim {DIM}, Adam", columns, [row])
    print(f"  with Python and torch: {figures['peak_of_process']:.2f} times the payload")
    shape = {"num_ids": num_ids, "batch": batch, "dim": DIM}
    return {"part": "grow", "shape": shape, "columns": columns, "rows": [row], "figures": figures}


def compare(num_ids: int, batch: int) -> dict[str, Any]:
    """Grow ours and the peers once each; print and return bytes a row."""
    contenders = {"ours + SparseAdam": STATE}
    contenders |= {name: words for name, (words, _) in peers(DIM, SPREAD).items()}
    rows: list[list[Any]] = []
    for name, words in contenders.items():
        grown = run_child(num_ids, batch, "ours" if name.startswith("ours") else name)
        if "missing" in grown:
            print(f"{name}: skipped, {grown['missing']}")
            continue
        payload = 8 + 4 * DIM * (1 + words)
        count = num_ids // batch * batch
        held, peak = grown["held"] / count, max(grown["peaks"]) / count
        rows.append([name, payload, held, peak, held / payload, peak / payload])
    columns = ["", "payload B/row", "held B/row", "peak B/row", "held ratio", "peak ratio"]
    print_table(f"{num_ids:,} rows in steps of {batch:,} new ids, dim {DIM}", columns, rows)
    shape = {"num_ids": num_ids, "batch": batch, "dim": DIM}
    figures = {"held": rows[0][4], "peak": rows[0][5]}
    return {"part": "peers", "shape": shape, "columns": columns, "rows": rows, "figures": figures}


def main(arguments: list[str] | None = None) -> int:
    """Check, measure and append the results; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description="Memory and longest step of a growing table")
    parser.add_argument("--num-ids", type=int, default=5_000_000)
    parser.add_argument("--full", action="store_true", help="50M rows")
    parser.add_argument("--batch", type=int, default=100_000, help="new ids per step")
    parser.add_argument("--dry", action="store_true", help="append nothing to the results")
    parser.add_argument("--peer-ids", type=int, default=1_000_000, help="rows beside the peers")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, metavar="PART")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    add_device(parser)
    given = parser.parse_args(arguments)
    use_device(given.device)
    num_ids = 50_000_000 if given.full else given.num_ids
    if given.child:
        is_ours = given.child == "ours"
        grown = (grow if is_ours else partial(grow_peer, given.child))(num_ids, given.batch)
        print(json.dumps(grown))
        return 0
    if not is_on_gpu() and not Path("/proc/self/clear_refs").exists():
        print("skipped: peak memory is read from Linux's /proc")
        return 0
    check()
    lines = [measure(num_ids, given.batch)] if "grow" in given.parts else []
    if "peers" in given.parts and not is_on_gpu("the peers"):
        lines.append(compare(given.peer_ids, min(given.batch, given.peer_ids)))
    all_met = True
    for line in lines:
        all_met &= meets_targets("bench_memory", line)
        if not given.dry:
            append_result("bench_memory", line)
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
