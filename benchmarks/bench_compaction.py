"""Memory freed by a large eviction: nine tenths of 10M rows of dim 16 with Adam state.

Measures: ``recis_lightning.table.storage``, ``recis_lightning.table.row_store``,
``recis_lightning.table.evictor``.

A child process reports ``table.nbytes`` and its resident memory before and after
``table.evict()``. Both should fall by at least 80% of the bytes of all rows (weights and state).
The eviction is timed with its compaction: selecting rows, removing them, moving the remaining rows
and freeing memory.

    python benchmarks/bench_compaction.py [--num-ids N] [--dry]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.harness import append_result, print_table
from benchmarks.targets import meets_targets
from recis_lightning import HashTable
from recis_lightning.eviction import Eviction, GlobalStepFilter, MaxRows
from recis_lightning.optim import SparseAdam

DIM, STATE, BATCH = 16, 2, 100_000
ROW_BYTES = 4 * DIM * (1 + STATE)
SPREAD = 7_919_317
POLICIES: dict[str, Eviction] = {
    "GlobalStepFilter": GlobalStepFilter(1),
    "MaxRows, LRU": MaxRows(0),
    "MaxRows, LFU": MaxRows(0, by="count"),
}


def _resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def shrink(num_ids: int, name: str) -> dict[str, Any]:
    """Fill a table and evict nine tenths of it, in the child; return bytes and seconds."""
    kept = num_ids // 10
    policy = MaxRows(kept, POLICIES[name].by) if "MaxRows" in name else POLICIES[name]
    for size in (BATCH, num_ids):  # the first pass compiles
        table = HashTable(DIM, eviction=policy, name="shrinking")
        optimizer = SparseAdam([table], lr=1e-3)
        young = torch.arange(0, size, 10) * SPREAD
        for start in range(0, size, BATCH):
            ids = torch.arange(start, start + BATCH) * SPREAD
            table.insert(ids, torch.ones(BATCH, 1).expand(BATCH, DIM) * ids[:, None])
        table.update_step(2)
        for ids in young.split(BATCH):
            table.insert(ids, table.embeddings(ids))
        before, resident = table.nbytes, _resident()
        start_time = time.perf_counter()
        report = table.evict()
        seconds = time.perf_counter() - start_time
        after, left = table.nbytes, _resident()
        if size == num_ids:
            assert report == num_ids - kept
        expected = (young[:, None] * torch.ones(1, DIM)).float()
        if "MaxRows" not in name or size == num_ids:
            assert torch.equal(table.embeddings(young), expected), "rows were lost or mixed up"
        del optimizer
    all_rows_bytes = num_ids * ROW_BYTES
    return {
        "before": before,
        "after": after,
        "resident": resident,
        "left": left,
        "counted": (before - after) / all_rows_bytes,
        "returned": (resident - left) / all_rows_bytes,
        "seconds": seconds,
    }


def run_child(num_ids: int, name: str) -> dict[str, Any]:
    """Shrink a table in a child process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", name]
    command += ["--num-ids", str(num_ids)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def measure(num_ids: int, names: list[str]) -> dict[str, Any]:
    """Shrink a table once by each policy; print and return the figures."""
    shrunk = {name: run_child(num_ids, name) for name in names}
    columns = ["policy", "nbytes MB", "after", "resident MB", "after", "freed", "resident", "s"]
    rows = [
        [
            name,
            *(run[key] / 1e6 for key in ("before", "after", "resident", "left")),
            *(run[key] for key in ("counted", "returned", "seconds")),
        ]
        for name, run in shrunk.items()
    ]
    print_table(f"{num_ids:,} rows, dim {DIM}, Adam, nine tenths evicted", columns, rows)
    figures = {
        "counted": min(run["counted"] for run in shrunk.values()),
        "returned": min(run["returned"] for run in shrunk.values()),
        "seconds": max(run["seconds"] for run in shrunk.values()),
    }
    shape = {"num_ids": num_ids, "dim": DIM}
    return {"part": "shrink", "shape": shape, "columns": columns, "rows": rows, "figures": figures}


def main() -> int:
    """Measure and append the results; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description="Memory freed by a large eviction")
    parser.add_argument("--num-ids", type=int, default=10_000_000, help="a multiple of 100,000")
    parser.add_argument("--dry", action="store_true", help="append nothing to the results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(shrink(given.num_ids, given.child)))
        return 0
    if not Path("/proc/self/status").exists():
        print("skipped: resident memory is read from Linux's /proc")
        return 0
    line = measure(given.num_ids, [*POLICIES])
    all_met = meets_targets("bench_compaction", line)
    if not given.dry:
        append_result("bench_compaction", line)
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
