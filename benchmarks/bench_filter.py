"""Eviction of a tenth of 10M rows of dim 16 with Adam state, by their last-seen steps.

Measures: ``recis_lightning.table.evictor``, ``recis_lightning.eviction``,
``recis_lightning.ops.row_access``.

``table.evict()`` with ``GlobalStepFilter`` is timed: it scans the rows' last-seen steps, moves the
remaining ids into a new index and frees the evicted rows. A second figure times a scan that finds
no row to evict. The bandwidth limit is the bytes of the last-seen steps, read once, and of the
index, read and written once, divided by the copy rate.

    python benchmarks/bench_filter.py [--num-ids N] [--rounds N] [--device D] [--dry]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.harness import (
    add_device,
    append_result,
    copy_gb_per_s,
    print_table,
    time_prepared,
    use_device,
)
from benchmarks.targets import meets_targets
from recis_lightning import HashTable, hash_tables
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.ops import hash_index, row_init
from recis_lightning.optim import SparseAdam

DIM, FILTER_STEP = 16, 100


class Ageing:
    """Table whose random tenth of ids is old."""

    def __init__(self, num_ids: int) -> None:
        torch.manual_seed(0)
        self.ids = torch.randint(-(2**63), 2**63 - 1, (num_ids,))
        order = torch.randperm(num_ids)
        self.old, self.young = self.ids[order[: num_ids // 10]], self.ids[order[num_ids // 10 :]]
        self.table = HashTable(DIM, eviction=GlobalStepFilter(FILTER_STEP), name="filter")
        self.optimizer = SparseAdam(hash_tables(self.table), lr=1e-3)
        self.touch(self.ids)

    def touch(self, ids: Tensor) -> None:
        """Look ids up as training does: unknown ones get a row, all are stamped."""
        segments = self.table.storage.segments(ids, insert=True)
        rows, new = hash_index.find_or_insert(
            segments, len(ids), [self.table.storage], [0], ids.device
        )
        if new is not None:
            row_init.init_rows_(rows, new, segments, DIM, False)

    def prepare(self) -> Callable[[], int]:
        """Insert the evicted ids again and make them old; return the eviction."""
        self.touch(self.old)
        self.table.update_step(FILTER_STEP + 1)
        self.touch(self.young)
        return self.table.evict

    def prepare_fresh(self) -> Callable[[], int]:
        """Look up all ids; return an eviction that finds no row."""
        self.touch(self.ids)
        return self.table.evict


def check(num_ids: int = 20_000) -> None:
    """Check that an eviction removes the old ids and leaves the young ones unchanged."""
    ageing = Ageing(num_ids)
    table = ageing.table
    weights = table.embeddings(ageing.ids)
    young = table.embeddings(ageing.young)
    for _ in range(3):
        assert ageing.prepare_fresh()() == 0
        assert len(table) == num_ids
        assert torch.equal(table.embeddings(ageing.ids), weights)
        assert ageing.prepare()() == ageing.old.numel()
        assert len(table) == ageing.young.numel()
        assert torch.equal(table.embeddings(ageing.young), young)
        assert not table.embeddings(ageing.old).any()
        assert torch.equal(table.ids().sort()[0], ageing.young.sort()[0])
    assert table.storage.rows.num_rows == num_ids, "freed rows were not used again"


def measure(num_ids: int, rounds: int) -> dict[str, Any]:
    """Time evictions of a tenth of the rows, and scans that find no row."""
    rate = copy_gb_per_s()
    ageing = Ageing(num_ids)
    times = time_prepared({"a tenth": ageing.prepare, "none": ageing.prepare_fresh}, rounds)
    limit = (8 * num_ids + 32 * ageing.table.capacity) / rate / 1e6
    row = [f"{num_ids:,} rows, dim {DIM}", times["a tenth"], times["none"], limit]
    columns = ["eviction", "a tenth ms", "none ms", "limit ms", "of limit"]
    rows = [[*row, times["a tenth"] / limit]]
    print_table(f"Eviction, copy rate {rate:.1f} GB/s", columns, rows)
    figures = {"seconds": times["a tenth"] / 1e3, "seconds_none": times["none"] / 1e3}
    shape = {"num_ids": num_ids, "dim": DIM}
    return {"part": "evict", "shape": shape, "columns": columns, "rows": rows, "figures": figures}


def main(arguments: list[str] | None = None) -> int:
    """Check, time and append the results; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description="Eviction of a tenth of a table")
    parser.add_argument("--num-ids", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="append nothing to the results")
    add_device(parser)
    given = parser.parse_args(arguments)
    use_device(given.device)
    check()
    line = measure(given.num_ids, given.rounds)
    all_met = meets_targets("bench_filter", line)
    if not given.dry:
        append_result("bench_filter", line)
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
